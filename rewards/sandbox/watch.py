"""What the kernel says of other processes: who started whom, what memory they hold, whom it killed for it.

Left out: acting on it (supervisor.py).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path


def children(process: int) -> Iterator[int]:
    """Processes that any thread of a process started, and orphans that fell to it."""
    with contextlib.suppress(OSError):  # it ended
        for task in Path(f"/proc/{process}/task").iterdir():
            with contextlib.suppress(OSError):
                yield from map(int, (task / "children").read_text().split())


def anonymous_memory(process: int) -> int:
    """Bytes of a process that no file backs, shared memory included."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
        return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))
    return 0


def oom_kills() -> int:
    """How often this machine's kernel has killed for want of memory."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
