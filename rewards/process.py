"""Calls and deadlines in, values or a reason out: the parent's side of rewards/worker.py.

Every wait has a monotonic deadline; a child that misses it is killed with its process group and reaped.
Left out: what a failure means for the rows (rl/score.py).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rewards
from rewards.worker import HEADER

MAX_REPLY_BYTES = 1 << 28
"""A longer reply is a broken worker, not an allocation here."""


class WorkerError(Exception):
    """A call got no usable values; the text is the reason. The process was killed if it can't go on."""


class RewardProcess:
    """One killable child for one reward function; started by the first call, and again after a failure.

    Use it from one long-lived thread: on Linux the child dies with the thread that started it. Only
    `interrupt` may come from another one.
    """

    def __init__(self, function: str | Callable[..., Any], *, name: str, start_limit: float = 120.0) -> None:
        """`function` is a name for `rewards.resolve` or a callable; `start_limit` its import time in seconds.

        `name` is for messages. Raises ValueError for a callable that can't be sent to another process.
        """
        self.name = name
        self.start_limit = start_limit
        self._function: str | bytes = function if isinstance(function, str) else _pickle(function)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._loaded_before = False
        self._interrupted = False

    def start(self) -> None:
        """Start the child if there is none and wait until it has its function.

        Raises ValueError if the function can't be loaded there, WorkerError if it could be before.
        """
        if self._process:
            return
        try:
            self._start()
        except WorkerError as error:
            if self._loaded_before or self._interrupted:
                raise
            raise ValueError(f"reward {self.name!r} can't be loaded in its own process: {error}") from None
        self._loaded_before = True

    def _start(self) -> None:
        root = str(Path(rewards.__file__).parents[1])
        inherited = os.environ.get("PYTHONPATH")
        path = root + os.pathsep + inherited if inherited else root
        with self._lock:
            if self._interrupted:
                raise WorkerError("interrupted")
            # A new session: Ctrl-C stays with the parent, and a kill reaches the function's own children.
            # -P: a rewards.py in the current directory must not replace this package.
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "rewards.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,
                bufsize=0,
            )
            for pipe in (self._process.stdin, self._process.stdout):
                os.set_blocking(pipe.fileno(), False)  # type: ignore[union-attr]
        search = [entry or str(Path.cwd()) for entry in sys.path]
        hello = _pickle({"sys_path": search, "function": self._function})
        reply = self._exchange(hello, self.start_limit, "start limit")
        if reply.get("ready") is not True:
            self.kill()
            raise WorkerError(str(reply.get("error")))

    def call(self, arguments: Mapping[str, Any], *, rows: int, step: int, time_limit: float) -> dict[str, Any]:
        """Call the function on `rows` rows; `time_limit` in seconds counts from when the process is ready.

        Returns "values" (a finite float, or text saying why there is none, per row), "metrics", "columns".
        Raises WorkerError with the reason if there are none, ValueError if function or rows can't be sent.
        """
        self.start()
        request = _pickle({"rows": rows, "step": step, "arguments": dict(arguments)})
        reply = self._exchange(request, time_limit, "time limit")
        if "error" in reply:
            raise WorkerError(str(reply["error"]))
        values = reply.get("values")
        if not isinstance(values, list) or len(values) != rows or {type(v) for v in values} - {float, str}:
            self.kill()
            raise WorkerError("worker broke the protocol")
        return reply

    def interrupt(self) -> None:
        """From any thread: end the call in progress and refuse to start the child again. Then call `kill`."""
        with self._lock:
            self._interrupted = True
            if self._process:
                _kill_group(self._process.pid)

    def kill(self) -> int | None:
        """End the child and its process group at once and reap it; its return code, None without a child."""
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return None
            _kill_group(process.pid)  # not reaped yet, so the id can't belong to anyone else
            code = process.wait()
            for pipe in (process.stdin, process.stdout):
                pipe.close()  # type: ignore[union-attr]
            return code

    def _exchange(self, request: bytes, limit: float, what: str) -> dict[str, Any]:
        """Send one frame and read one; on any failure kill the child and raise WorkerError with why."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise WorkerError("interrupted")
        deadline = time.monotonic() + limit
        try:
            _send(process.stdin.fileno(), HEADER.pack(len(request)) + request, deadline)
            (size,) = HEADER.unpack(_receive(process.stdout.fileno(), HEADER.size, deadline))
            if size > MAX_REPLY_BYTES:
                raise ValueError(f"a reply of {size} bytes")
            reply = json.loads(_receive(process.stdout.fileno(), size, deadline))
            if not isinstance(reply, dict):
                raise ValueError("a reply that is not an object")
            return reply
        except TimeoutError:
            self.kill()
            raise WorkerError(f"{what} {limit:g} s") from None
        except (OSError, EOFError):
            # It exited before the pipe closed, so its own return code survives this kill.
            raise WorkerError(_death(self.kill())) from None
        except (ValueError, RecursionError) as error:
            self.kill()
            raise WorkerError(f"worker broke the protocol: {error}") from None


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _pickle(thing: Any) -> bytes:
    import cloudpickle

    try:
        return cloudpickle.dumps(thing)
    except Exception as error:  # reducers are user code and raise anything
        raise ValueError(f"{str(thing)[:100]} can't be sent to a reward process: {error}") from error


def _death(code: int | None) -> str:
    if code is None:
        return "interrupted"
    if code == -signal.SIGKILL:
        return "worker died (signal 9: out of memory?)"
    return f"worker died (signal {-code})" if code < 0 else f"worker exited (code {code})"


def _send(pipe: int, data: bytes, deadline: float) -> None:
    view = memoryview(data)
    while view:
        _wait(pipe, select.POLLOUT, deadline)
        view = view[os.write(pipe, view[: 1 << 16]) :]


def _receive(pipe: int, size: int, deadline: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        _wait(pipe, select.POLLIN, deadline)
        part = os.read(pipe, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _wait(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
