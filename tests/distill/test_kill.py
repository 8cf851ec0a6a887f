"""Killed, told to leave or out of disk anywhere, and the same command again: the shards are as if nothing had happened.

Real processes and real signals, on a run of under a second. SIGKILL leaves the page cache, so what a power cut would
take is SQLite's matter (synchronous=FULL).
"""

import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from distill.ledger import Ledger
from runtime.errors import EXIT_DISK


def passes(log: Path) -> list[str]:
    """Every pass of a failpoint, as FAILPOINT takes it: name:n."""
    names = log.read_text().split()
    return [f"{name}:{names[: i + 1].count(name)}" for i, name in enumerate(names)]


class Trials:
    """Kills and resumes of a run, and what it comes to when nothing happens to it."""

    def __init__(self, commands: Any, shards: Any, folder: Path) -> None:
        self.start, self.collect, self.folder = commands.start, shards, folder
        ended = self.start(folder / "whole", FAILPOINT_LOG=str(folder / "passes"))
        assert ended.code == 0, ended.output
        self.whole, self.seconds, self.passes = shards(folder / "whole"), ended.seconds, passes(folder / "passes")

    def killed(self, run_dir: Path, **options: Any) -> None:
        """Start or resume it, and see it die by SIGKILL."""
        ended = self.start(run_dir, **options)
        assert ended.code == -signal.SIGKILL, (options, ended.output)

    def wrong(self, run_dir: Path) -> list[str]:
        """Resume to the end; what then differs from the uninterrupted run."""
        ended = self.start(run_dir)
        if ended.code:
            return [ended.output]
        found = self.collect(run_dir)
        shutil.rmtree(run_dir)
        return [name for name in sorted(found.keys() | self.whole.keys()) if found.get(name) != self.whole.get(name)]

    def at_passes(self, passes: Iterable[str]) -> dict[str, list[str]]:
        """What differs after a kill at each of them."""
        results: dict[str, list[str]] = {}
        for name in passes:
            run_dir = self.folder / name.replace("/", "-")
            self.killed(run_dir, FAILPOINT=name)
            results[name] = self.wrong(run_dir)
        return {name: differs for name, differs in results.items() if differs}


@pytest.fixture(scope="module")
def trials(commands, shards, tmp_path_factory) -> Trials:
    return Trials(commands, shards, tmp_path_factory.mktemp("trials"))


def test_the_run_that_is_killed_has_everything_to_lose(trials):
    assert {"data-00000.parquet", "data-00001.parquet", "problems.jsonl", "manifest.json"} < trials.whole.keys()
    assert trials.whole["leftovers"] == b""
    for name in (
        "distill/after-begin:1",
        "distill/after-samples:5",
        "distill/before-choices:4",
        "distill/before-shard:2",
    ):
        assert name in trials.passes


def test_killed_at_every_failpoint_in_turn_it_ends_as_if_nothing_had_happened(trials, tmp_path):
    """One run, and in every attempt to finish it another failpoint."""
    # Before the ledger begins only the folder is made, each file of which is written once.
    names = [name for name in trials.passes if name.endswith(":1") and not name.startswith("file/")]
    assert len(names) > 12
    for name in names:
        trials.killed(tmp_path / "run", FAILPOINT=name)
    assert trials.wrong(tmp_path / "run") == []


def test_told_to_leave_it_saves_the_batch_and_the_rest_follows(trials, tmp_path):
    for name in ("distill/before-samples:2", "distill/before-findings:1"):
        ended = trials.start(tmp_path / "run", FAILPOINT=name, FAILPOINT_SIGNAL="SIGTERM")
        assert ended.code == 128 + signal.SIGTERM, ended.output
        assert "SIGTERM: saving" in ended.output and "problems to go" in ended.output
        assert not (tmp_path / "run/shards").exists()
        before = samples(tmp_path / "run")
        assert before
    ended = trials.start(tmp_path / "run", FAILPOINT_LOG=str(tmp_path / "log"))
    assert ended.code == 0 and {**samples(tmp_path / "run"), **before} == samples(tmp_path / "run")
    assert trials.collect(tmp_path / "run") == trials.whole


def test_what_is_committed_is_never_made_again(trials, tmp_path):
    """The passes of all attempts together are those of one run."""
    log = tmp_path / "log"
    for name in ("distill/after-samples:1", "distill/after-findings:1", "distill/after-choices:1"):
        trials.killed(tmp_path / "run", FAILPOINT=name, FAILPOINT_LOG=str(log))
    assert trials.start(tmp_path / "run", FAILPOINT_LOG=str(log)).code == 0
    commits = ("samples", "findings", "choices")
    counts = Counter(log.read_text().split())
    once = Counter(name.rpartition(":")[0] for name in trials.passes)
    assert [counts[f"distill/after-{c}"] for c in commits] == [once[f"distill/after-{c}"] for c in commits]


def test_a_finished_run_is_only_exported_again(trials, tmp_path):
    shutil.copytree(trials.folder / "whole", tmp_path / "run")
    ended = trials.start(tmp_path / "run", FAILPOINT_LOG=str(tmp_path / "log"))
    assert ended.code == 0 and "distill/after-samples:1" not in passes(tmp_path / "log")
    assert trials.collect(tmp_path / "run") == trials.whole


@pytest.mark.slow
def test_a_full_disk_ends_with_74_and_loses_nothing(small_disk, trials, tmp_path):
    disk, run_dir = small_disk.disk, small_disk.folder / "disk/run"

    def leave(free: int) -> None:
        (disk / "ballast").unlink(missing_ok=True)
        (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - free))

    assert small_disk.start(run_dir, FAILPOINT="distill/after-choices:1").code == -signal.SIGKILL
    before = samples(shutil.copytree(disk / "run", tmp_path / "before"))  # SQLite resolves /proc/PID/root to /
    said, free = "", 4_096
    leave(free)
    while (ended := small_disk.start(run_dir)).code:
        assert ended.code == EXIT_DISK and "Traceback" not in ended.output, ended.output
        assert "No space left on device; free space, then the same command with --resume" in ended.output
        said, free = said + ended.output, free + 12_288
        leave(free)
    assert free > 20_000 and "ledger.sqlite: No space" in said
    after = samples(shutil.copytree(disk / "run", tmp_path / "after"))
    assert before and {**after, **before} == after
    assert trials.collect(disk / "run") == trials.whole


def samples(run_dir: Path) -> dict[Any, Any]:
    """Every answer that is acknowledged."""
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        return ledger.samples([place.position for place in ledger.places()])


@pytest.mark.slow
def test_killed_at_every_pass_of_every_failpoint_it_ends_the_same(trials):
    assert trials.at_passes(trials.passes) == {}


@pytest.mark.slow
def test_killed_at_fifty_random_moments_it_ends_the_same(trials):
    draw = random.Random(0)
    results = {}
    for i in range(50):
        moment = (i + draw.random()) / 50 * trials.seconds
        run_dir = trials.folder / f"{moment}"
        ended = trials.start(run_dir, kill_after=moment)
        assert ended.code in (-signal.SIGKILL, 0), ended.output  # a run may be faster than the first was
        results[moment] = trials.wrong(run_dir)
    assert not any(results.values()), results
