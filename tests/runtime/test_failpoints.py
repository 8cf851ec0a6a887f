import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = "from runtime.failpoints import failpoint\nfor name in ('a', 'b', 'a'): failpoint(name); print(name, flush=True)"


def run(**variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("variables", "printed", "ended"),
    [
        ({}, "aba", 0),
        ({"FAILPOINT": "c"}, "aba", 0),
        ({"FAILPOINT": "a"}, "", -signal.SIGKILL),
        ({"FAILPOINT": "a:2"}, "ab", -signal.SIGKILL),
        ({"FAILPOINT": "a:3"}, "aba", 0),
        ({"FAILPOINT": "b", "FAILPOINT_SIGNAL": "SIGTERM"}, "a", -signal.SIGTERM),
        ({"FAILPOINT_SIGNAL": "SIGTERM"}, "aba", 0),
    ],
)
def test_dies_at_the_named_pass_by_the_named_signal(variables: dict[str, str], printed: str, ended: int) -> None:
    done = run(**variables)
    assert done.stdout.replace("\n", "") == printed
    assert done.returncode == ended


def test_log_lists_every_pass_and_the_one_it_died_at(tmp_path: Path) -> None:
    log = tmp_path / "passes"
    run(FAILPOINT_LOG=str(log))
    run(FAILPOINT_LOG=str(log), FAILPOINT="b")
    assert log.read_text() == "a\nb\na\n" + "a\nb\n"
