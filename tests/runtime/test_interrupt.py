import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.interrupt import ECHO, Interrupt

ROOT = Path(__file__).parents[2]

LOOP = """
import sys, time
from runtime.interrupt import ECHO, Interrupt

with Interrupt() as interrupt:
    print("ready", flush=True)
    for _ in range(600):
        time.sleep(0.05)
        if interrupt.requested and "--stubborn" not in sys.argv:
            break
print("saved", flush=True)
sys.exit(interrupt.exit_code)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_lets_the_loop_save_and_exit_by_convention(signum: signal.Signals) -> None:
    child = start()
    child.send_signal(signum)
    out, err = child.communicate(timeout=20)
    assert out == "saved\n"
    assert child.returncode == 128 + signum
    assert err.strip() == f"{signum.name}: saving after this step, then leaving; again to stop at once"


def test_second_signal_stops_at_once() -> None:
    child = start("--stubborn")
    child.send_signal(signal.SIGTERM)
    assert child.stderr is not None
    while "SIGTERM" not in child.stderr.readline():
        pass
    time.sleep(ECHO + 0.1)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=20)
    assert out == ""
    assert child.returncode == -signal.SIGTERM


def test_launcher_passing_the_same_signal_on_is_no_second_one() -> None:
    """A scheduler signals every process, and torchrun its workers once more."""
    with Interrupt() as interrupt:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.exit_code == 128 + signal.SIGTERM


def test_leaving_puts_the_handlers_back() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.requested
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


def test_no_signal_is_exit_code_zero() -> None:
    with Interrupt() as interrupt:
        pass
    assert not interrupt.requested and interrupt.exit_code == 0


def test_outside_the_main_thread_it_does_nothing() -> None:
    handlers: list[object] = []

    def enter() -> None:
        with Interrupt():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [before]
