"""The 40 hostile programs in the real jail, as this user and, for root, as an ordinary one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.sandbox.hostile import programs, run_all

ROOT = Path(__file__).parents[3]
NOBODY = 65534
# `rewards` as a bare package: an interpreter that everyone may run need not have sympy
ALL = """
import json, sys, types
package = sys.modules["rewards"] = types.ModuleType("rewards")
package.__path__ = [sys.argv[1]]
from rewards.sandbox.hostile import run_all
from rewards.sandbox.limits import Limits
from rewards.sandbox.local import Sandbox
attacks = [[attack.number, attack.name, *attack.problems] for attack in run_all()]
with Sandbox(1) as sandbox:
    user = sandbox.run("import os; print(os.getuid(), os.getgid(), os.getgroups())", "", Limits()).stdout.decode()
print(json.dumps([user, attacks]))
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the jail needs Linux")


def test_all_forty_are_there() -> None:
    assert sorted({entry["number"] for entry in programs()}) == list(range(1, 41))


def test_every_program_is_contained() -> None:
    assert {f"{attack.number} {attack.name}": attack.problems for attack in run_all() if attack.problems} == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: the test above ran as an ordinary user")
def test_every_program_is_contained_as_an_ordinary_user() -> None:
    command = [_python_for_everyone(), "-c", ALL, str(ROOT / "rewards")]
    done = subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    user, attacks = json.loads(done.stdout)
    assert user == f"{NOBODY} {NOBODY} []\n"
    assert len(attacks) == len(programs())
    assert [attack for attack in attacks if len(attack) > 2] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can stay root")
def test_every_program_is_contained_where_root_has_no_user_namespace(tmp_path: Path) -> None:
    """The copy's jail is told that this machine offers none."""
    subprocess.run(["cp", "-r", str(ROOT / "rewards"), str(tmp_path)], check=True)
    jail = tmp_path / "rewards/sandbox/jail.py"
    text = jail.read_text()
    assert text.count("if _may_have_user_namespace(user):") == 1
    jail.write_text(text.replace("if _may_have_user_namespace(user):", "if False:"))
    done = subprocess.run([sys.executable, "-c", ALL, str(tmp_path / "rewards")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    user, attacks = json.loads(done.stdout)
    assert not user.startswith("0") and user.split()[0] == user.split()[1]
    assert [attack for attack in attacks if len(attack) > 2] == []


def _python_for_everyone() -> str:
    """An interpreter that an ordinary user may run, and may read this checkout with."""
    read = f"import sys; open({str(ROOT / 'rewards/verdict.py')!r}); assert sys.version_info >= (3, 11)"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if Path(python).exists():
            try:
                tried = subprocess.run(
                    [python, "-c", read], user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True
                )
                if tried.returncode == 0:
                    return python
            except PermissionError:
                continue
    pytest.skip("no Python 3.11 that an ordinary user may run, or this checkout is closed to others")
