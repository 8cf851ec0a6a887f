"""What sympy proves and what it must not, and that no call, however hard, outlives its deadline or its parent."""

import ast
import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest

from rewards.maths import symbolic
from rewards.maths.grade import grade_math
from rewards.maths.symbolic import Decision
from rewards.maths.tree import (
    Collection,
    Constant,
    Function,
    Matrix,
    Node,
    Number,
    PlusMinus,
    Power,
    Product,
    Sum,
    Text,
    Variable,
)

ROOT = Path(__file__).resolve().parents[3]

# Python's notation, read by `tree` below; "left == right"
IDENTITIES = """
sin(x)**2 + cos(x)**2 == 1
sin(2*x) == 2*sin(x)*cos(x)
cos(3*x) == 4*cos(x)**3 - 3*cos(x)
tan(x/2) == sin(x)/(1 + cos(x))
sin(x + y) == sin(x)*cos(y) + cos(x)*sin(y)
sec(x)**2 == 1 + tan(x)**2
sin(x)**4 + cos(x)**4 == 1 - sin(2*x)**2/2
sin(x)*sin(y) == (cos(x - y) - cos(x + y))/2
tan(x + y) == (tan(x) + tan(y))/(1 - tan(x)*tan(y))
csc(x) - sin(x) == cos(x)*cot(x)
sin(pi/12) == (sqrt(6) - sqrt(2))/4
cos(pi/5) == (1 + sqrt(5))/4
cos(pi/7)*cos(2*pi/7)*cos(3*pi/7) == 1/8
tan(pi/8) == sqrt(2) - 1
sin(pi/10) == (sqrt(5) - 1)/4
log(x**2*y) == 2*log(x) + log(y)
log(8)/log(2) == 3
log(x, 10) == log(x)/log(10)
log(6) == log(2) + log(3)
log(sqrt(x)) == log(x)/2
log(16, 8) == 4/3
log(x**2 - 1) - log(x - 1) == log(x + 1)
exp(2*log(x)) == x**2
exp(x + y) == exp(x)*exp(y)
e**(log(5)/2) == sqrt(5)
2**(x + 3) == 8*2**x
4**x == 2**(2*x)
sqrt(3 + 2*sqrt(2)) == 1 + sqrt(2)
sqrt(5 + 2*sqrt(6)) == sqrt(2) + sqrt(3)
sqrt(7 - 4*sqrt(3)) == 2 - sqrt(3)
(2 + sqrt(5))**(1/3) + (2 - sqrt(5))**(1/3) == 1
(7 + 5*sqrt(2))**(1/3) == 1 + sqrt(2)
1/(sqrt(2) + sqrt(3)) == sqrt(3) - sqrt(2)
1/(1 + 2**(1/3)) == (1 - 2**(1/3) + 4**(1/3))/3
sqrt(8) + sqrt(18) == sqrt(50)
(sqrt(6) + sqrt(2))/(sqrt(6) - sqrt(2)) == 2 + sqrt(3)
sqrt(4 + sqrt(15)) + sqrt(4 - sqrt(15)) == sqrt(10)
(-8)**(1/3) == -2
(-27)**(2/3) == 9
sqrt(1/n) == 1/sqrt(n)
sqrt(x*y) == sqrt(x)*sqrt(y)
sqrt(x**2) == abs(x)
(x**3)**(1/3) == x
x/sqrt(x) == sqrt(x)
(x**2 - 1)/(x - 1) == x + 1
(a + b)**3 == a**3 + 3*a**2*b + 3*a*b**2 + b**3
1/x + 1/y == (x + y)/(x*y)
(x**4 - y**4)/(x**2 + y**2) == x**2 - y**2
(a**3 - b**3)/(a - b) == a**2 + a*b + b**2
1/(1 + 1/(1 + 1/x)) == (x + 1)/(2*x + 1)
(sqrt(x + 1) - sqrt(x))*(sqrt(x + 1) + sqrt(x)) == 1
1/(sqrt(x + 1) + sqrt(x)) == sqrt(x + 1) - sqrt(x)
e**(i*pi) == -1
e**(i*x) == cos(x) + i*sin(x)
(x**2 - 49/25)*i/(x - 7/5) == i*(x + 7/5)
(e**(i*x) + e**(-i*x))/2 == cos(x)
(1 + i)**8 == 16
(cos(pi/9) + i*sin(pi/9))**3 == 1/2 + i*sqrt(3)/2
1/(2 + i) == (2 - i)/5
abs(3 + 4*i) == 5
e**(i*pi/6) == sqrt(3)/2 + i/2
arctan(1/2) + arctan(1/3) == pi/4
4*arctan(1/5) - arctan(1/239) == pi/4
arcsin(3/5) + arcsin(4/5) == pi/2
arcsin(x) + arccos(x) == pi/2
sin(arccos(x)) == sqrt(1 - x**2)
cos(2*arctan(x)) == (1 - x**2)/(1 + x**2)
tan(arcsin(x)) == x/sqrt(1 - x**2)
arccos(1/3) == arctan(2*sqrt(2))
cosh(x)**2 - sinh(x)**2 == 1
sinh(2*x) == 2*sinh(x)*cosh(x)
tanh(x) == (exp(2*x) - 1)/(exp(2*x) + 1)
arcsinh(x) == log(x + sqrt(x**2 + 1))
sinh(log(2)) == 3/4
factorial(n + 1)/factorial(n) == n + 1
factorial(n)/factorial(n - 2) == n*(n - 1)
binomial(n, 2) == n*(n - 1)/2
binomial(n, k) == factorial(n)/(factorial(k)*factorial(n - k))
binomial(n, k) + binomial(n, k + 1) == binomial(n + 1, k + 1)
binomial(10, 3) == 120
permutations(n, 2) == n*(n - 1)
sum(k, k, 1, n) == n*(n + 1)/2
sum(k**2, k, 1, n) == n*(n + 1)*(2*n + 1)/6
sum(k**3, k, 1, n) == (n*(n + 1)/2)**2
sum(2**k, k, 0, n) == 2**(n + 1) - 1
sum(r**k, k, 0, n - 1) == (1 - r**n)/(1 - r)
sum(1/2**k, k, 1, infinity) == 1
sum(r**k, k, 0, infinity) == 1/(1 - r)
sum(1/k**2, k, 1, infinity) == pi**2/6
sum(1/(k*(k + 1)), k, 1, n) == n/(n + 1)
sum(binomial(n, k), k, 0, n) == 2**n
sum(k, k, 1, 100) == 5050
product(k, k, 1, n) == factorial(n)
product((k + 1)/k, k, 1, n) == n + 1
gcd(12, 18) == 6
mod(17, 5) == 2
floor(pi) == 3
max(x, y) + min(x, y) == x + y
f(2*x) + 1 == 1 + f(x + x)
sum(f(j), j, 1, n) == sum(f(k), k, 1, n)
""".strip().splitlines()

# different, and seen to be
NEAR_MISSES = """
sin(x)**2 + cos(x)**2 == 1 + 10**(-30)
sin(2*x) == 2*sin(x)
cos(3*x) == 4*cos(x)**3 - 2*cos(x)
tan(x/2) == sin(x)/(1 - cos(x))
sin(x + y) == sin(x)*cos(y) - cos(x)*sin(y)
sin(pi/12) == (sqrt(6) + sqrt(2))/4
cos(pi/7)*cos(2*pi/7)*cos(3*pi/7) == -1/8
log(x + y) == log(x) + log(y)
log(8)/log(2) == 4
log(x**2 + 1) == 2*log(x)
exp(x*y) == exp(x)*exp(y)
sqrt(3 + 2*sqrt(2)) == 1 + sqrt(3)
sqrt(5 + 2*sqrt(6)) == sqrt(2) - sqrt(3)
sqrt(2) + sqrt(3) == sqrt(5)
sqrt(10) == 3162277660168379332/10**18
(-8)**(1/3) == 2
(-8)**(1/3) == 1 + i*sqrt(3)
sqrt(x**2 + y**2) == x + y
(x**2 - 1)/(x - 1) == x - 1
(a + b)**3 == a**3 + b**3
1/x + 1/y == 2/(x + y)
e**(i*pi) == 1
e**(i*x) == cos(x) - i*sin(x)
(1 + i)**8 == -16
arctan(1/2) + arctan(1/3) == 3*pi/4
arctan(1/2) + arctan(1/3) == -3*pi/4
arcsin(x) + arccos(x) == pi
arctan(x) + arctan(y) == arctan((x + y)/(1 - x*y))
arctan((1 + x)/(1 - x)) == arctan(x) + pi/4
cosh(x)**2 + sinh(x)**2 == 1
factorial(n + 1)/factorial(n) == n
binomial(n, k) == binomial(n, k + 1)
sum(k, k, 1, n) == n*(n - 1)/2
sum(2**k, k, 0, n) == 2**n - 1
sum(1/k**2, k, 1, infinity) == pi**2/8
product(k, k, 1, n) == factorial(n + 1)
e**pi == 20 + pi
e**(pi*sqrt(163)) == 640320**3 + 744
1/2**99 == 1/2**98
1/factorial(2004) == 1/factorial(2006)
x == abs(x)
floor(x) == x
i == -i
max(x, y) == x
sqrt(x - 1)*sqrt(x + 1) == sqrt(x**2 + 1)
log(x**2) == 2*log(x) + 1
sqrt(x**2) == x
(x**3)**(1/3) == abs(x)
max(2, pi) == 2
mod(17, 5) == 3
gcd(12, 18) == 12
arcsin(x) == arccos(x)
(1 + 1/n)**n == e
""".strip().splitlines()

# not equal, not finite, or more than sympy can do: never proved either way
UNDECIDED = """
f(x) == g(x)
f(x) == f(2*x)
sum(f(k), k, 1, n) == sum(f(n), k, 1, n)
1/(x - x) == 1/(y - y)
infinity - infinity == 0
factorial(2*n)/(2**n*factorial(n)) == double_factorial(2*n - 1)
sin(10**100) == sin(10**100 + 1)
sum(r**k, k, 0, infinity) == 1/abs(1 - r)
""".strip().splitlines()

PI = "arcsin(3/5) + arcsin(4/5) + pi/2 == 0"
"""Its sine is 0, as that of π."""
TRUE = "sin(x)**2 + cos(x)**2 == 1"
BOMBS = ["factorial(10**8) == 1", "9**9**9**9 == 1", "7**10**8 == 1", "sum(sin(k), k, 1, 10**9) == 2"]
BUSY = "f(a) + (a + b + c + d + g + h + j + k + l + m)**60 == f(b)"
"""Too large to expand, too strange for numbers: Python code and memory, for many seconds."""


def tree(text: str) -> Node:
    return read(ast.parse(text.strip(), mode="eval").body)


def read(node: ast.expr) -> Node:
    minus_one = Number(Fraction(-1))
    match node:
        case ast.Constant(value):
            return Number(Fraction(value))
        case ast.Name(name):
            return Constant(name) if name in ("pi", "e", "i", "infinity") else Variable(name)
        case ast.UnaryOp(ast.USub(), a):
            return Product((minus_one, read(a)))
        case ast.BinOp(a, ast.Add(), b):
            return Sum((read(a), read(b)))
        case ast.BinOp(a, ast.Sub(), b):
            return Sum((read(a), Product((minus_one, read(b)))))
        case ast.BinOp(a, ast.Mult(), b):
            return Product((read(a), read(b)))
        case ast.BinOp(a, ast.Div(), b):
            return Product((read(a), Power(read(b), minus_one)))
        case ast.BinOp(a, ast.Pow(), b):
            return Power(read(a), read(b))
        case ast.Call(ast.Name("sqrt"), [a]):
            return Power(read(a), Number(Fraction(1, 2)))
        case ast.Call(ast.Name(name), arguments):
            return Function(name, tuple(map(read, arguments)))
    raise ValueError(ast.dump(node))


def ask(case: str, time_limit: float = 5.0) -> Decision:
    left, right = case.split("==")
    return symbolic.equal(tree(left), tree(right), time_limit=time_limit)


def pids() -> list[int]:
    return [worker._process.pid for worker in symbolic._pool.workers if worker._process]


def gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process ends in time; a zombie that waits for someone else's `wait` has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.fixture(scope="module", autouse=True)
def no_worker_left() -> Iterator[None]:
    yield
    symbolic.close()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pool of this test's own."""
    monkeypatch.setattr(symbolic, "_pool", symbolic._Pool())
    yield
    symbolic.close()


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A pool of this test's own that has a single worker."""
    monkeypatch.setattr(symbolic, "MAX_WORKERS", 1)
    request.getfixturevalue("fresh")


# --- what is proved


@pytest.mark.parametrize("case", IDENTITIES)
def test_identity_is_proved(case: str) -> None:
    assert ask(case).equal is True


@pytest.mark.parametrize("case", NEAR_MISSES)
def test_near_miss_is_rejected_from_both_sides(case: str) -> None:
    assert ask(case) == ask(" == ".join(reversed(case.split("==")))) == Decision(False, "nonzero")


@pytest.mark.parametrize("case", UNDECIDED)
def test_neither_way_is_claimed_without_proof(case: str) -> None:
    assert ask(case) == Decision(None, "undecided")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("sqrt(2)*sqrt(3) == sqrt(6)", "exact"),
        ("sum(k, k, 1, 100) == 5050", "exact"),
        ("(x + 1)**2 == x**2 + 2*x + 1", "real"),
        ("sqrt(x**2) == abs(x)", "real"),
        ("sqrt(1/n) == 1/sqrt(n)", "positive"),
        ("log(x**2) == 2*log(x)", "positive"),
    ],
)
def test_reason_says_for_which_variables(case: str, reason: str) -> None:
    assert ask(case) == Decision(True, reason)


def test_methods_prove_no_near_miss_even_where_no_number_warns(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    blind = "from rewards.maths import symbolic_worker as worker; worker._differ = lambda *_: False; worker.main()"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(symbolic, "COMMAND", (sys.executable, "-P", "-c", blind))
    decisions = {case: ask(case, time_limit=1.0) for case in [*NEAR_MISSES, PI]}
    proved = {case: decision.reason for case, decision in decisions.items() if decision.equal}
    assert proved == dict.fromkeys(["x == abs(x)", "sqrt(x**2) == x", "(x**3)**(1/3) == abs(x)"], "positive")


def test_name_of_a_variable_means_nothing() -> None:
    for name in ("E", "I", "S", "pi()", "__class__", "x0", "lambda", "\N{SNOWMAN}", ""):
        a = Variable(name)
        doubled = Sum((a, a, Function(name, (a,))))
        assert symbolic.equal(doubled, Sum((Function(name, (a,)), Product((Number(Fraction(2)), a))))).equal is True
        assert symbolic.equal(a, Variable("y")).equal is False


@pytest.mark.parametrize(
    "thing",
    [Text("yes"), Collection("()", ()), Constant("reals"), PlusMinus(Number(Fraction(1)), 1), Matrix(())],
)
def test_what_is_no_value_is_refused_anywhere(thing: Node) -> None:
    one = Number(Fraction(1))
    for side in (thing, Sum((one, thing)), Power(one, thing), Function("det", (Product((thing,)),))):
        with pytest.raises(ValueError, match="no value"):
            symbolic.equal(one, side)


def test_time_limit_must_be_positive() -> None:
    one = Number(Fraction(1))
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="time_limit"):
            symbolic.equal(one, one, time_limit=limit)


def test_what_is_too_deep_or_too_long_to_send_is_undecided() -> None:
    deep: Node = Variable("x")
    for _ in range(20_000):
        deep = Sum((deep,))
    assert symbolic.equal(deep, Variable("x")) == Decision(None, "too-large")
    assert symbolic.equal(Number(Fraction(10**5000)), Number(Fraction(1))) == Decision(None, "too-large")


# --- deadlines


@pytest.mark.parametrize("case", BOMBS)
def test_bomb_ends_at_its_deadline_and_the_next_call_is_right(case: str) -> None:
    symbolic.start()
    start = time.perf_counter()
    assert ask(case, time_limit=0.4) == Decision(None, "time-limit")
    assert time.perf_counter() - start < 5  # without a deadline, minutes
    assert ask(TRUE).equal is True


def test_memory_bomb_ends_at_its_limit_and_the_next_call_is_right(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "from rewards.maths import symbolic_worker as worker; worker.MEMORY_LIMIT = 200 << 20; worker.main()"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(symbolic, "COMMAND", (sys.executable, "-P", "-c", small))
    assert ask(BUSY, time_limit=60) == Decision(None, "memory-limit")
    assert ask(TRUE).equal is True


def test_worker_is_kept_and_after_many_calls_replaced(one_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic, "CALLS_PER_WORKER", 3)
    used = []
    for _ in range(6):
        symbolic.start()
        used += pids()
        assert ask(TRUE).equal is True
    assert used == [used[0]] * 3 + [used[3]] * 3 and used[0] != used[3]
    assert gone(used[0], seconds=0.1)


def test_ctrl_c_does_not_reach_a_worker() -> None:
    symbolic.start()
    assert [pid for pid in pids() if os.getpgid(pid) == os.getpgid(0)] == []


def test_interrupted_call_does_not_answer_the_next_one(one_worker: None) -> None:
    # Whoever runs tests in several processes has those ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    symbolic.start()
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            ask(BUSY)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert ask(TRUE).equal is True


# --- threads, loops, forks, deaths


def test_threads_share_the_workers() -> None:
    cases = [(case, True) for case in IDENTITIES[:10]] + [(case, False) for case in NEAR_MISSES[:10]]

    def grade(shift: int) -> bool:
        mine = cases[shift:] + cases[:shift]
        return all(ask(case, time_limit=30).equal is want for case, want in mine)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(grade, range(8)))
    assert len(pids()) <= (os.cpu_count() or 1)


def test_event_loop_goes_on_meanwhile() -> None:
    async def main() -> tuple[list[Decision], int]:
        ticks = 0
        calls = asyncio.gather(asyncio.to_thread(ask, BOMBS[0], 0.5), *(asyncio.to_thread(ask, TRUE) for _ in range(4)))
        while not calls.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return await calls, ticks

    decisions, ticks = asyncio.run(main())
    assert [decision.equal for decision in decisions] == [None, True, True, True, True]
    assert ticks > 10


def test_forked_child_gets_workers_of_its_own(one_worker: None) -> None:
    symbolic.start()
    (mine,) = pids()
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()

    def grade() -> None:
        theirs.send((ask(TRUE).equal, pids()))

    child = fork.Process(target=grade)
    child.start()
    assert ours.poll(30)
    equal, its = ours.recv()
    child.join(10)
    assert equal is True and child.exitcode == 0
    assert mine not in its and all(map(gone, its))
    assert pids() == [mine] and ask(TRUE).equal is True and pids() == [mine]


def test_killed_worker_is_told_and_replaced(one_worker: None) -> None:
    symbolic.start()
    (pid,) = pids()
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
    timer.start()
    assert ask(BUSY) == Decision(None, "worker-died")
    timer.join()
    assert ask(TRUE).equal is True
    assert pids() != [pid]


def test_call_that_finds_no_idle_worker_says_busy(one_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic.start()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(ask, BOMBS[0], 1.0)
        time.sleep(0.2)
        monkeypatch.setattr(symbolic, "QUEUE_LIMIT", 0.1)
        assert ask(TRUE) == Decision(None, "busy")
        assert first.result() == Decision(None, "time-limit")


def test_waiting_for_a_worker_costs_no_time_of_the_call(one_worker: None) -> None:
    symbolic.start()
    with ThreadPoolExecutor(1) as thread:
        first = thread.submit(ask, BOMBS[0], 1.0)
        time.sleep(0.2)
        assert ask(TRUE, time_limit=0.5).equal is True
        assert first.result() == Decision(None, "time-limit")


def test_a_verdict_does_not_depend_on_load(one_worker: None) -> None:
    """A worker that gets no CPU for longer than its limit decides all the same; the limit is of its own time."""
    symbolic.start()
    (pid,) = pids()
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(1.5, os.kill, (pid, signal.SIGCONT))
    timer.start()
    assert grade_math("2", r"\sum_{k=0}^{\infty} \frac{1}{2^k} + 0 \cdot 7").reason == "equal/symbolic"
    timer.join()
    assert pids() == [pid]


def test_an_idle_worker_is_under_no_limit() -> None:
    ask_once = (
        "import signal; from rewards.maths.symbolic_worker import _answer; "
        'print(_answer(b\'[["Constant", "pi"], ["Constant", "pi"], 5.0]\'), signal.getitimer(signal.ITIMER_PROF))'
    )
    done = subprocess.run([sys.executable, "-c", ask_once], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "(True, 'exact') (0.0, 0.0)\n"


def test_a_worker_that_does_not_answer_leaves_the_verdict_unknown(
    one_worker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of it is remembered."""
    series = r"\sum_{k=0}^{\infty} \frac{1}{2^k} + 0 \cdot 8"
    symbolic.start()
    monkeypatch.setattr(symbolic, "HANG_LIMIT", 0.3)
    os.kill(pids()[0], signal.SIGSTOP)
    verdict = grade_math("2", series)
    assert (verdict.outcome, verdict.reason) == ("unknown", "grader-fault")
    monkeypatch.undo()
    assert grade_math("2", series).outcome == "right"


def test_nothing_is_left_after_close(fresh: None) -> None:
    symbolic.start(2)
    started = pids()
    assert started
    symbolic.close()
    for pid in started:
        with pytest.raises(ProcessLookupError):  # not even a zombie
            os.kill(pid, 0)
    assert ask(TRUE).equal is True


def test_worker_that_can_never_start_is_an_error(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symbolic._Worker, "started_once", False)
    exits = (sys.executable, "-c", "raise SystemExit(3)")
    for command, message in ((exits, "exit code 3"), (("/nowhere",), "No such")):
        monkeypatch.setattr(symbolic, "COMMAND", command)
        with pytest.raises(RuntimeError, match=message):
            ask(TRUE)
        with pytest.raises(RuntimeError, match=message):
            symbolic.start()


def test_worker_that_can_no_longer_start_leaves_it_undecided(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    symbolic.start()
    symbolic.close()
    monkeypatch.setattr(symbolic, "COMMAND", (sys.executable, "-c", "raise SystemExit(3)"))
    assert ask(TRUE) == Decision(None, "worker-died")


PARENT = """
import os, sys, threading, time
from rewards.maths import symbolic
from rewards.maths.tree import *
from fractions import Fraction
symbolic.start()
print(symbolic._pool.workers[-1]._process.pid, flush=True)
if "fork" in sys.argv:  # keeps the socket open behind the back of os.register_at_fork
    import ctypes
    if ctypes.CDLL(None).fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
n = Number(Fraction(9))
if "python" in sys.argv:
    powers = Power(Sum(tuple(map(Variable, "abcdefgh"))), Number(Fraction(60)))
    symbolic.equal(Sum((powers, Function("f", (n,)))), n)
if "bignum" in sys.argv:
    symbolic.equal(Power(n, Power(n, Power(n, n))), n)
time.sleep(60)
"""


@pytest.mark.parametrize("doing", ["nothing", "python", "bignum", "fork"])
def test_worker_goes_when_its_parent_is_killed(doing: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, doing], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    forked = int(parent.stdout.readline()) if doing == "fork" else None
    time.sleep(0.3)
    assert not gone(worker, seconds=0.05)
    parent.kill()
    parent.wait()
    try:
        assert gone(worker)
    finally:
        if forked:
            os.kill(forked, signal.SIGKILL)
        parent.stdout.close()


def test_parent_never_imports_sympy_and_leaves_no_worker_at_exit() -> None:
    script = (
        "import sys, threading, time; from fractions import Fraction\n"
        "from rewards.maths import symbolic; from rewards.maths.tree import Number, Power, Variable\n"
        "assert symbolic.equal(Variable('x'), Variable('x')).equal\n"
        "n = Number(Fraction(9)); bomb = Power(n, Power(n, Power(n, n)))\n"
        "threading.Thread(target=symbolic.equal, args=(bomb, n), kwargs={'time_limit': 30}, daemon=True).start()\n"
        "time.sleep(0.2)\n"
        "assert 'sympy' not in sys.modules and 'mpmath' not in sys.modules\n"
        "print(*[worker._process.pid for worker in symbolic._pool.workers if worker._process])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [pid for pid in done.stdout.split() if not gone(int(pid), seconds=0.1)] == []
