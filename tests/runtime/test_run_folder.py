import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from runtime.run_folder import RunFolderError, check_space, open_run

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {"model": "m", "steps": 10, "optim": {"lr": 1e-5, "betas": [0.9, 0.99]}}


def started(run_dir: Path, config: dict[str, Any] = CONFIG) -> Path:
    """A run that wrote something and ended."""
    with open_run(run_dir, config=config, resume=False) as run:
        run.metrics_path.write_text('{"step": 1}\n')
    return run_dir


def changed(**values: Any) -> dict[str, Any]:
    return {**CONFIG, **values}


def test_records_config_and_environment(tmp_path: Path) -> None:
    with open_run(tmp_path / "a" / "b", config=CONFIG, resume=False) as run:
        assert not run.resumed
        assert run.rollouts_dir.is_dir() and run.checkpoints_dir.is_dir()
        assert (run.metrics_path.name, run.report_path.name) == ("metrics.jsonl", "report.html")
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["python"].startswith("3.") and "torch" in environment["packages"]
    assert environment["cpus"] == os.cpu_count() and isinstance(environment["gpus"], list)
    [attempt] = environment["attempts"]
    assert attempt["argv"] == sys.argv and attempt["started"].endswith("+00:00") and "git" in attempt


def test_used_folder_is_refused_without_resume(tmp_path: Path) -> None:
    started(tmp_path)
    with pytest.raises(RunFolderError, match=r"already holds a run \(metrics\.jsonl\); add --resume"):
        open_run(tmp_path, config=CONFIG, resume=False)


def test_checkpoint_alone_counts_as_used(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(RunFolderError, match="checkpoints: 1"):
        open_run(tmp_path, config=CONFIG, resume=False)


def test_resume_in_an_empty_folder_starts_fresh_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), open_run(tmp_path / "new", config=CONFIG, resume=True) as run:
        assert not run.resumed
    assert "nothing to resume from" in caplog.text
    assert (tmp_path / "new" / "config.yaml").exists()


def test_resume_keeps_the_records_and_adds_the_attempt(tmp_path: Path) -> None:
    config = (started(tmp_path) / "config.yaml").read_text()
    with open_run(tmp_path, config=changed(steps=20), resume=True, may_change=["steps"]) as run:
        assert run.resumed
    assert (tmp_path / "config.yaml").read_text() == config
    attempts = json.loads((tmp_path / "environment.json").read_text())["attempts"]
    assert len(attempts) == 2
    assert attempts[1]["changed_settings"] == {"steps": [10, 20]}


def test_changed_settings_are_refused_with_old_and_new(tmp_path: Path) -> None:
    started(tmp_path)
    other = changed(optim={"lr": 2e-5, "betas": [0.9, 0.99], "eps": 1})
    with pytest.raises(RunFolderError) as error:
        open_run(tmp_path, config=other, resume=True, may_change=["model"])
    assert "  optim.lr: 1e-05 -> 2e-05" in str(error.value)
    assert "  optim.eps: (absent) -> 1" in str(error.value)
    assert "betas" not in str(error.value)
    # The refusal let go of the lock, and a group's name covers what is in it.
    open_run(tmp_path, config=other, resume=True, may_change=["optim"]).close()


def test_tuples_and_integer_keys_compare_as_saved(tmp_path: Path) -> None:
    config = {"betas": [0.9, 0.99], "weights": {1: 2.0}, "empty": {}, "none": None, "inf": float("inf")}
    started(tmp_path, config)
    assert open_run(tmp_path, config=config, resume=True).resumed


def test_second_process_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    code = (
        "import sys; from runtime.run_folder import open_run\n"
        "run = open_run(sys.argv[1], config={}, resume=True); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "open\n"
        with pytest.raises(RunFolderError, match=rf"{tmp_path} is in use .*pid {child.pid} on"):
            open_run(tmp_path, config={}, resume=True)
        child.kill()
    open_run(tmp_path, config={}, resume=True).close()  # a killed run's lock is gone with it


def test_child_that_outlives_a_killed_run_does_not_keep_its_lock(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from runtime.run_folder import open_run\n"
        "run = open_run(sys.argv[1], config={}, resume=True)\n"
        "child = os.fork()\n"
        "if child == 0: print(os.getpid(), flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        child = int(run.stdout.readline())
        run.kill()
        run.wait()
        try:
            open_run(tmp_path, config={}, resume=True).close()
        finally:
            os.kill(child, signal.SIGKILL)


def test_unwritable_folder_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"run_dir=.*file/run can't be written \(Not a directory\)"):
        open_run(tmp_path / "file" / "run", config=CONFIG, resume=False)
    with pytest.raises(RunFolderError, match="can't be written"):
        open_run("/proc/run", config=CONFIG, resume=False)


@pytest.mark.parametrize(
    ("options", "reason"), [("ro", "Read-only file system"), ("size=4k", "No space left on device")]
)
def test_read_only_and_full_disks_are_said_first(
    small_disk: Callable[..., list[str]], options: str, reason: str
) -> None:
    code = (
        "import sys; from pathlib import Path; from runtime.run_folder import RunFolderError, open_run\n"
        "folder = Path(sys.argv[1])\n"
        f"if {options!r} != 'ro': (folder / 'full').write_bytes(bytes(4096))\n"
        "try: open_run(folder, config={}, resume=True)\n"
        "except RunFolderError as error: print(str(error).replace(str(folder), 'disk'))"
    )
    said = f"run_dir=disk can't be written ({reason}); free it, or give another --run_dir"
    assert small_disk(code, options) == [said]


@pytest.mark.parametrize("name", ["checkpoints", "rollouts"])
def test_folder_inside_that_cannot_be_written_is_said_first(tmp_path: Path, name: str) -> None:
    (started(tmp_path) / name).rmdir()
    (tmp_path / name).symlink_to("/proc/self")
    with pytest.raises(RunFolderError, match=rf"run_dir=.*/{name} can't be written"):
        open_run(tmp_path, config=CONFIG, resume=True)


def test_run_without_its_checkpoints_folder_is_not_started_afresh(tmp_path: Path) -> None:
    (started(tmp_path) / "checkpoints").rmdir()
    with pytest.raises(RunFolderError, match=r"holds a run \(metrics\.jsonl\) whose checkpoints folder is gone"):
        open_run(tmp_path, config=CONFIG, resume=True)


def test_too_little_space_names_what_is_needed_and_free(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "not" / "yet", free // 2)
    with pytest.raises(RunFolderError, match=rf"run_dir={tmp_path}/run: the run needs .* GB there and .* GB are free"):
        check_space(tmp_path / "run", 2 * free)


def test_unreadable_saved_config_is_named(tmp_path: Path) -> None:
    (started(tmp_path) / "config.yaml").write_text("a: [")
    with pytest.raises(RunFolderError, match=r"config\.yaml can't be read"):
        open_run(tmp_path, config=CONFIG, resume=True)


def test_importing_runtime_is_light() -> None:
    code = "import runtime.run_folder, runtime.metrics, runtime.interrupt, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
