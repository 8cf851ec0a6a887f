import importlib.util
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from runtime import metrics as metrics_module
from runtime.errors import DiskError, UserError
from runtime.metrics import MetricsLog, read_metrics

ROOT = Path(__file__).parents[2]


def open_log(folder: Path, report_to: tuple[str, ...] = ()) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl", report_to, run_name="r", run_dir=folder, config={"optim": {"lr": 1e-3}})


def test_one_line_per_step_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.log(1, {"reward": torch.tensor(0.5), "kl": float("nan"), "n": np.int64(3), "parts": [float("inf"), 1]})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "reward": 0.5, "kl": null, "n": 3, "parts": [null, 1]}\n'
    log.close()


def test_reopening_keeps_old_lines(tmp_path: Path) -> None:
    for step in (1, 2):
        with open_log(tmp_path) as log:
            log.log(step, {"loss": 1.0})
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_torn_last_line_is_cut_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with caplog.at_level(logging.WARNING), open_log(tmp_path) as log:
        log.log(2, {})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert "torn last line (15 bytes)" in caplog.text


def test_truncate_after_drops_later_steps_only(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (1, 2, 3, 4):
            log.log(step, {})
        assert log.truncate_after(2) == 2
        log.log(3, {"again": True})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_truncate_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    pid = os.fork()
    if pid == 0:
        os.environ["FAILPOINT"] = "file/before-rename"
        try:
            open_log(tmp_path).truncate_after(1)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_truncate_after_drops_marked_lines_of_the_step_itself(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for line in ({}, {"final": True}):
            log.log(2, line)
        assert log.truncate_after(2) == 0
        assert log.truncate_after(2, with_key="final") == 1
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 2}]


def test_synced_lines_are_on_disk_with_their_folders_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durable: dict[str, str] = {}
    fsync = os.fsync

    def recorded(fd: int) -> None:
        fsync(fd)
        path = Path(f"/proc/self/fd/{fd}").readlink()
        durable[path.name] = path.read_text() if path.is_file() else " ".join(p.name for p in path.iterdir())

    monkeypatch.setattr(os, "fsync", recorded)
    with open_log(tmp_path / "run") as log:
        log.log(1, {"loss": 1.0})
        log.sync()
    assert durable["metrics.jsonl"] == '{"step": 1, "loss": 1.0}\n'
    assert durable["run"] == "metrics.jsonl" and "run" in durable[tmp_path.name]


def test_short_write_is_an_error_and_its_torn_line_is_cut(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import resource, sys; from pathlib import Path; from runtime.metrics import MetricsLog\n"
        "folder = Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))\n"
        "with MetricsLog(folder / 'metrics.jsonl', run_name='r', run_dir=folder, config={}) as log:\n"
        "    log.log(1, {})\n"
        "    log.log(2, {'note': 'x' * 600})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert f"DiskError: {path}: File too large; raise the limit on file sizes" in done.stderr
    assert path.stat().st_size == 400
    with caplog.at_level(logging.WARNING), open_log(tmp_path) as log:
        log.log(2, {})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    assert "cut off a torn last line (388 bytes)" in caplog.text


def test_full_disk_is_one_error_and_closing_adds_none(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.log(1, {})
        with Path("/dev/full").open("w") as full:
            os.dup2(full.fileno(), log._file.fileno())
        with pytest.raises(DiskError, match=r"metrics\.jsonl: No space left on device; free space"):
            log.log(2, {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_damaged_middle_line_is_kept_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff{"st\n{"step": 3}\n')
    with caplog.at_level(logging.WARNING), open_log(tmp_path) as log:
        log.truncate_after(1)
    assert path.read_bytes() == b'{"step": 1}\n\xff{"st\n'
    assert "metrics.jsonl:2 is damaged" in caplog.text


def test_unknown_tracker_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report_to='wandbb'.*tensorboard, trackio, wandb"):
        open_log(tmp_path, ("wandbb",))


def test_absent_tracker_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[track\]'"):
        open_log(tmp_path, ("trackio",))


def test_failing_tracker_warns_once_and_the_log_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the tracker wants a folder")
    with caplog.at_level(logging.WARNING), open_log(tmp_path, ("tensorboard",)) as log:
        log.log(1, {"loss": 1.0})
        log.log(2, {"loss": 1.0})
    assert caplog.text.count("tensorboard failed") == 1
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2


def test_tensorboard_gets_the_numbers_and_hides_repeated_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, ("tensorboard",)) as log:
        for step in (1, 2, 3):
            log.log(step, {"loss": float(step), "note": "text"})
    with open_log(tmp_path, ("tensorboard",)) as log:
        log.truncate_after(1)
        log.log(2, {"loss": 20.0})
    events: Any = EventAccumulator(str(tmp_path / "tensorboard" / "r"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.slow
def test_wandb_offline_and_trackio_write_under_the_run_folder(tmp_path: Path) -> None:
    if not all(map(importlib.util.find_spec, ("wandb", "trackio"))):
        pytest.skip("needs the [track] extra")
    # Processes of their own, as a run and its resume are: trackio reads its folder once, when imported.
    code = (
        "import sys; from pathlib import Path; from runtime.metrics import MetricsLog\n"
        "folder, step = Path(sys.argv[1]), int(sys.argv[2])\n"
        "with MetricsLog(folder / 'metrics.jsonl', ('wandb', 'trackio'),\n"
        "                run_name='r', run_dir=folder, config={'a': {'b': 1}}) as log:\n"
        "    log.log(step, {'loss': 1.0})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRACKIO_DIR"}
    environment |= {"WANDB_MODE": "offline", "WANDB_CACHE_DIR": str(tmp_path / "cache")}
    for step in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), step],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "failed" not in done.stderr
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2
    assert list((tmp_path / "trackio").glob("*.db"))
    assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
