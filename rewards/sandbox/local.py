"""A program -> how it ended, in this machine's jails: one a processor, a fresh process for every program.

A fault of a jail is tried once more in a new one, then raised; it never becomes the program's fault. Left out:
machines elsewhere (remote.py).
"""

import atexit
import json
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from rewards.sandbox.backend import Finished, SandboxFault, SandboxUnavailable, ended_badly, printable, read_answer
from rewards.sandbox.limits import Limits
from rewards.sandbox.supervisor import Jail, Program, Session, Stopped
from rewards.sandbox.values import encode
from rewards.sandbox.watch import children, oom_kills


class Slots:
    """Places for jails, some still empty, handed out in the order in which threads asked."""

    def __init__(self, count: int) -> None:
        self._idle: list[Jail | None] = [None] * count
        self._waiting: deque[Future[Jail | None]] = deque()
        self._lock = threading.Lock()

    def take(self) -> Jail | None:
        """The jail used last, or None for a place without one; waits until there is a place."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
            ticket: Future[Jail | None] = Future()
            self._waiting.append(ticket)
        try:
            return ticket.result()
        except BaseException:  # an interrupt: the place goes to whoever is next
            if not ticket.cancel():
                self.give(ticket.result())
            raise

    def give(self, jail: Jail | None) -> None:
        """Hand a place back."""
        with self._lock:
            while self._waiting:
                ticket = self._waiting.popleft()
                if ticket.set_running_or_notify_cancel():
                    ticket.set_result(jail)
                    return
            self._idle.append(jail)

    def idle(self) -> list[Jail | None]:
        return list(self._idle)


class Sandbox:
    """This machine's jails. Safe to use from any number of threads; not in a fork of the process that made it."""

    def __init__(self, jails: int | None = None) -> None:
        """`jails` run at once, by default one a processor; each starts with the first program it gets."""
        self.jails = jails or len(os.sched_getaffinity(0))
        self._owner = os.getpid()
        self._slots = Slots(self.jails)
        self._unavailable: SandboxUnavailable | None = None

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the jails, those in use as soon as their program has ended. A later program starts new ones."""
        if self._owner != os.getpid():
            return
        for jail in [self._slots.take() for _ in range(self.jails)]:
            if jail:
                jail.stop()
            self._slots.give(None)

    def processes(self) -> list[int]:
        """Programs, and what they started, that live in the jails which are idle now: there should be none."""
        return [process for jail in self._slots.idle() if jail for process in children(jail.zygote)]

    def run(self, program: str, stdin: str, limits: Limits) -> Finished:
        def work(session: Session) -> Finished:
            process = session.start({"kind": "run", "program": program}, stdin.encode("utf-8", "surrogateescape"))
            session.finish(process)
            return _ending(session, process, limits, "ok")

        return self._in_a_jail(work, limits)

    def call(
        self, program: str, function: str, args: Sequence[Any], kwargs: Mapping[str, Any], limits: Limits
    ) -> Finished:
        request = {"call": function, "arguments": encode(list(args)), "keywords": encode(dict(kwargs))}

        def work(session: Session) -> Finished:
            process = session.start({"kind": "serve", "program": program})
            return _load(session, process, limits) or _ask(session, process, json.dumps(request).encode(), limits)

        return self._in_a_jail(work, limits)

    def check(self, program: str, test: str, names: Sequence[str], entry_point: str | None, limits: Limits) -> Finished:
        job = {"kind": "check", "program": test, "names": list(names), "entry_point": entry_point}

        def work(session: Session) -> Finished:
            candidate = session.start({"kind": "serve", "program": program})
            return _load(session, candidate, limits) or _relay(session, candidate, session.start(job), limits)

        return self._in_a_jail(work, limits)

    def _in_a_jail(self, work: Callable[[Session], Finished], limits: Limits) -> Finished:
        if self._owner != os.getpid():
            raise SandboxFault("this Sandbox belongs to the process that this one was forked from: make a new one")
        try:
            return self._once(work, limits)
        except SandboxUnavailable:
            raise
        except SandboxFault:
            return self._once(work, limits)

    def _once(self, work: Callable[[Session], Finished], limits: Limits) -> Finished:
        jail = self._slots.take()
        try:
            if self._unavailable:
                raise self._unavailable
            jail = jail or Jail()
            with Session(jail, limits) as session:
                try:
                    return work(session)
                except Stopped as stopped:
                    return Finished(status=str(stopped))
        except SandboxFault as fault:
            if isinstance(fault, SandboxUnavailable):
                self._unavailable = fault
            if jail:
                jail.stop()
                jail = None
            raise
        finally:
            self._slots.give(jail)


def _load(session: Session, candidate: Program, limits: Limits) -> Finished | None:
    """Wait until a program's functions are there; how it ended, if they never will be."""
    return None if session.frame(candidate) is not None else _ending(session, candidate, limits, "no-result")


def _ask(session: Session, candidate: Program, request: bytes, limits: Limits) -> Finished:
    """One call, and its result or what became of it."""
    session.send(candidate, request)
    if (frame := session.frame(candidate)) is None:
        return _ending(session, candidate, limits, "no-result")
    return read_answer(frame)


def _relay(session: Session, candidate: Program, test: Program, limits: Limits) -> Finished:
    """Carry calls from test code to the candidate and values back, until the test says how it went."""
    while (frame := session.frame(test)) is not None:
        message = json.loads(frame)
        if "call" not in message:
            return _checked(message, _tail(test))
        answer = _ask(session, candidate, frame, limits)
        if answer.status == "ok":
            session.send(test, json.dumps({"value": answer.value}).encode())
        elif answer.status == "runtime-error" and answer.value:
            session.send(test, json.dumps(dict(zip(("error", "text"), answer.value, strict=True))).encode())
        else:
            return answer
    return Finished(status="bad-check", detail=_tail(test))


def _checked(message: dict[str, Any], detail: str) -> Finished:
    if not message.get("called"):
        return Finished(status="bad-check", detail=detail or "the test never calls the program")
    if "done" in message:
        return Finished(status="ok")
    failed = message.get("failed") == "AssertionError"
    return Finished(status="failed-check" if failed else "runtime-error", detail=detail)


def _ending(session: Session, program: Program, limits: Limits, left: str) -> Finished:
    """How a process ended; `left` is the status of one that simply left."""
    session.finish(program)
    code = os.waitstatus_to_exitcode(program.status or 0)
    if code == 0:
        return Finished(status=left, stdout=bytes(program.stdout), detail=_tail(program))
    if code == -signal.SIGKILL:  # nobody in the jail can send it to a process 1
        if program.cpu >= limits.cpu_seconds / 2:  # on a busy machine the limit's clock is ahead of this one
            return Finished(status="time-limit")
        if oom_kills() > session.jail.oom_kills:
            if program.peak < limits.memory_mb << 19:  # half of what it may have: others used up the machine
                raise SandboxFault("the machine ran out of memory")
            return Finished(status="memory-limit")
    return ended_badly(_tail(program), f"exit code {code}")


def _tail(program: Program) -> str:
    return printable(program.stderr[-2000:].decode("utf-8", "replace").strip())


_default: Sandbox | None = None
_making = threading.Lock()


def default_sandbox() -> Sandbox:
    """The one of this process, made when first asked for; a forked child gets its own."""
    global _default
    with _making:
        if _default is None or _default._owner != os.getpid():
            _default = Sandbox()
            atexit.register(_default.close)
        return _default
