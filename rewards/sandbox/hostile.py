"""The programs of hostile.toml -> for each the verdict it got and what it left behind, which must be nothing.

After each: no process of it lives, its memory and files are gone, the canary file was not read, and the next
honest program scores 1. Left out: the programs themselves.
"""

import contextlib
import os
import secrets
import socket
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rewards.code_tests import grade_code
from rewards.sandbox.limits import Limits
from rewards.sandbox.local import Sandbox

LIMITS = Limits(cpu_seconds=5, wall_seconds=10.0, memory_mb=384, processes=24, tmp_mb=96)
HONEST = "print(2 * int(input()))"
DEFAULT_TESTS = ({"input": "21\n", "output": "42\n"},)
ROOM = 64 << 20
"""Bytes that the machine's shared memory may have grown by meanwhile, by others; less than `tmp_mb`."""
VARIABLE = "REWARDS_CANARY"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """One program and what came of it."""

    number: int
    name: str
    reason: str
    """Its verdict's."""
    problems: Sequence[str]
    """What should not have happened; empty if it was contained."""
    ms: float


def programs() -> list[dict[str, Any]]:
    """The entries of hostile.toml."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["program"]


def run_all(*, threads: int = 2) -> list[Attack]:
    """Run every program, in the file's order, in `threads` jails of their own."""
    with _bait() as bait, contextlib.ExitStack() as stack:
        sandboxes = [stack.enter_context(Sandbox(1)) for _ in range(threads)]
        every = programs()

        def share(part: int) -> list[Attack]:
            return [_attack(entry, sandboxes[part], bait) for entry in every[part::threads]]

        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(share, range(threads)))
    return [parts[i % threads][i // threads] for i in range(len(every))]


@contextlib.contextmanager
def _bait() -> Iterator[dict[str, str]]:
    """What the attacks look for: a secret in a file and in the environment, a port, an abstract socket."""
    secret = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="canary-") as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        Path(folder).chmod(0o755)
        canary = Path(folder) / "canary"
        canary.write_text(secret)
        canary.chmod(0o644)
        abstract.bind(f"\0{secret}-socket")
        abstract.listen()
        os.environ[VARIABLE] = secret
        try:
            port = str(server.getsockname()[1])
            yield {"canary": str(canary), "secret": secret, "port": port, "socket": f"{secret}-socket"}
        finally:
            del os.environ[VARIABLE]


def _attack(entry: Mapping[str, Any], sandbox: Sandbox, bait: Mapping[str, str]) -> Attack:
    canary, held = Path(bait["canary"]), _shared_memory()
    os.utime(canary, ns=(0, time.time_ns()))  # the first reading, at least, changes a time of 0 (relatime)
    tests = _filled(entry.get("tests", DEFAULT_TESTS), bait)
    limits = replace(LIMITS, wall_seconds=entry.get("seconds", LIMITS.wall_seconds))
    verdict = grade_code(_fenced(entry["code"]), tests, limits=limits, sandbox=sandbox)
    problems = []
    if verdict.reason not in entry["reasons"]:
        problems.append(f"its verdict is {verdict.reason}, not {' or '.join(entry['reasons'])}")
    if left := sandbox.processes():
        problems.append(f"processes are left: {left}")
    if not _within(2.0, lambda: _shared_memory() < held + ROOM):
        problems.append("memory is still held")
    if canary.stat().st_atime_ns:
        problems.append("the canary was read")
    if (after := grade_code(_fenced(HONEST), DEFAULT_TESTS, sandbox=sandbox)).score != 1.0:
        problems.append(f"the next honest program: {after.reason}")
    return Attack(number=entry["number"], name=entry["name"], reason=verdict.reason, problems=problems, ms=verdict.ms)


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _filled(thing: Any, bait: Mapping[str, str]) -> Any:
    """Put the bait into every text of a test."""
    if isinstance(thing, str):
        for name, value in bait.items():
            thing = thing.replace(f"{{{name}}}", value)
        return thing
    if isinstance(thing, Mapping):
        return {key: _filled(value, bait) for key, value in thing.items()}
    return [_filled(part, bait) for part in thing] if isinstance(thing, list | tuple) else thing


def _shared_memory() -> int:
    """Bytes of all file systems in memory, and memory that processes share, on this machine."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Shmem:"))


def _within(seconds: float, holds: Callable[[], bool]) -> bool:
    """Whether it comes to hold: the kernel frees what a killed process held a moment later."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
