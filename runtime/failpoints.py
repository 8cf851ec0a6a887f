"""Named places where a test makes the process die as by `kill -9`; nothing unless FAILPOINT is set."""

import os
import signal
from collections import Counter

_passed: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """SIGKILL this process here when FAILPOINT is `name`, or on the n-th pass when it is `name:n`."""
    wanted = os.environ.get("FAILPOINT")
    if not wanted:
        return
    target, _, nth = wanted.partition(":")
    if target == name:
        _passed[name] += 1
        if _passed[name] == int(nth or 1):
            os.kill(os.getpid(), signal.SIGKILL)
