"""A sampler in a child process: `python -m sampling.worker PARENT_PID FD` makes one and answers its parent's calls.

FD is a socket to a parent that runs the same code, so each side unpickles what the other sends. A call is
`(method, arguments)`; the first is "start", with a picklable function that makes the sampler. An answer is
`(kind, value)`: "done" with the result, "refused" with an exception the caller has earned, or "failed" with the text
of any other, after which this process ends, because nobody knows what state its engine is in.

While it loads, "more" asks for a chunk of weights, and the parent sends names, dtypes and shapes with a file
descriptor of memory that holds the tensors' bytes. The parent's side is sampling/process.py.
"""

import ctypes
import math
import mmap
import os
import pickle
import resource
import signal
import sys
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from typing import Any

import torch

from runtime.errors import UserError
from runtime.failpoints import failpoint
from sampling.attest import DivergedPolicy, PrefixCaching, WeightsMismatch
from sampling.protocol import Sampler, Weights

Layout = list[tuple[str, torch.dtype, tuple[int, ...]]]
"""The tensors of a chunk, in the order of their bytes."""

ALIGNMENT = 64
"""Each tensor's bytes begin at a multiple of this."""

REFUSALS = (ValueError, UserError, DivergedPolicy, WeightsMismatch)
"""What a sampler raises about a request or about weights; it is as good as before."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Answer calls until the parent closes the socket."""
    parent, fd = map(int, sys.argv[1:])
    _die_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crashing engine should not fill the disk with cores
    for signum in (signal.SIGINT, signal.SIGTERM):  # whoever stops a whole job lets its trainer finish the step
        signal.signal(signum, lambda *_: None)
    os.set_inheritable(fd, False)
    _serve(Connection(fd))


def _serve(connection: Connection) -> None:
    sampler: Any = None
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            break
        try:
            if method == "start":
                sampler, value = _start(**arguments)
            elif method == "load":
                value = sampler.load(_arriving(connection), **arguments)
            else:
                value = getattr(sampler, method)(**arguments)
        except (ValueError, WeightsMismatch) as error:
            known = type(error) in REFUSALS  # others might not survive pickling
            _send(connection, "refused", error if known else ValueError(f"{type(error).__name__}: {error}"))
        except Exception as error:
            _send(connection, "failed", f"{type(error).__name__}: {error}")
            raise
        else:
            failpoint(f"engine/{method}")  # the work is done and is lost
            _send(connection, "done", value)
    if sampler is not None:
        sampler.close()


def _start(*, make: Any, threads: int) -> tuple[Sampler, tuple[str, bool]]:
    """The sampler, and what the parent asks about it: its dtype, and whether it has a prefix cache to probe."""
    torch.set_num_threads(threads)
    sampler = make()
    return sampler, (sampler.dtype, isinstance(sampler, PrefixCaching))


def _arriving(connection: Connection) -> Weights:
    """The weights the parent hands over; a chunk's memory lives as long as any of its tensors."""
    while True:
        _send(connection, "more", None)
        layout: Layout = connection.recv()
        if not layout:
            return
        fd = recv_handle(connection)
        memory_N = torch.frombuffer(mmap.mmap(fd, 0), dtype=torch.uint8)
        os.close(fd)
        start = 0
        for name, dtype, shape in layout:
            size = math.prod(shape) * dtype.itemsize
            yield name, memory_N[start : start + size].view(dtype).view(shape)
            start += size + -size % ALIGNMENT


def _send(connection: Connection, kind: str, value: Any) -> None:
    # Not connection.send: torch teaches that to pass tensors as handles to be fetched from a server thread here.
    connection.send_bytes(pickle.dumps((kind, value)))


def _die_with_parent(parent: int) -> None:
    """On Linux, have the kernel kill this process with the thread that started it, even while it hangs.

    Elsewhere the end of the socket stops it, once the call at hand is done.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            sys.exit(1)


if __name__ == "__main__":
    main()
