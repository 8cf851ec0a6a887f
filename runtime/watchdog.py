"""A main process in which nothing moves any more to a line that says where, and a file with every thread's stack.

A daemon thread looks, on the monotonic clock, when the limit would be reached; it works while the main thread hangs in
C. Where that also holds Python's lock (a runaway regular expression), faulthandler's own thread puts the stacks on
stderr instead. Leaves out child processes and other machines: their deadlines are their owners'.
"""

import contextlib
import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

logger = logging.getLogger(__name__)


class Watchdog:
    """Context manager; `phase` and `beat` say that something moved. One at a time in a process.

    folder: gets stacks-1.txt, stacks-2.txt, ... limit_seconds: without movement for so long it reports, and again at
    twice, four times, ... as long; 0 is off. abort_after: seconds without movement at which the process ends with code
    1, for a scheduler to start it again; None is never.
    """

    def __init__(self, folder: str | Path, limit_seconds: float, *, abort_after: float | None = None) -> None:
        if limit_seconds < 0:
            raise ValueError(f"limit_seconds={limit_seconds}: give seconds, or 0 for no watchdog")
        if abort_after is not None and abort_after < limit_seconds:
            raise ValueError(f"abort_after={abort_after}: less than limit_seconds={limit_seconds}; first it reports")
        self.folder = Path(folder)
        self.limit = limit_seconds
        self.abort_after = abort_after
        self._moved = time.monotonic()
        self._where = "between phases"
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.beat()
        if self.limit:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def phase(self, name: str, *, component: str = "") -> Iterator[None]:
        """Name what is going on, and what is at work in it; inside another phase, the inner one counts."""
        outer, self._where = self._where, f"{name} ({component})" if component else name
        self.beat()
        try:
            yield
        finally:
            self._where = outer
            self.beat()

    def beat(self) -> None:
        """Something moved."""
        self._moved = time.monotonic()

    def _watch(self) -> None:
        moved, report_at = self._moved, self.limit
        abort_at = math.inf if self.abort_after is None else self.abort_after
        wait = 0.0
        while not self._done.wait(wait):
            if moved != self._moved:
                if report_at > self.limit:
                    logger.warning("moving again, after %.0f s", self._moved - moved)
                moved, report_at = self._moved, self.limit
            idle = time.monotonic() - moved
            if idle >= min(report_at, abort_at):
                self._report(idle, "; ending the process" if idle >= abort_at else "")
                if idle >= abort_at:
                    os._exit(1)
                while report_at <= idle:
                    report_at *= 2
            wait = max(0.0, min(report_at, abort_at) - idle)
            # Not re-armed in time only if this thread can't run: then it speaks in our place.
            backstop = (wait if self.abort_after is None else abort_at - idle) + self.limit / 2
            faulthandler.dump_traceback_later(backstop, file=2, exit=self.abort_after is not None)

    def _report(self, idle: float, outcome: str) -> None:
        line = f"nothing has moved for {idle:.0f} s: {self._where}{outcome}"
        # The stacks first: what hangs may be the place the log is written to.
        try:
            where = f"every thread's stack is in {self._dump(line)}"
        except OSError as error:
            faulthandler.dump_traceback(2)
            where = f"every thread's stack is above: {error}"
        logger.error("%s; %s", line, where)

    def _dump(self, line: str) -> Path:
        number = 1
        while (path := self.folder / f"stacks-{number}.txt").exists():  # those of earlier attempts
            number += 1
        with path.open("w", encoding="utf-8") as file:
            print(line, file=file, flush=True)
            faulthandler.dump_traceback(file)
        return path
