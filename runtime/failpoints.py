"""Named places where a test makes the process die, or lists what it passed; nothing unless a variable is set.

FAILPOINT=`name` or `name:n` dies at the first or the n-th pass, as by `kill -9`; FAILPOINT_SIGNAL=SIGTERM sends that
signal instead. FAILPOINT_LOG=path appends the name of every pass, so that a test can try each without a list.
"""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """Pass `name`: log it, and get the signal here if this is the pass that FAILPOINT asks for."""
    if log := os.environ.get("FAILPOINT_LOG"):
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.write(fd, f"{name}\n".encode())
        os.close(fd)
    if not (wanted := os.environ.get("FAILPOINT")):
        return
    target, _, nth = wanted.partition(":")
    if target == name:
        _passed[name] += 1
        if _passed[name] == int(nth or 1):
            os.kill(os.getpid(), signal.Signals[os.environ.get("FAILPOINT_SIGNAL", "SIGKILL")])
