"""Any sampler -> the same sampler in a child process that can be killed and started again.

A crash or a hang of an engine then costs a call, not the run. Every call has a monotonic deadline; a child that dies
or misses it is killed with its process group and reaped, and `EngineLost` says what happened. After `restart()` the
new child holds no weights: it samples once `sampling.attest.sync` has loaded and proved them.

Weights cross in anonymous memory, CHUNK bytes at a time, not through a pipe or a file with a name: a killed trainer
leaves nothing behind, and a container's small /dev/shm is no limit. CUDA tensors cross as copies on the CPU.
The child's side is sampling/worker.py. Left out: how often to restart, and engines on other machines.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import IO, Any, cast

import torch

from sampling.attest import WeightsMismatch
from sampling.protocol import Completion, Fingerprints, Sampler, SamplingParams, Weights
from sampling.worker import ALIGNMENT, Layout

CHUNK = 1 << 26
"""Bytes of weights handed over at a time, or one tensor if that is larger: the memory a load needs besides."""

CLOSE_LIMIT = 20.0
"""Seconds a child has for leaving by itself, and a killed one for being gone."""


class EngineLost(RuntimeError):
    """A sampler's process is gone; the text says how. `restart` and a sync bring it back."""


class ProcessSampler:
    """A `Sampler` that lets another one work in a child process.

    Use it from one long-lived thread: on Linux the child dies with the thread that started it. Ctrl-C and SIGTERM
    are for the trainer; the child, in a session of its own, works on until the trainer is done with it.
    """

    def __init__(self, make: Callable[[], Sampler], *, time_limit: float = 600.0, start_limit: float = 600.0) -> None:
        """Start the child and wait until it has its sampler.

        make: called in the child; a function or functools.partial that pickles, with all it needs but weights.
        time_limit: seconds a call may take. In `load` that includes reading the weights, here.
        start_limit: seconds for the child's imports and `make`.
        """
        self.time_limit = time_limit
        self.start_limit = start_limit
        self.version = -1
        self.restarts = 0
        """How often `restart` was called."""
        self._make = make
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None
        self._fate = "never started"
        self._start()

    @property
    def pid(self) -> int | None:
        """The child's process id; None without a child."""
        return self._child[0].pid if self._child else None

    def restart(self) -> None:
        """Replace the child, in whatever state, by a new one without weights. EngineLost if that can't be made."""
        self._kill()
        self.restarts += 1
        try:
            self._start()
        except ValueError as error:  # it could be made before, so it's no setting that is wrong
            raise EngineLost(f"the sampler's process can't be started again: {error}") from error

    def load(self, weights: Weights, *, version: int) -> Fingerprints:
        """As the inner sampler does; the fingerprints are what it reports."""
        self.version = -1
        held = self._call("load", {"version": version}, self.time_limit, weights)
        self.version = version
        return cast(Fingerprints, held)

    def sample(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seeds: Sequence[int]
    ) -> list[list[Completion]]:
        """As the inner sampler does."""
        return cast(list[list[Completion]], self._use("sample", prompts=prompts, params=params, seeds=seeds))

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """As the inner sampler does, but only after a load."""
        return cast(list[list[float]], self._use("score", sequences=sequences))

    def close(self) -> None:
        """Let the child free its engine and leave, for CLOSE_LIMIT seconds; then kill it."""
        if self._child:
            process, connection = self._child
            connection.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(CLOSE_LIMIT)
        self._kill()
        self._fate = "was closed"

    def _start(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        with theirs:
            # A fresh interpreter, because torch's threads don't survive a fork; our import path, but without the
            # current directory in front (-P). Popen closes all other files, such as a run folder's lock.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sampling.worker", str(os.getpid()), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=2,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._child = process, ours
        # Trainer and sampler take turns, so both may have all threads.
        recipe = {"make": self._make, "threads": torch.get_num_threads()}
        try:
            self.dtype, has_prefix_cache = self._call("start", recipe, self.start_limit)
        except ValueError:
            self._kill()
            raise
        if has_prefix_cache:  # an attribute only then: attest.PrefixCaching asks whether there is one
            self.cached_prompt_tokens = self._cached_prompt_tokens

    def _cached_prompt_tokens(self, prompt: Sequence[int]) -> int:
        return cast(int, self._use("cached_prompt_tokens", prompt=prompt))

    def _use(self, method: str, **arguments: Any) -> Any:
        if self._child and self.version < 0:  # the child doesn't know that an attestation failed
            raise WeightsMismatch("this sampler holds no attested weights: run sampling.attest.sync first")
        return self._call(method, arguments, self.time_limit)

    def _call(self, method: str, arguments: dict[str, Any], limit: float, weights: Weights = ()) -> Any:
        """The child's result. Raises what its sampler refused the call with, or EngineLost."""
        if self._child is None:
            raise EngineLost(f"the sampler's process {self._fate}; restart it, then sync")
        process, connection = self._child
        began = time.monotonic()
        try:
            with _killed_after(limit, process.pid):
                kind, value = _ask(connection, (method, arguments))
                chunks = _chunks(weights)
                while kind == "more":
                    layout, memory = next(chunks, ([], None))
                    kind, value = _ask(connection, layout, memory)
        except _Severed:
            kind, value = "severed", None
        except BaseException as error:  # Ctrl-C, or weights that can't be read: the child waits for the rest
            self._kill()
            self._fate = f"was ended by {type(error).__name__} in {method}"
            raise
        seconds = time.monotonic() - began
        if seconds < limit and kind == "done":
            return value
        if seconds < limit and kind == "refused":
            raise value
        code = self._kill()
        if seconds >= limit:
            self._fate = f"hung in {method}: killed after {limit:g} s"
        elif kind == "failed":
            self._fate = f"failed in {method} after {seconds:.1f} s: {value}"
        else:
            self._fate = f"died in {method} after {seconds:.1f} s ({_death(code)})"
        raise EngineLost(f"the sampler's process {self._fate}")

    def _kill(self) -> int | None:
        """End the child and its process group at once and reap it; its return code, None without a child."""
        self.version = -1
        if self._child is None:
            return None
        (process, connection), self._child = self._child, None
        if process.returncode is None:  # not reaped yet, so the id can't belong to anyone else
            _kill_group(process.pid)
        connection.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that a driver holds may never go
            process.wait(CLOSE_LIMIT)
        return process.returncode


class _Severed(Exception):
    """The other end of the socket is closed."""


def _ask(connection: Connection, message: Any, memory: IO[bytes] | None = None) -> tuple[str, Any]:
    """Send a message, with a file if there is one, and wait for the answer."""
    try:
        connection.send_bytes(pickle.dumps(message))
        if memory is not None:
            send_handle(connection, memory.fileno(), 0)
        return cast(tuple[str, Any], connection.recv())
    except (OSError, EOFError) as error:
        raise _Severed from error


def _chunks(weights: Weights) -> Iterator[tuple[Layout, IO[bytes]]]:
    """Copy weights into files in memory, the next when the last has been taken."""
    rest = iter(weights)
    while True:
        layout: Layout = []
        with _memory() as memory:
            for name, tensor in rest:
                layout.append((name, tensor.dtype, tuple(tensor.shape)))
                data_N = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
                memory.write(data_N.data)
                memory.write(bytes(-data_N.size % ALIGNMENT))
                if memory.tell() >= CHUNK:
                    break
            memory.flush()
            if not layout:
                return
            yield layout, memory


def _memory() -> IO[bytes]:
    """A file without a name: in memory on Linux, elsewhere on the disk."""
    if sys.platform == "linux":
        return os.fdopen(os.memfd_create("weights"), "w+b")
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def _killed_after(limit: float, leader: int) -> Iterator[None]:
    """Kill a process group if what is inside takes longer. It reaches a read or write that waits for ever, too."""
    timer = threading.Timer(limit, _kill_group, [leader])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # before the process is reaped and its id another's


def _kill_group(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def _death(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "signal 9: out of memory?"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
