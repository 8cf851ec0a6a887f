"""Killed anywhere, and the same command again: the run ends as if nothing had happened, bit for bit.

Real processes and real signals, on a run of about a second with everything on that has a state to lose (a reference
that is replaced, dynamic sampling, a curriculum). SIGKILL leaves the page cache, so what a power cut would take is
tests/runtime/test_checkpoint.py's matter.
"""

import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import pytest

from runtime.checkpoint import latest_checkpoint
from runtime.metrics import read_metrics

ROOT = Path(__file__).parents[2]

SEVERAL_UPDATES = ("--optim.minibatches=2", "--optim.epochs=2", "--optim.microbatch_tokens=24", "--checkpoint.every=2")
"""The other variant: π_old is stored, gradients accumulate, and a killed step may lie behind its checkpoint."""


class Whole(NamedTuple):
    """An uninterrupted run."""

    outcome: dict[str, Any]
    passes: list[str]
    """Every pass of a failpoint, as FAILPOINT takes it: name:n."""
    seconds: float


def passes(log: Path) -> list[str]:
    names = log.read_text().split()
    return [f"{name}:{names[: i + 1].count(name)}" for i, name in enumerate(names)]


def first_of_each(passes: list[str]) -> list[str]:
    return [name for name in passes if name.endswith(":1")]


class Trials:
    """Kills and resumes, each in a folder of its own."""

    def __init__(self, commands: Any, outcome: Any, folder: Path, *flags: str) -> None:
        self.commands, self.collect, self.folder, self.flags = commands, outcome, folder, flags
        log = folder / "passes"
        ended = self.start(folder / "whole", FAILPOINT_LOG=str(log))
        assert ended.code == 0, ended.output
        self.whole = Whole(outcome(folder / "whole"), passes(log), ended.seconds)

    def start(self, run_dir: Path, **options: Any) -> Any:
        return self.commands.grpo(run_dir, *self.flags, **options)

    def killed(self, run_dir: Path, **options: Any) -> None:
        """Start or resume it, and see it die by SIGKILL."""
        ended = self.start(run_dir, **options)
        assert ended.code == -signal.SIGKILL, (options, ended.output)

    def wrong(self, run_dir: Path) -> list[str]:
        """Resume to the end; what then differs from the uninterrupted run."""
        ended = self.start(run_dir)
        if ended.code:
            return [ended.output]
        found, whole = self.collect(run_dir), self.whole.outcome
        shutil.rmtree(run_dir)  # hundreds of them
        return [name for name in sorted(found.keys() | whole.keys()) if found.get(name) != whole.get(name)]

    def at_passes(self, passes: Iterable[str]) -> dict[str, list[str]]:
        """What differs after a kill at each of them."""
        results: dict[str, list[str]] = {}
        for name in passes:
            self.killed(self.folder / name.replace("/", "-"), FAILPOINT=name)
            results[name] = self.wrong(self.folder / name.replace("/", "-"))
        return {name: differs for name, differs in results.items() if differs}

    def at_moments(self, count: int, *, seed: int) -> dict[float, list[str]]:
        """What differs after a kill at that many moments of a run, evenly spread and each at random in its share."""
        draw = random.Random(seed)
        results: dict[float, list[str]] = {}
        kills = 0
        for i in range(count):
            moment = (i + draw.random()) / count * self.whole.seconds
            ended = self.start(self.folder / f"{moment}", kill_after=moment)
            assert ended.code in (-signal.SIGKILL, 0), ended.output  # a run may be faster than the first was
            kills += ended.code != 0
            results[moment] = self.wrong(self.folder / f"{moment}")
        assert kills >= 0.6 * count
        return {moment: differs for moment, differs in results.items() if differs}

    def told_to_leave(self, passes: Iterable[str]) -> dict[str, list[str]]:
        """What is wrong after a SIGTERM at each of them, and then the rest of the run."""
        results: dict[str, list[str]] = {}
        for name in passes:
            run_dir = self.folder / f"term-{name.replace('/', '-')}"
            ended = self.start(run_dir, FAILPOINT=name, FAILPOINT_SIGNAL="SIGTERM")
            assert ended.code == 128 + signal.SIGTERM and "SIGTERM: saving" in ended.output, (name, ended.output)
            saved = latest_checkpoint(run_dir / "checkpoints")
            done = max([m["step"] for m in read_metrics(run_dir / "metrics.jsonl")], default=0)
            results[name] = [] if saved and saved.name == f"step-{done:06d}" else [f"{saved} of step {done}"]
            results[name] += self.wrong(run_dir)
        return {name: differs for name, differs in results.items() if differs}


@pytest.fixture(scope="module")
def trials(commands, outcome, tmp_path_factory) -> Trials:
    return Trials(commands, outcome, tmp_path_factory.mktemp("trials"))


@pytest.fixture(scope="module")
def other(commands, outcome, tmp_path_factory) -> Trials:
    return Trials(commands, outcome, tmp_path_factory.mktemp("other"), *SEVERAL_UPDATES)


def test_the_run_that_is_killed_has_everything_to_lose(trials, commands):
    steps = [m for m in trials.whole.outcome["metrics"] if "reward" in m]
    assert [m["step"] for m in steps] == [1, 2, 3]
    assert any(m["dynamic/extra_groups"] > 0 for m in steps)
    assert steps[1]["kl"] > 0 and steps[2]["kl"] == 0  # the reference was replaced after the second step
    assert trials.whole.outcome["trainer"]["curriculum"]
    drawn = sum(commands.settings["prompts_per_step"] + m["dynamic/extra_groups"] for m in steps)
    assert trials.whole.outcome["trainer"]["progress"]["cursor"] > drawn  # the curriculum has passed over some
    names = {name.partition(":")[0] for name in trials.whole.passes}
    for phase in ("sampled", "scored", "rollout-written", "updated", "synced", "recorded"):
        assert trials.whole.passes.count(f"step/{phase}:3") == 1
    assert names > {"run/evaluating", "checkpoint/before-rename", "checkpoint/before-fsync-parent", "file/before-fsync"}


def test_killed_at_every_failpoint_in_turn_it_ends_as_if_nothing_had_happened(trials, tmp_path):
    """One run, and in every attempt to finish it another failpoint."""
    names = first_of_each(trials.whole.passes)
    names.remove("prune/before-remove:1")  # the only pruning is over once it was killed before the rename: see below
    assert len(names) > 20
    for name in names:
        trials.killed(tmp_path / "run", FAILPOINT=name)
    assert trials.wrong(tmp_path / "run") == []


def test_killed_in_the_middle_of_a_phase_it_resumes_bit_for_bit(trials):
    phases = (
        "run/evaluating:2",
        "step/scored:3",
        "step/updated:2",
        "checkpoint/before-rename:3",
        "metrics/after-line:5",
    )
    assert trials.at_passes(phases) == {}


def test_killed_at_random_moments_it_resumes_bit_for_bit(other):
    assert other.at_moments(5, seed=0) == {}


def test_a_finished_run_killed_while_it_replaces_its_final_checkpoint_keeps_one(trials, tmp_path):
    shutil.copytree(trials.folder / "whole", tmp_path / "run")
    trials.killed(tmp_path / "run", FAILPOINT="checkpoint/before-set-aside")
    trials.killed(tmp_path / "run", FAILPOINT="checkpoint/before-rename")
    assert not (tmp_path / "run/checkpoints/final").exists()
    trials.killed(tmp_path / "run", FAILPOINT="checkpoint/before-put-back")
    assert trials.wrong(tmp_path / "run") == []


def test_told_to_leave_it_saves_the_steps_it_has_done_and_resumes_bit_for_bit(trials):
    assert trials.told_to_leave(["run/evaluating:1", "step/sampled:2", "checkpoint/before-rename:4"]) == {}


def test_told_to_leave_before_there_is_anything_to_save_it_just_ends(trials, tmp_path):
    ended = trials.start(tmp_path / "run", FAILPOINT="file/before-rename:2", FAILPOINT_SIGNAL="SIGTERM")
    assert ended.code == -signal.SIGTERM
    assert trials.wrong(tmp_path / "run") == []


# Each and every one.


@pytest.mark.slow
def test_killed_at_every_pass_of_every_failpoint_it_resumes_bit_for_bit(trials):
    assert trials.at_passes(trials.whole.passes) == {}


@pytest.mark.slow
def test_killed_in_every_phase_of_a_step_of_several_updates_it_resumes_bit_for_bit(other):
    assert other.at_passes(name for name in other.whole.passes if name.startswith("step/")) == {}


@pytest.mark.slow
def test_killed_at_thirty_random_moments_it_resumes_bit_for_bit(trials):
    assert trials.at_moments(30, seed=1) == {}


@pytest.mark.slow
def test_killed_at_every_failpoint_of_a_resume_it_ends_the_same(trials, tmp_path):
    trials.killed(tmp_path / "killed", FAILPOINT="checkpoint/before-rename:2")
    shutil.copytree(tmp_path / "killed", tmp_path / "run")
    assert trials.start(tmp_path / "run", FAILPOINT_LOG=str(tmp_path / "log")).code == 0
    results = {}
    for name in first_of_each(passes(tmp_path / "log")):
        run_dir = tmp_path / name.replace("/", "-")
        shutil.copytree(tmp_path / "killed", run_dir)
        trials.killed(run_dir, FAILPOINT=name)
        results[name] = trials.wrong(run_dir)
    assert len(results) > 15 and not any(results.values()), results


@pytest.mark.slow
def test_told_to_leave_in_every_phase_it_saves_and_resumes_bit_for_bit(trials):
    phases = ("step/", "run/", "checkpoint/before-write", "checkpoint/before-rename", "prune/", "metrics/")
    assert trials.told_to_leave([name for name in trials.whole.passes if name.startswith(phases)]) == {}


# Other samplers.


@pytest.mark.slow
def test_killed_while_its_engines_process_samples_it_leaves_none_behind_and_resumes_bit_for_bit(trials, tmp_path):
    """The engine is stopped in the middle of its third call, so that the trainer waits for it when it dies."""
    found: list[int] = []

    def kill_trainer() -> None:
        while not (stopped := [pid for pid in descendants(trials.commands.pid) if state(pid) == "T"]):
            time.sleep(0.05)
        found.extend(stopped)
        os.kill(int(Path(f"/proc/{stopped[0]}/stat").read_text().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)

    thread = threading.Thread(target=kill_trainer, daemon=True)
    thread.start()
    flags = (*trials.flags, "--sampling.process=true")
    ended = trials.commands.grpo(tmp_path / "run", *flags, FAILPOINT="engine/sample:3", FAILPOINT_SIGNAL="SIGSTOP")
    assert ended.code == -signal.SIGKILL, ended.output
    thread.join()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{found[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{found[0]}").exists()
    assert trials.commands.grpo(tmp_path / "run", *flags).code == 0
    whole, resumed = trials.whole.outcome, trials.collect(tmp_path / "run")
    assert [name for name in whole if whole[name] != resumed[name]] == []


def descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    own = [int(child) for child in children.read_text().split()] if children.exists() else []
    return own + [further for child in own for further in descendants(child)]


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM")
def test_killed_under_vllm_it_trains_on_the_rollouts_it_has_and_samples_no_other_step_again(
    tiny_folder, commands, tmp_path
):
    run_dir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "recipes.grpo", "--config", str(commands.folder / "run.yaml"), "--resume"),
        *("--run_dir", str(run_dir), "--model", str(tiny_folder), "--sampling.backend=vllm", "--steps=4"),
        *("--checkpoint.every=2", "--curriculum.reward=null", "--dynamic_sampling.max_rounds=0", "--optim.lr=1e-4"),
    ]
    paths = os.pathsep.join([str(ROOT), str(commands.folder)])
    environment = os.environ | {"PYTHONPATH": paths, "FAILPOINT_LOG": str(tmp_path / "log")}
    # In the fourth step, whose completions are sampled and not yet written; the checkpoint is of the second.
    killed = subprocess.run(command, cwd=ROOT, env=environment | {"FAILPOINT": "step/sampled:4"}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = {path.name: path.read_bytes() for path in (run_dir / "rollouts").glob("*.parquet")}
    assert sorted(before) == [f"step-00000{step}.parquet" for step in (1, 2, 3)]
    resumed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "step 3: its rollout is on disk" in resumed.stdout + resumed.stderr
    for name, content in before.items():
        assert (run_dir / "rollouts" / name).read_bytes() == content
    counts = Counter((tmp_path / "log").read_text().split())
    assert counts["step/sampled"] == 4 + 1 and counts["step/updated"] == 3 + 2
    lines = [m for m in read_metrics(run_dir / "metrics.jsonl") if "reward" in m]
    assert [m["step"] for m in lines] == [m["weights/version"] for m in lines] == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):  # every step was trained on what its own policy had sampled, on it alone, and once
        rows = pq.read_table(run_dir / f"rollouts/step-00000{step}.parquet").to_pylist()
        assert {(row["step"], row["version"]) for row in rows} == {(step, step - 1)} and len(rows) == 6
    assert (run_dir / "checkpoints/final/model.safetensors").exists()
