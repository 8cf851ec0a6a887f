"""The process in the jail that forks one fresh process a test and reports its end.

The supervisor's socket is its standard input. It knows no test and no expected value. The launcher, which entered
the jail, stays outside the new process namespace and waits for its supervisor to end, by whatever thread or
signal, to take the zygote along; the zygote is process 1, so the kernel ends everything below it.
Requests: `{"run": id, "limits": …}` with the file descriptors of a job, standard input, output, error and
frames; `{"kill": id}`. Answers: `{"ended": id, "status": …, "cpu": seconds, "peak": bytes}`.
"""

import fcntl
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
from typing import NoReturn

from rewards.sandbox import guest, jail, linux, seccomp
from rewards.sandbox.limits import Limits

WARM = (
    "array", "bisect", "collections", "copy", "datetime", "decimal", "enum", "fractions", "functools", "hashlib",
    "heapq", "io", "itertools", "math", "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
"""Imported once, here: what programs ask for most."""
MAX_MESSAGE = 1 << 16
FILES_PER_MB = 128
STACK_BYTES = 64 << 20
OPEN_FILES = 256
JAILERS = 3
"""Processes of the same user in the jail: launcher, zygote, and a check beside its candidate."""


def main() -> None:
    """The launcher: enter the jail, start the zygote, wait for either end."""
    control = socket.socket(fileno=os.dup(0))
    os.close(0)
    try:
        with jail.layer("kernel"):
            supervisor = os.pidfd_open(os.getppid())
        if os.getppid() != int(sys.argv[1]):
            return  # it ended before it could be watched
        for name in WARM:
            importlib.import_module(name)
        os.environ.clear()
        os.environ.update(HOME="/tmp", TMPDIR="/tmp", LANG="C.UTF-8")
        direct = jail.enter()
    except jail.JailError as error:
        control.send(json.dumps({"missing": error.layer, "why": error.why}).encode())
        return
    zygote = os.fork()
    if zygote == 0:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.close(supervisor)
        serve(control, direct)
    control.close()
    poll = select.poll()
    for fd in (supervisor, os.pidfd_open(zygote)):
        poll.register(fd, select.POLLIN)
    poll.poll()
    os.kill(zygote, signal.SIGKILL)
    os.waitpid(zygote, 0)


def serve(control: socket.socket, direct: int | None) -> NoReturn:
    """Fork, kill and reap as asked, until the supervisor hangs up."""
    home = os.pidfd_open(os.getpid())
    program = seccomp.build(linux.MACHINE)
    try:
        _rehearse(home, program, direct)
    except jail.JailError as error:
        control.send(json.dumps({"missing": error.layer, "why": error.why}).encode())
        os._exit(1)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rewards"]:
        del sys.modules[name]  # what runs here keeps what it imported; a program finds no such module
    gc.freeze()  # or a child that collects garbage would copy every page
    control.send(json.dumps({"ready": True, "direct": direct is not None}).encode())
    poll = select.poll()
    poll.register(control, select.POLLIN)
    running: dict[int, tuple[int, int]] = {}  # pidfd -> number of the run, process
    while True:
        for fd, _ in poll.poll():
            if fd != control.fileno():
                number, pid = running.pop(fd)
                poll.unregister(fd)
                os.close(fd)
                _, status, usage = os.wait4(pid, 0)
                used = {"cpu": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss << 10}
                control.send(json.dumps({"ended": number, "status": status, **used}).encode())
                continue
            data, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 8)
            if not data:
                os._exit(0)
            request = json.loads(data)
            if "kill" in request:
                for number, pid in running.values():
                    if number == request["kill"]:
                        os.kill(pid, signal.SIGKILL)  # not reaped yet, so the number can't be anyone else's
                continue
            pid = _fork_into_namespace(home)
            if pid == 0:
                control.detach()
                _run(fds, Limits(**request["limits"]), program, direct)
            for received in fds:
                os.close(received)
            watch = os.pidfd_open(pid)
            running[watch] = request["run"], pid
            poll.register(watch, select.POLLIN)


def _fork_into_namespace(home: int) -> int:
    """Fork a process 1 of a new process namespace; `home` is a pidfd of this process, which leads back to its own."""
    linux.setns(home, linux.CLONE_NEWPID)  # from the namespace of the last child, if there was one
    linux.unshare(linux.CLONE_NEWPID)
    return os.fork()


def _rehearse(home: int, program: bytes, direct: int | None) -> None:
    """Confine one process as every test's is. Raises JailError with the layer that this machine refuses."""
    receiving, sending = os.pipe()
    try:
        pid = _fork_into_namespace(home)
    except OSError as error:
        raise jail.JailError("process namespace of a test", str(error)) from error
    if pid == 0:
        try:
            _confine(Limits(), program, direct)
            os._exit(0)
        except jail.JailError as error:
            os.write(sending, json.dumps([error.layer, error.why]).encode())
        finally:
            os._exit(1)
    os.close(sending)
    with open(receiving, "rb") as report:  # noqa: PTH123
        text = report.read()
    if os.waitpid(pid, 0)[1] != 0:
        raise jail.JailError(*(json.loads(text) if text else ("a test's process", "it died before its program")))


def _run(fds: list[int], limits: Limits, program: bytes, direct: int | None) -> NoReturn:
    """In the fresh process: its streams, its walls, then its job."""
    try:
        os.setsid()
        job, *streams = [fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in fds]  # clear of the places they go to
        text = os.pread(job, os.fstat(job).st_size, 0)
        for target, fd in enumerate(streams):
            os.dup2(fd, target)
        os.closerange(len(streams), 1 << 16)
        _confine(limits, program, direct)
        guest.main(json.loads(text))
    finally:
        os._exit(1)


def _confine(limits: Limits, program: bytes, direct: int | None) -> None:
    """Fresh files, limits, no rights, filtered system calls: for good. Raises JailError with the layer that failed."""
    with jail.layer("files of a test"):
        linux.unshare(linux.CLONE_NEWNS)
        flags = linux.MS_NOSUID | linux.MS_NODEV
        inodes = FILES_PER_MB * limits.tmp_mb
        linux.mount("tmp", "/tmp", "tmpfs", flags, f"size={limits.tmp_mb}m,nr_inodes={inodes},mode=1777")
        os.chdir("/tmp")
    with jail.layer("resource limits"):
        for kind, value in (
            (resource.RLIMIT_AS, limits.memory_mb << 20),
            (resource.RLIMIT_CPU, limits.cpu_seconds),
            (resource.RLIMIT_NPROC, limits.processes + JAILERS),
            (resource.RLIMIT_FSIZE, limits.tmp_mb << 20),
            (resource.RLIMIT_NOFILE, OPEN_FILES),
            (resource.RLIMIT_STACK, STACK_BYTES),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_SIGPENDING, OPEN_FILES),
        ):
            allowed = resource.getrlimit(kind)[1]
            value = value if allowed == resource.RLIM_INFINITY else min(value, allowed)
            resource.setrlimit(kind, (value, value))
    with jail.layer("capabilities"):
        if direct is not None:
            jail.become(direct)
        linux.drop_capabilities()
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    with jail.layer("seccomp"):
        linux.install_filter(program)
