"""A job in, frames and the end of its process out: the outer side of one jail (zygote.py is the inner one).

Every wait has a deadline; past a limit everything is killed and reaped before an answer is given. What a candidate
sends is bytes until it has been checked. Left out: what jobs mean (local.py).
"""

import contextlib
import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rewards.sandbox.backend import SandboxFault, SandboxUnavailable
from rewards.sandbox.guest import HEADER
from rewards.sandbox.limits import Limits
from rewards.sandbox.watch import anonymous_memory, children, oom_kills

START_LIMIT = 30.0
END_LIMIT = 10.0
"""Seconds for a jail to start, and for the kernel to take down what was killed."""
TICK = 0.05
"""Seconds between two looks at the memory of a jail."""
_CHUNK = 1 << 16
# `rewards` as a bare package: the jail loads its own few modules and not every reward.
_START = (
    "import sys, types; rewards = sys.modules['rewards'] = types.ModuleType('rewards'); "
    "rewards.__path__ = [sys.argv[2]]; from rewards.sandbox.zygote import main; main()"
)


class Stopped(Exception):
    """A program went over a limit; the text is its status."""


class Jail:
    """One launcher and its zygote. Use it from one thread at a time; it dies with this process, not the thread."""

    def __init__(self) -> None:
        """Start it. Raises SandboxUnavailable if the machine lacks a layer, SandboxFault if it failed otherwise."""
        if sys.platform != "linux":
            raise SandboxUnavailable("kernel", f"{sys.platform} is not Linux")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {"PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        package = str(Path(__file__).resolve().parents[1])
        with theirs:
            self.launcher = subprocess.Popen(
                [sys.executable, "-s", "-S", "-P", "-B", "-c", _START, str(os.getpid()), package],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        self.runs = 0
        self.oom_kills = oom_kills()
        try:
            answer = self.receive(time.monotonic() + START_LIMIT)
        except BaseException:
            self.stop()
            raise
        if "missing" in answer:
            self.stop()
            raise SandboxUnavailable(answer["missing"], answer["why"])
        self.direct = bool(answer["direct"])
        self.zygote = next(iter(children(self.launcher.pid)), self.launcher.pid)
        self.idle_memory = anonymous_memory(self.zygote)

    def receive(self, deadline: float) -> dict[str, Any]:
        """The zygote's next answer. Raises SandboxFault if none comes in time, or ever."""
        self.control.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self.control.recv(_CHUNK)
        except OSError as error:
            raise SandboxFault(f"the jail doesn't answer: {error}") from error
        if not data:
            raise SandboxFault("the jail died")
        return json.loads(data)

    def memory(self) -> int:
        """Bytes that the programs in the jail hold, beyond what each has of the zygote's."""
        total, waiting = 0, [*children(self.zygote)]
        while waiting:
            process = waiting.pop()
            waiting += children(process)
            total += max(0, anonymous_memory(process) - self.idle_memory)
        return total

    def stop(self) -> None:
        """End it and everything in it, and reap."""
        self.control.close()
        self.launcher.kill()
        self.launcher.wait()


class Program:
    """One process in a jail, as seen from outside."""

    def __init__(self, number: int, out: int, err: int, frames: socket.socket) -> None:
        self.number = number
        self.frames = frames
        self.streams = {out: bytearray(), err: bytearray(), frames.fileno(): bytearray()}
        self.stdout, self.stderr, self.received = self.streams.values()
        self.outgoing = bytearray()
        self.open = set(self.streams)
        self.status: int | None = None
        self.cpu = 0.0
        self.peak = 0

    def close(self) -> None:
        self.frames.close()
        for fd in list(self.streams)[:2]:
            os.close(fd)

    def next_frame(self) -> bytes | None:
        """The JSON of the next whole frame, if it has come."""
        if len(self.received) < HEADER.size:
            return None
        (size,) = HEADER.unpack_from(self.received)
        if len(self.received) < HEADER.size + size:
            return None
        frame = bytes(self.received[HEADER.size : HEADER.size + size])
        del self.received[: HEADER.size + size]
        return frame


class Session:
    """The processes of one test, and their common limits; a context manager that leaves none of them alive."""

    def __init__(self, jail: Jail, limits: Limits) -> None:
        self.jail, self._limits = jail, limits
        self._deadline = time.monotonic() + START_LIMIT
        self._next_look = time.monotonic() + TICK
        self._programs: list[Program] = []

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill what still runs and wait until the kernel says that it is gone."""
        try:
            deadline = time.monotonic() + END_LIMIT
            for program in self._programs:
                if program.status is None:
                    self.jail.control.send(json.dumps({"kill": program.number}).encode())
            while any(program.status is None for program in self._programs):
                self._ended(self.jail.receive(deadline))
        except OSError as error:
            raise SandboxFault(f"the jail doesn't listen: {error}") from error
        finally:
            for program in self._programs:
                program.close()

    def start(self, job: dict[str, Any], stdin: bytes = b"") -> Program:
        """A fresh process for a job (guest.py)."""
        jail = self.jail
        jail.runs += 1
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        given = [_sealed(json.dumps(job).encode()), _sealed(stdin), out_end, err_end, theirs.detach()]
        program = Program(jail.runs, out, err, ours)
        try:
            request = json.dumps({"run": jail.runs, "limits": asdict(self._limits)}).encode()
            socket.send_fds(jail.control, [request], given)
        except OSError as error:
            program.close()
            raise SandboxFault(f"the jail doesn't listen: {error}") from error
        finally:
            for fd in given:
                os.close(fd)
        self._programs.append(program)
        for fd in (out, err):
            os.set_blocking(fd, False)
        first = len(self._programs) == 1
        try:
            ready = self.frame(program)
        except Stopped as stopped:
            if not first:
                raise
            raise SandboxFault(f"{stopped} before the program began") from stopped
        if ready is None:
            raise SandboxFault("a test's process died before its program began")
        if first:  # from here on, what happens is the program's doing
            self._deadline = time.monotonic() + self._limits.wall_seconds
        return program

    def send(self, program: Program, frame: bytes) -> None:
        """Queue a frame; it leaves while something is waited for."""
        program.outgoing += HEADER.pack(len(frame)) + frame

    def frame(self, program: Program) -> bytes | None:
        """The program's next frame, or None if it ended without one. Raises Stopped over a limit."""
        while (frame := program.next_frame()) is None and program.status is None:
            self._pump()
        return frame if frame is not None else program.next_frame()

    def finish(self, program: Program) -> None:
        """Wait until it has ended; its streams are complete then. Raises Stopped over a limit."""
        while program.status is None:
            self._pump()

    def _pump(self) -> None:
        """Move what can be moved, for at most one tick."""
        now = time.monotonic()
        if now > self._deadline:
            raise Stopped("time-limit")
        if now > self._next_look:
            self._next_look = now + TICK
            if self.jail.memory() > self._limits.memory_mb << 20:
                raise Stopped("memory-limit")
        poll = select.poll()
        poll.register(self.jail.control, select.POLLIN)
        owners = {}
        for program in self._programs:
            for fd in program.open:
                writes = program.outgoing and fd == program.frames.fileno()
                poll.register(fd, select.POLLIN | (select.POLLOUT if writes else 0))
                owners[fd] = program
        for fd, event in poll.poll(1000 * max(0.0, min(self._deadline, self._next_look) - now) + 1):
            if fd not in owners:
                self._ended(self.jail.receive(self._deadline))
                continue
            if event & select.POLLOUT:
                self._write(owners[fd])
            if event & ~select.POLLOUT:
                self._read(owners[fd], fd)

    def _read(self, program: Program, fd: int) -> None:
        """Take all that there is of one stream."""
        stream = program.streams[fd]
        while fd in program.open:
            try:
                part = os.read(fd, _CHUNK)
            except BlockingIOError:
                return
            except ConnectionError:
                part = b""
            stream += part
            if not part:
                program.open.discard(fd)
            if len(stream) > self._limits.output_bytes:
                raise Stopped("output-limit")

    def _write(self, program: Program) -> None:
        try:
            sent = program.frames.send(program.outgoing[:_CHUNK])
        except BlockingIOError:
            return
        except OSError:  # it closed its end: it will never hear the rest
            sent = len(program.outgoing)
        del program.outgoing[:sent]

    def _ended(self, answer: dict[str, Any]) -> None:
        for program in self._programs:
            if program.number == answer.get("ended"):
                for fd in list(program.open):
                    with contextlib.suppress(Stopped):
                        self._read(program, fd)
                program.status, program.cpu, program.peak = answer["status"], answer["cpu"], answer["peak"]


def _sealed(data: bytes) -> int:
    """A file in memory that holds `data` and can't be changed any more."""
    fd = os.memfd_create("given", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd
