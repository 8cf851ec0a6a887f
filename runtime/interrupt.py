"""SIGTERM and Ctrl-C to a flag the training loop polls, so that a run saves before it leaves.

Only the main thread can own signal handlers; elsewhere this does nothing. Processes a run started get
Ctrl-C from the terminal too: that is theirs to handle.
"""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ECHO = 1.0
"""Seconds in which another signal is the same one again: schedulers and launchers both send it to every process."""


class Interrupt:
    """Context manager: `requested` turns True on the first signal; one more than ECHO later acts as without it."""

    def __init__(self) -> None:
        self.signum: int | None = None
        """The signal that came first, if any."""
        self._since = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True: finish the step at hand, save, leave with `exit_code`."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 128 + its number; 0 if none came."""
        return 128 + self.signum if self.signum is not None else 0

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._handle) for s in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            # None: the handler was set outside Python, which cannot put it back.
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._before = {}

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.requested:
            if time.monotonic() - self._since > ECHO:
                self._restore()
                signal.raise_signal(signum)
            return
        self.signum, self._since = signum, time.monotonic()
        # os.write: print() may be interrupted in the middle of itself, and would then raise here.
        name = signal.Signals(signum).name
        os.write(2, f"\n{name}: saving after this step, then leaving; again to stop at once\n".encode())
