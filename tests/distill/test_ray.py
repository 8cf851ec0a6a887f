"""Two teachers and two graders of a local Ray: the shards are those of one process, also when one is killed."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from distill.config import DistillConfig, RayConfig
from distill.generate import generate
from distill.ledger import Ledger
from runtime.errors import UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray"),
]


@pytest.fixture(scope="module")
def whole(config: DistillConfig, shards: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process makes of it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert generate(dataclasses.replace(config, run_dir=str(run_dir))).exit_code == 0
    return shards(run_dir)  # type: ignore[no-any-return]


def test_two_workers_make_the_same_shards(config: DistillConfig, whole: Any, shards: Any, tmp_path: Path) -> None:
    spread = dataclasses.replace(config, run_dir=str(tmp_path / "run"), ray=RayConfig(workers=2))
    assert generate(spread).exit_code == 0
    assert shards(tmp_path / "run") == whole


def own_actors(name: str) -> list[int]:
    """Processes below this one that are busy with an actor's method."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [
        (int(pid), int(parent), args) for pid, parent, args in (line.split(None, 2) for line in listed.splitlines())
    ]
    parents = {pid: parent for pid, parent, _ in rows}

    def is_own(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and is_own(parents[pid]))

    return [pid for pid, _, args in rows if f"ray::{name}" in args and is_own(pid)]


def test_a_worker_that_is_killed_loses_nothing(config: DistillConfig, whole: Any, shards: Any, tmp_path: Path) -> None:
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.is_set() and not killed:
            for pid in own_actors("RayTeacher.answer")[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    spread = dataclasses.replace(config, run_dir=str(tmp_path / "run"), ray=RayConfig(workers=2))
    try:
        assert generate(spread).exit_code == 0
    finally:
        ended.set()
        thread.join()
    assert killed and shards(tmp_path / "run") == whole
    with Ledger(tmp_path / "run/ledger.sqlite", read_only=True) as ledger:
        assert len(ledger.samples(range(10))) == 33


def test_told_to_leave_it_commits_what_is_under_way(
    config: DistillConfig, whole: Any, shards: Any, tmp_path: Path
) -> None:
    def leave() -> None:
        while not own_actors("RayTeacher.answer"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    spread = dataclasses.replace(config, run_dir=str(tmp_path / "run"), ray=RayConfig(workers=1), resume=True)
    thread = threading.Thread(target=leave)
    thread.start()
    result = generate(spread)
    thread.join()
    assert result.exit_code == 128 + signal.SIGTERM and 0 < result.left < 10
    assert generate(dataclasses.replace(spread, ray=None)).exit_code == 0
    assert shards(tmp_path / "run") == whole


def test_without_ray_it_says_what_to_install(
    config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[ray\]'"):
        generate(dataclasses.replace(config, run_dir=str(tmp_path / "run"), ray=RayConfig()))
