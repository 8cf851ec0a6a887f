"""The local sandbox: what a program sees and may use, what it leaves behind, and who survives whom."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from rewards.sandbox import seccomp
from rewards.sandbox.backend import Finished, SandboxFault, SandboxUnavailable
from rewards.sandbox.limits import Limits
from rewards.sandbox.local import Sandbox, default_sandbox
from rewards.sandbox.supervisor import Jail, Session
from rewards.sandbox.watch import children

LIMITS = Limits(cpu_seconds=2, wall_seconds=20.0, memory_mb=256, processes=16, tmp_mb=4)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail needs Linux")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(1) as one:
        yield one


def out(sandbox: Sandbox, program: str, stdin: str = "", **limits: float) -> str:
    finished = sandbox.run(program, stdin, replace(LIMITS, **limits))  # type: ignore[arg-type]
    assert finished.status == "ok", finished
    return finished.stdout.decode()


def test_a_program_sees_a_minimal_read_only_machine(sandbox: Sandbox) -> None:
    seen = json.loads(
        out(
            sandbox,
            """
import json, os
writable = []
for path, folders, files in os.walk("/"):
    folders[:] = [name for name in folders if os.path.join(path, name) != "/tmp"]
    try:
        open(os.path.join(path, "new"), "w")
        writable.append(path)
    except OSError:
        pass
print(json.dumps(dict(
    writable=writable, dev=sorted(os.listdir("/dev")), tmp=os.listdir("/tmp"), etc=os.path.exists("/etc"),
    proc=os.path.exists("/proc"), pid=os.getpid(), parent=os.getppid(), groups=os.getgroups(), uid=os.getuid(),
    environment=sorted(os.environ), host=os.uname().nodename, cwd=os.getcwd(), session=os.getsid(0))))
""",
        )
    )
    assert seen["writable"] == []
    assert seen["dev"] == ["full", "null", "random", "shm", "urandom", "zero"]
    assert (seen["etc"], seen["proc"], seen["tmp"], seen["cwd"]) == (False, False, [], "/tmp")
    assert (seen["pid"], seen["parent"], seen["session"]) == (1, 0, 1)
    assert seen["uid"] != 0 and 0 not in seen["groups"]
    assert seen["environment"] == ["HOME", "LANG", "TMPDIR"]


def test_a_program_has_no_capability_and_can_gain_none(sandbox: Sandbox) -> None:
    program = """
import ctypes
libc = ctypes.CDLL(None)
header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(header, sets) == 0
print(list(sets), [c for c in range(41) if libc.prctl(23, c) != 0], libc.prctl(39, 0, 0, 0, 0))
"""
    assert out(sandbox, program) == "[0, 0, 0, 0, 0, 0] [] 1\n"


def test_every_refused_system_call_is_refused(sandbox: Sandbox) -> None:
    column = list(seccomp.AUDIT_ARCH).index(os.uname().machine)
    numbers = {name: pair[column] for name, pair in seccomp.DENIED.items() if pair[column] is not None}
    program = """
import ctypes, json
libc = ctypes.CDLL(None, use_errno=True)
allowed = []
for name, number in json.loads(input()).items():
    if libc.syscall(number, -1, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        allowed.append(name)
newer = libc.syscall(463, 0, 0) == -1 and ctypes.get_errno() == 38
print(allowed, newer, libc.syscall(435, 0, 0) == -1 and ctypes.get_errno() == 38)
"""
    assert out(sandbox, program, json.dumps(numbers) + "\n") == "[] True True\n"


def test_refused_arguments_are_refused(sandbox: Sandbox) -> None:
    program = """
import errno, fcntl, socket
def refused(work):
    try:
        work()
        return False
    except PermissionError:
        return True
file = open("/tmp/x", "w")
left, right = socket.socketpair()
print(refused(lambda: socket.socket(socket.AF_INET)), refused(lambda: socket.socket(40)),
      refused(lambda: fcntl.ioctl(file, 0x5412, b"x")), refused(lambda: fcntl.lockf(file, fcntl.LOCK_EX)),
      refused(lambda: fcntl.flock(file, fcntl.LOCK_EX)), refused(lambda: fcntl.fcntl(file, fcntl.F_GETFD)))
"""
    assert out(sandbox, program) == "True True True True True False\n"


def test_ordinary_programs_run(sandbox: Sandbox) -> None:
    program = """
import bz2, curses, hashlib, lzma, ssl, uuid, zlib
import atexit, dataclasses, multiprocessing, random, sqlite3, subprocess, sys, tempfile, threading, typing
atexit.register(print, "end")
@dataclasses.dataclass
class Point:
    x: int
print(typing.get_type_hints(Point), Point(1), sys.argv, __name__)
threading.Thread(target=lambda: (threading.Event().wait(0.3), print("thread"))).start()
with multiprocessing.Pool(2) as pool:
    print(pool.map(abs, [-1, -2]))
with tempfile.TemporaryFile() as file:
    file.write(b"x")
print(sqlite3.connect(":memory:").execute("select 1 + 1").fetchone())
sys.setrecursionlimit(10**5)
def depth(n):
    return n and 1 + depth(n - 1)
print(depth(20000), sys.stdin.read())
"""
    printed = out(sandbox, program, "ünï\n", memory_mb=1024)
    assert "[1, 2]\n" in printed and printed.endswith("20000 ünï\n\nthread\nend\n")


def test_a_program_runs_the_same_every_time() -> None:
    program = "import random; print(random.random(), hash('x'), set('abcdef'))"
    printed = []
    for _ in range(2):
        with Sandbox(1) as sandbox:
            printed += [out(sandbox, program), out(sandbox, program)]
    assert len(set(printed)) == 1


@pytest.mark.parametrize(
    ("program", "status"),
    [
        ("import mmap; mmap.mmap(-1, 1 << 29)", "runtime-error"),  # address space
        ("import time\nwhile time.monotonic(): pass", "time-limit"),  # processor time, well before the wall clock
        ("open('/tmp/a', 'wb').write(b'x' * (5 << 20))", "runtime-error"),
        ("for i in range(20): open(f'/tmp/{i}', 'wb').write(b'x' * (1 << 20))", "runtime-error"),
        ("for i in range(600): open(f'/tmp/{i}', 'wb').close()", "runtime-error"),
        ("files = [open('/dev/null') for _ in range(300)]", "runtime-error"),
        ("import os\nwhile os.fork(): pass\nimport time; time.sleep(9)", "runtime-error"),
        ("import ctypes; ctypes.string_at(0)", "runtime-error"),
        ("import os; os.abort()", "runtime-error"),
    ],
)
def test_each_limit_alone(sandbox: Sandbox, program: str, status: str) -> None:
    began = time.monotonic()
    assert sandbox.run(program, "", replace(LIMITS, cpu_seconds=1, wall_seconds=60.0)).status == status
    assert time.monotonic() - began < 30


def test_processes_are_counted_with_threads(sandbox: Sandbox) -> None:
    program = """
import os, time
count = 1
try:
    while count < 100:
        if os.fork() == 0:
            time.sleep(100)
        count += 1
except BlockingIOError:
    print(count)
"""
    assert LIMITS.processes <= int(out(sandbox, program)) <= LIMITS.processes + 3


def test_a_program_can_not_kill_itself_out_of_a_verdict(sandbox: Sandbox) -> None:
    """A signal 9 that the jail didn't send is still the program's end, not a fault without a score."""
    for program in (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 1))\nwhile True: pass",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL); os.kill(1, 9); os.killpg(0, 9); 1 / 0",
        "import os; os._exit(96)",
    ):
        assert sandbox.run(program, "", LIMITS).status in ("runtime-error", "time-limit")


def test_nothing_passes_from_one_program_to_the_next(sandbox: Sandbox) -> None:
    out(sandbox, "import sys, random; open('/tmp/x', 'w').write('x'); sys.modules['json'] = None; random.seed(7)")
    assert out(sandbox, "import os, json; print(os.listdir('/tmp'), os.listdir('/dev/shm'))") == "[] []\n"
    assert sandbox.processes() == []


def test_hostile_text_is_cleaned_for_logs(sandbox: Sandbox) -> None:
    finished = sandbox.run("import sys; sys.stderr.write('\\x1b[2J\\x07\\u202e ok'); sys.exit(1)", "", LIMITS)
    assert finished.detail == "\\x1b[2J\\x07\\u202e ok"


def test_large_streams_both_ways(sandbox: Sandbox) -> None:
    text = "x" * 3_000_000
    assert out(sandbox, "import sys; sys.stdout.write(sys.stdin.read())", text) == text
    finished = sandbox.call("print('y' * 10**6)\ndef f(x): return x", "f", [text], {}, LIMITS)
    assert finished == Finished(status="ok", value=text)


def test_threads_share_a_sandbox() -> None:
    with Sandbox(2) as sandbox, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: out(sandbox, "print(int(input()) + 1)", f"{i}\n"), range(60)))
    assert answers == [f"{i + 1}\n" for i in range(60)]


def test_a_killed_jail_is_replaced_and_the_program_is_run_again(sandbox: Sandbox) -> None:
    out(sandbox, "print(1)")
    (jail,) = [jail for jail in sandbox._slots.idle() if jail]
    jail.launcher.kill()
    assert out(sandbox, "print(2)") == "2\n"


def test_a_jail_that_dies_twice_is_a_fault_and_no_verdict(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Session.start

    def dying(self: Session, *arguments: object) -> object:
        program = start(self, *arguments)  # type: ignore[arg-type]
        self.jail.launcher.kill()
        return program

    monkeypatch.setattr(Session, "start", dying)
    with pytest.raises(SandboxFault):
        sandbox.run("import time; time.sleep(3)", "", LIMITS)


def test_a_jail_outlives_the_thread_that_started_it() -> None:
    with Sandbox(1) as sandbox:
        thread = threading.Thread(target=out, args=(sandbox, "print(1)"))
        thread.start()
        thread.join()
        (jail,) = [jail for jail in sandbox._slots.idle() if jail]
        time.sleep(0.1)
        assert jail.launcher.poll() is None


def test_no_installed_package_is_in_reach(sandbox: Sandbox) -> None:
    program = """
import os
for path, folders, _ in os.walk("/"):
    if path.endswith(("/site-packages", "/dist-packages")) and os.listdir(path):
        print(path)
"""
    assert out(sandbox, program) == ""


def test_a_jail_dies_with_its_process() -> None:
    """By SIGKILL, in the middle of a program that has started a daemon, while a fork holds the jail's socket open."""
    script = """
import os, sys
from rewards.sandbox.local import Sandbox
from rewards.sandbox.limits import Limits
sandbox = Sandbox(1)
sandbox.run("print(1)", "", Limits())
jail = sandbox._slots.idle()[0]
print(jail.launcher.pid, jail.zygote, flush=True)
if os.fork() == 0:
    sys.stdin.read()
    os._exit(0)
sandbox.run("import os, time; os.fork() or os.setsid(); time.sleep(100)", "", Limits())
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        launcher, zygote = map(int, process.stdout.readline().split())
        assert within(20, lambda: any(list(children(program)) for program in children(zygote)))
        below = [launcher, zygote, *children(zygote)]
        below += children(below[-1])
        process.kill()
        assert within(20, lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held


def test_a_fork_gets_a_sandbox_of_its_own() -> None:
    ours = default_sandbox()
    assert default_sandbox() is ours
    child = os.fork()
    if child == 0:
        try:
            assert default_sandbox() is not ours
            with pytest.raises(SandboxFault, match="forked"):
                ours.run("print(1)", "", LIMITS)
            assert out(default_sandbox(), "print(1)") == "1\n"
            default_sandbox().close()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_closed_sandbox_leaves_no_process() -> None:
    before = set(children(os.getpid()))
    with Sandbox(1) as sandbox:
        out(sandbox, "print(1)")
        assert set(children(os.getpid())) - before
    assert set(children(os.getpid())) - before == set()


def test_missing_isolation_is_refused_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def refuse(self: Jail) -> None:
        starts.append(1)
        raise SandboxUnavailable("seccomp", "not here")

    monkeypatch.setattr(Jail, "__init__", refuse)
    sandbox = Sandbox(1)
    for _ in range(2):
        with pytest.raises(SandboxUnavailable, match="seccomp: not here"):
            sandbox.run("print(1)", "", LIMITS)
    assert starts == [1]
