"""The ledger: what is committed is there, on the disk and once; a failed commit leaves nothing."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from distill.ledger import Ledger
from distill.problems import Aside
from distill.types import Choice, Finding, Problem, Sample, Teacher
from runtime.errors import UserError


def problem(position: int) -> Problem:
    prompt = [
        {"role": "user", "content": f"{position}?\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16")}
    ]
    columns = {"tests": [{"input": "\x00"}], "when": None}
    return Problem(id=f"p{position}", position=position, domain="math", prompt=prompt, answer="1", columns=columns)


def sample(position: int, index: int, finish_reason: Any = "stop", **fields: Any) -> Sample:
    about = dict(text="a\x00b", tokens=3, seed=2**63 - 1, teacher="t") | fields
    return Sample(problem=position, kind="reasoning", index=index, finish_reason=finish_reason, **about)


def finding(outcome: Any, reason: str = "rule") -> Finding:
    return Finding(outcome=outcome, reason=reason, answer=None, complaints=["cut off"])


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin(
            {"b": [1, None], "a": "x"}, [problem(i) for i in range(4)], [Aside(source="s", line=2, reason="r")]
        )
        ledger.add_teacher(Teacher(id="t", model="m", weights_hash=None, settings={}))
        yield ledger


def test_a_commit_is_on_the_disk_before_it_returns(ledger: Ledger) -> None:
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert ledger._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_what_goes_in_comes_out(ledger: Ledger) -> None:
    samples = [sample(0, 0), sample(0, 1, "error", error="why"), sample(2, 0)]
    ledger.add_samples(samples)
    found = {samples[0].key: finding("right")}
    ledger.add_findings(found)
    ledger.add_choices({samples[0].key: Choice(kept=True, reason="kept")})
    with Ledger(ledger.path, read_only=True) as reader:
        assert reader.settings() == {"a": "x", "b": [1, None]} and reader.aside() == {"r": 1}
        assert reader.problems([2, 0]) == [problem(0), problem(2)]
        assert list(reader.samples([0, 2]).values()) == samples and reader.samples([1]) == {}
        assert reader.findings([0]) == found and reader.settled() == {0: 1}
        rows = list(reader.rows())
    assert [row.sample for row in rows] == samples and rows[0].problem == problem(0)
    assert (rows[1].finding, rows[1].choice) == (None, None)


def test_what_is_there_is_never_written_again(ledger: Ledger) -> None:
    ledger.add_samples([sample(0, 0)])
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add_samples([sample(1, 0), sample(0, 0, text="another")])
    assert list(ledger.samples(range(4)).values()) == [sample(0, 0)]  # nothing of the second commit


@pytest.mark.parametrize(
    "write",
    [
        lambda ledger: ledger.add_samples([sample(9, 0)]),
        lambda ledger: ledger.add_samples([sample(0, 0, teacher="nobody")]),
        lambda ledger: ledger.add_findings({(0, "reasoning", 0): finding("right")}),
        lambda ledger: ledger.add_choices({(0, "reasoning", 0): Choice(kept=True, reason="kept")}),
    ],
)
def test_nothing_comes_before_what_it_is_about(ledger: Ledger, write: Any) -> None:
    with pytest.raises(sqlite3.IntegrityError):
        write(ledger)


def test_another_try_keeps_what_is_known(ledger: Ledger) -> None:
    """Problem 0: a teacher's fault beside a right answer; 1: a grader's; 2: for people; 3: all is well."""
    fates = {(0, 0): "error", (0, 1): "right", (1, 0): "unknown", (2, 0): "not-graded", (3, 0): "wrong"}
    for (position, index), fate in fates.items():
        made = sample(position, index, *(["error"] if fate == "error" else []), error="out" if fate == "error" else "")
        ledger.add_samples([made])
        outcome = fate if fate in ("right", "wrong") else "unknown"
        ledger.add_findings({made.key: finding(outcome, "not-graded" if fate == "not-graded" else "rule")})
        ledger.add_choices({made.key: Choice(kept=False, reason=outcome)})
    assert ledger.forget_unknown() == (1, 1)
    assert [key[::2] for key in ledger.samples(range(4))] == [(0, 1), (1, 0), (2, 0), (3, 0)]
    assert [key[::2] for key in ledger.findings(range(4))] == [(0, 1), (2, 0), (3, 0)]
    assert [key[::2] for key in ledger.choices(range(4))] == [(2, 0), (3, 0)]
    assert ledger.retried((0, "reasoning", 0)) == ["out"] and ledger.forget_unknown() == (0, 0)


def test_another_format_is_refused(ledger: Ledger, tmp_path: Path) -> None:
    ledger._db.execute("PRAGMA user_version = 2")
    with pytest.raises(UserError, match="format 2, not 1"):
        Ledger(ledger.path)
