"""`python -m rewards` says what it does, and `doctor` what a machine can isolate and what it can't."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REWARDS = [sys.executable, "-m", "rewards"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize("arguments", [[], ["grade"], ["check"], ["doctor"]])
def test_every_command_explains_itself(arguments: list[str]) -> None:
    done = run(*REWARDS, *arguments, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: python -m rewards")


@pytest.mark.parametrize("arguments", [[], ["grade"], ["grade", "--workers", "0", "x"], ["heal"]])
def test_what_it_was_not_asked_well_is_exit_code_2(arguments: list[str]) -> None:
    done = run(*REWARDS, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: python -m rewards")


def test_nothing_heavy_is_imported_to_grade_maths() -> None:
    """Sympy alone would cost more than the 0.3 s until the first verdict."""
    script = "import sys, rewards.__main__, rewards.rows; print(sorted({'sympy', 'torch', 'numpy'} & set(sys.modules)))"
    assert run(sys.executable, "-c", script).stdout == "[]\n"


def test_doctor_says_whether_code_can_be_graded_here() -> None:
    done = run(*REWARDS, "doctor")
    assert done.returncode == ("Programs run in the jail." not in done.stdout)
    assert "seccomp" in done.stdout


def test_doctor_refuses_where_there_are_no_namespaces(mounts: None) -> None:
    if not shutil.which("setpriv"):
        pytest.skip("no setpriv here to give up rights with")
    forbid = "echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set -all --inh-caps -all"
    done = run("unshare", "-Ur", "sh", "-c", f"{forbid} {sys.executable} -m rewards doctor")
    assert done.returncode == 1
    assert "NO " in done.stdout
    assert "Programs are refused" in done.stdout.splitlines()[-1]
