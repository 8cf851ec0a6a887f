"""The life of a row, printed by the real command; nothing that data and models wrote acts or is forged."""

import subprocess
import sys
from pathlib import Path

import pytest

from distill.ledger import Ledger
from distill.trace import trace
from distill.types import Choice, Decision, Finding, Problem, Sample, Teacher
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]
HOSTILE = "six\x1b[2J\u202e\nverdict       right (forged)\r\x9b31m"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one answer in each state."""
    run_dir = tmp_path_factory.mktemp("run")
    prompt = [{"role": "user", "content": f"2 × 3? {HOSTILE}"}]
    problem = Problem(
        id="sums/a/1", position=7, domain="math", prompt=prompt, answer="6", columns={"source": "<b>\x1b</b>"}
    )
    settings = {"domain": "math", "system": "Think twice.", "temperature": 0.6, "max_tokens": 64}
    common = dict(problem=7, kind="reasoning", tokens=5, seed=12345, teacher="t")
    samples = [
        Sample(index=0, text=f"<think>2 × 3</think>{HOSTILE}", finish_reason="stop", **common),  # type: ignore[arg-type]
        Sample(index=1, text="", finish_reason="error", error="HTTP 500: \x1b[1mout", **common),  # type: ignore[arg-type]
        Sample(index=2, text="5", finish_reason="length", **common),  # type: ignore[arg-type]
    ]
    findings = {
        samples[0].key: Finding(outcome="right", reason="equal/string", answer="6", score=1.5),
        samples[2].key: Finding(outcome="wrong", reason="unequal", answer="5", complaints=["cut off", "repetition"]),
    }
    with Ledger(run_dir / "ledger.sqlite") as ledger:
        ledger.begin({"experts.math.review": True}, [problem], [])
        ledger.add_teacher(Teacher(id="t", model="org/r1", weights_hash="cafe", settings=settings))
        ledger.add_samples(samples)
        ledger.add_findings(findings)
        ledger.add_choices({samples[0].key: Choice(kept=True, reason="kept")})
    return run_dir


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distill", "trace", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_it_tells_the_whole_life(run_dir: Path) -> None:
    done = command("sums/a/1/reasoning/0", "--run", str(run_dir))
    assert done.returncode == 0 and done.stderr == ""
    for said in (
        "problem       sums/a/1  (number 7 of the run, domain math)",
        "  gold        6",
        "row           sums/a/1/reasoning/0",
        "teacher       org/r1  (id t, weights cafe)",
        'parameters    {"domain": "math", "max_tokens": 64, "temperature": 0.6}',
        "system prompt Think twice.",
        "seed          12345, answer 0 of its kind",
        "ended by      stop, 5 tokens",
        "verdict       right (equal/string, read as 6)",
        "filters       readable",
        "score         1.5",
        "choice        kept",
        "review        waiting for people",
    ):
        assert said in done.stdout.splitlines()


def test_nothing_in_it_acts_or_is_forged(run_dir: Path) -> None:
    done = command("sums/a/1/reasoning/0", "--run", str(run_dir))
    assert not {"\x1b", "\u202e", "\r", "\x9b"} & set(done.stdout)
    assert "\\x1b[2J\\u202e" in done.stdout and "\\x9b31m" in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("verdict")] == [
        "verdict       right (equal/string, read as 6)"
    ]


def test_a_problem_tells_of_all_its_answers(run_dir: Path) -> None:
    with Ledger(run_dir / "ledger.sqlite", read_only=True) as ledger:
        lines = list(trace(ledger, "sums/a/1"))
        decision = Decision(accepted=True, reviewer="ana\x1b", text="Six.")
        reviewed = list(trace(ledger, "sums/a/1/reasoning/0", decisions={"sums/a/1/reasoning/0": decision}))
    assert [line for line in lines if line.startswith("row")] == [
        f"row           sums/a/1/reasoning/{index}" for index in range(3)
    ]
    assert "ended by      error, 5 tokens: HTTP 500: \\x1b[1mout" in lines and "verdict       not graded yet" in lines
    assert "filters       cut off, repetition" in lines and "choice        not made yet" in lines
    assert "review        accepted by ana\\x1b, edited" in reviewed and "  as edited   Six." in reviewed


def test_what_is_not_there_is_an_error_of_one_line(run_dir: Path, tmp_path: Path) -> None:
    for arguments in (["sums/a/1/reasoning/9"], ["x\x1b"], ["sums/a/1/reasoning/99999999999999999999"]):
        done = command(*arguments, "--run", str(run_dir))
        assert done.returncode == 2 and "is no answer in" in done.stderr and "\x1b" not in done.stderr
        assert done.stderr.count("\n") == 1
    assert "no such ledger" in command("x", "--run", str(tmp_path)).stderr
    assert not (tmp_path / "ledger.sqlite").exists()
    (tmp_path / "ledger.sqlite").write_bytes(b"not a ledger" * 100)
    done = command("x", "--run", str(tmp_path))
    assert done.returncode == 2 and "damaged, or no ledger" in done.stderr
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    with pytest.raises(UserError, match="format 0, not 1"):
        Ledger(tmp_path / "ledger.sqlite", read_only=True)
