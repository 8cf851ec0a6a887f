"""Two trees in, whether sympy proves them equal out: the parent's side of rewards/maths/symbolic_worker.py.

Sympy runs only in child processes with limits of memory and of their own CPU time, so that no verdict depends on what
else the machine does. One that reaches a limit, or hangs, is reaped and replaced, so a call always returns; it blocks,
from any thread, and a forked child gets workers of its own. Left out: what undecided means for a verdict, numeric
points, caching (rewards/maths/grade.py).
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rewards.maths.tree import Constant, Function, Node, Number, Power, Product, Sum, Variable, to_json

START_LIMIT = 60.0
"""Seconds a worker may take to import sympy (0.5 s on an idle machine); they don't count in a call's time."""

QUEUE_LIMIT = 60.0
"""Seconds a call waits for a worker while all are busy; not counted either."""

HANG_LIMIT = 60.0
"""Seconds by the clock after which a worker that hasn't answered is given up: it gets no CPU, or is stopped."""

CALLS_PER_WORKER = 2000
"""A worker is replaced after this many, so that what sympy keeps can't grow without end."""

MAX_WORKERS = 32
COMMAND = (sys.executable, "-P", str(Path(__file__).with_name("symbolic_worker.py")))
_VALUES = {"pi", "e", "i", "infinity"}


@dataclass(frozen=True)
class Decision:
    """What sympy found."""

    equal: bool | None
    """None where it could not tell."""
    reason: str
    """Equal: `exact` (no variables), `real` (for all real values), `positive` (only shown for positive variables:
    sqrt(1/n) = 1/sqrt(n)). Not equal: `nonzero`. None: `undecided`, `time-limit`, `memory-limit`, `too-large`,
    `worker-died`; and where it was not asked, or never answered, `busy` and `hung`."""

    @property
    def asked(self) -> bool:
        """Whether it was sympy that could not tell."""
        return self.reason not in ("busy", "hung")


def equal(left: Node, right: Node, *, time_limit: float = 1.0) -> Decision:
    """Whether two values are equal wherever both are defined, decided within `time_limit` seconds of CPU or not at all.

    Raises ValueError for a tree that is no value, RuntimeError where sympy's process can't be started at all.
    """
    if not time_limit > 0:
        raise ValueError(f"time_limit={time_limit}: give a positive number of seconds")
    for side in (left, right):
        _check(side)
    try:
        request = json.dumps([to_json(left), to_json(right), time_limit]).encode() + b"\n"
    except (RecursionError, ValueError):  # depth; integers beyond sys.get_int_max_str_digits
        return Decision(None, "too-large")
    return _pool.ask(request)


def start(workers: int = 1) -> None:
    """Start workers ahead of the first call and wait until they have imported sympy; RuntimeError if they can't."""
    _pool.start(workers)


def close() -> None:
    """End and reap all workers; a later call starts new ones."""
    _pool.close()


def _check(tree: Node) -> None:
    pending = [tree]
    while pending:
        node = pending.pop()
        match node:
            case Number() | Variable():
                pass
            case Constant(name) if name in _VALUES:
                pass
            case Sum(parts) | Product(parts) | Function(_, parts):
                pending += parts
            case Power(base, exponent):
                pending += (base, exponent)
            case _:
                raise ValueError(f"{node!r:.100}: no value; compare its parts")


class _Pool:
    """Idle workers; the last one used is the next one taken, so few run where few are needed."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.workers = [_Worker() for _ in range(min(cores, MAX_WORKERS))]
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in self.workers:
            self._idle.put(worker)

    @contextlib.contextmanager
    def _worker(self) -> Iterator["_Worker"]:
        worker = self._idle.get(timeout=QUEUE_LIMIT)
        try:
            yield worker
        finally:
            self._idle.put(worker)

    def ask(self, request: bytes) -> Decision:
        try:
            with self._worker() as worker:
                return worker.ask(request)
        except queue.Empty:
            return Decision(None, "busy")

    def start(self, count: int) -> None:
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(self._worker()) for _ in range(min(count, len(self.workers)))]
            for worker in workers:
                worker.launch()
            for worker in workers:
                worker.wait()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()


class _Ended(Exception):
    """A child is no more, or has closed its end."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


class _Worker:
    """One child, used by one thread at a time; only `kill` may come from another one."""

    started_once: ClassVar[bool] = False
    """Whether a worker ever got ready here: if so, one that doesn't is bad luck and no broken installation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._wire: socket.socket | None = None
        self._ready = False
        self._calls = 0

    def ask(self, request: bytes) -> Decision:
        """The answer to one request; a child that has none when its time is up is replaced."""
        try:
            self.launch()
            self.wait()
        except RuntimeError:
            if not _Worker.started_once:
                raise
            return Decision(None, "worker-died")
        self._calls += 1
        try:
            equal, reason = json.loads(self._exchange(request, HANG_LIMIT))
        except TimeoutError:
            return Decision(None, "hung")
        except _Ended as ended:
            if ended.code != -signal.SIGPROF:  # its timer, which counts CPU time
                return Decision(None, "worker-died")
            equal, reason = None, "time-limit"
        except OSError:
            return Decision(None, "worker-died")
        if reason == "memory-limit" or self._calls >= CALLS_PER_WORKER:
            self.kill()
        if self._process is None:
            with contextlib.suppress(RuntimeError):  # the next call will say so
                self.launch()  # imports sympy while the caller goes on
        return Decision(equal, reason)

    def launch(self) -> None:
        """Start the child if there is none; `wait` tells when it is ready. RuntimeError if the system refuses."""
        with self._lock:
            if self._process:
                return
            try:
                ours, theirs = socket.socketpair()
                with theirs:
                    # A new session: Ctrl-C stays with the parent. -P: our parser.py must not pose as a library's.
                    # A fixed hash seed: sympy's order of terms, so its time and answer, must not vary.
                    self._process = subprocess.Popen(
                        [*COMMAND, str(os.getpid())],
                        stdin=theirs.fileno(),
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env={**os.environ, "PYTHONHASHSEED": "0"},
                        start_new_session=True,
                    )
            except OSError as error:
                raise RuntimeError(f"sympy's worker can't start: {error}") from error
            self._wire, self._ready, self._calls = ours, False, 0

    def wait(self) -> None:
        """Wait until the child has imported sympy; RuntimeError if it doesn't."""
        if self._ready:
            return
        try:
            self._exchange(b"", START_LIMIT)
        except (OSError, _Ended) as error:
            why = f"not ready in {START_LIMIT:g} s" if isinstance(error, TimeoutError) else str(error)
            raise RuntimeError(
                f"sympy's worker can't start ({why}): see what `{sys.executable} -P -c 'import sympy'` says"
            ) from None
        self._ready = _Worker.started_once = True

    def kill(self) -> int | None:
        """End the child at once and reap it; its return code, None without a child."""
        with self._lock:
            process, self._process = self._process, None
            if process is None or self._wire is None:
                return None
            process.kill()
            code = process.wait()
            self._wire.close()
            return code

    def forget(self) -> None:
        """In a forked child: let go of the parent's worker."""
        if self._process and self._wire:
            self._wire.close()
            self._process.returncode = 0  # or subprocess would wait for a process that isn't our child

    def _exchange(self, request: bytes, limit: float) -> bytes:
        """Send a line and read one. On any failure the child is killed: its reply must not answer the next line."""
        wire, deadline = self._wire, time.monotonic() + limit
        try:
            if wire is None:
                raise _Ended(None)
            wire.settimeout(limit)
            wire.sendall(request)
            reply = b""
            while not reply.endswith(b"\n"):
                wire.settimeout(max(deadline - time.monotonic(), 1e-6))
                part = wire.recv(1 << 16)
                if not part:
                    raise _Ended(self.kill())
                reply += part
            return reply
        except BaseException:
            self.kill()
            raise


_pool = _Pool()
atexit.register(close)


def _after_fork() -> None:
    global _pool
    for worker in _pool.workers:
        worker.forget()
    _pool = _Pool()


os.register_at_fork(after_in_child=_after_fork)
