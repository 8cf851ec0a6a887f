"""What is set for a process, or for a while: environment variables, and what the C library does with freed memory."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while: for libraries that read it at every call, and take no argument."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for this process's next use; elsewhere nothing happens.

    By default it goes back to the system whenever a pass ends, and the next pass waits for tens of thousands of page
    faults. The peak stays what it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # glibc's limit
