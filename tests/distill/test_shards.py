"""A ledger -> shards: what is in them, people's decisions joined, nothing of the machine, and the same bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill.ledger import Ledger
from distill.problems import Aside
from distill.shards import SCHEMA, Export, export
from distill.types import Choice, Decision, Finding, Problem, Sample, Teacher
from runtime.rows import load_rows
from sft.sources import Conversation, conversation

HOSTILE = "a`|<img onerror=x>\x1b[31m\u202e"


def make_ledger(path: Path) -> Path:
    """Two problems that are graded and one for people; a wrong answer, one that is unknown and one that was cut."""
    settings = {"experts.math.review": False, "experts.others.review": True, "keep": 2, "policy": "first"}
    settings |= {"benchmarks": ["/data/gsm8k-test.jsonl"], "ngram": 10}
    problems, samples, findings, choices = [], [], {}, {}
    for i in range(3):
        domain = "talk" if i == 2 else "math"
        prompt = [{"role": "user", "content": f"{i}?"}]
        columns: dict[str, Any] = (
            {"tests": [{"input": "1", "output": "2"}, {"assert": "x"}]} if i == 0 else {"level": i}
        )
        about = dict(domain=domain, prompt=prompt, answer="" if domain == "talk" else "1", columns=columns)
        problems.append(Problem(id=f"p/{i}" if i else HOSTILE, position=i, **about))
        # outcome, complaints, kept
        fates: list[tuple[Any, list[str], bool]] = [("right", [], True), ("wrong", [], False), ("unknown", [], False)]
        if i == 1:
            fates = [("right", ["cut off"], False), ("right", [], True), ("right", [], True)]
        if domain == "talk":
            fates = [("unknown", [], True), ("unknown", [], True), ("unknown", ["repetition"], False)]
        for index, (outcome, complaints, kept) in enumerate(fates):
            sample = Sample(
                problem=i, kind="original" if domain == "talk" else "reasoning", index=index, text=f"{i} says {index}",
                tokens=10 + index, finish_reason="stop", seed=2**62 + i, teacher="t",
            )  # fmt: skip
            samples.append(sample)
            reason = "not-graded" if domain == "talk" else "rule"
            findings[sample.key] = Finding(outcome=outcome, reason=reason, answer=None, complaints=complaints)
            why = "kept" if kept else complaints[0] if complaints else outcome
            choices[sample.key] = Choice(kept=kept, reason=why)
    with Ledger(path) as ledger:
        ledger.begin(settings, problems, [Aside(source="s", line=4, reason=HOSTILE)])
        teacher = dict(domain=HOSTILE, system="Think.", temperature=1.0, max_tokens=9)
        ledger.add_teacher(Teacher(id="t", model="/secret/folder/expert", weights_hash="abc", settings=teacher))
        ledger.add_samples(samples)
        ledger.add_findings(findings)
        ledger.add_choices(choices)
    return path


def exported(tmp_path: Path, **options: Any) -> tuple[Export, list[dict[str, Any]]]:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path if path.exists() else make_ledger(path), read_only=True) as ledger:
        made = export(ledger, tmp_path / "shards", **options)
    files = sorted((tmp_path / "shards").glob("data-*.parquet"))
    return made, [row for file in files for row in pq.read_table(file).to_pylist()]


def test_rows_are_conversations_with_their_provenance(tmp_path: Path) -> None:
    made, rows = exported(tmp_path)
    assert [row["id"] for row in rows] == [
        f"{HOSTILE}/reasoning/0", "p/1/reasoning/1", "p/1/reasoning/2", "p/2/original/0", "p/2/original/1",
    ]  # fmt: skip
    assert rows[0] == {
        "messages": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "0?"},
            {"role": "assistant", "content": "0 says 0"},
        ],
        "id": f"{HOSTILE}/reasoning/0", "problem_id": HOSTILE, "kind": "reasoning", "domain": "math",
        "teacher": "expert", "weights_hash": "abc", "verdict": "right", "pass_rate": 0.5, "seed": 2**62, "tokens": 10,
        "reviewed": None, "reviewer": None,
    }  # fmt: skip
    assert rows[3]["messages"][0]["role"] == "user" and rows[3]["reviewed"] is False
    assert [row["pass_rate"] for row in rows] == [0.5, 1.0, 1.0, None, None]
    assert made.rows == 5 and all(isinstance(conversation(row), Conversation) for row in rows)


def test_the_yield_is_counted_by_domain_and_kind(tmp_path: Path) -> None:
    made, _ = exported(tmp_path)
    maths, talk = made.table
    assert (maths.problems, maths.answers, maths.right, maths.wrong, maths.unknown) == (2, 6, 4, 1, 1)
    assert (maths.hard_to_read, maths.kept, maths.waiting, maths.tokens) == (1, 3, 0, 10 + 11 + 12)
    assert (talk.unknown, talk.hard_to_read, talk.kept, talk.waiting) == (3, 1, 2, 2)
    said = json.loads((tmp_path / "shards/manifest.json").read_text())
    assert said["verdicts"] == {"right: rule": 4, "unknown: not-graded": 3, "unknown: rule": 1, "wrong: rule": 1}
    assert said["choices"] == {"cut off": 1, "kept": 5, "repetition": 1, "unknown": 1, "wrong": 1}


def test_people_accept_edit_and_reject(tmp_path: Path) -> None:
    decisions = {
        "p/2/original/0": Decision(accepted=True, reviewer="ana", text="better"),
        "p/2/original/1": Decision(accepted=False, reviewer="raj"),
        "p/1/reasoning/1": Decision(accepted=False, reviewer="raj"),
    }
    made, rows = exported(tmp_path, decisions=decisions)
    assert [row["id"][-11:] for row in rows] == ["reasoning/0", "reasoning/2", "/original/0"]
    last = rows[-1]
    assert last["messages"][-1]["content"] == "better" and (last["reviewed"], last["reviewer"]) == (True, "ana")
    assert [(part.kept, part.rejected, part.waiting) for part in made.table] == [(2, 1, 0), (1, 1, 0)]


def test_shards_are_split_and_those_of_a_larger_export_go(tmp_path: Path) -> None:
    _, rows = exported(tmp_path, rows_per_shard=2)
    files = sorted(file.name for file in (tmp_path / "shards").glob("data-*"))
    assert files == ["data-00000.parquet", "data-00001.parquet", "data-00002.parquet"]
    assert exported(tmp_path, rows_per_shard=5)[1] == rows
    assert [file.name for file in (tmp_path / "shards").glob("data-*")] == ["data-00000.parquet"]


def test_nothing_kept_is_an_empty_shard(tmp_path: Path) -> None:
    names = ["p/1/reasoning/1", "p/1/reasoning/2", "p/2/original/0", "p/2/original/1", f"{HOSTILE}/reasoning/0"]
    made, rows = exported(tmp_path, decisions=dict.fromkeys(names, Decision(accepted=False, reviewer="raj")))
    assert rows == [] and made.rows == 0
    assert pq.read_schema(tmp_path / "shards/data-00000.parquet").names == SCHEMA.names


def test_the_manifest_has_the_hashes_and_nothing_shows_where_it_was_made(tmp_path: Path) -> None:
    exported(tmp_path)
    folder = tmp_path / "shards"
    said = json.loads((folder / "manifest.json").read_text())
    assert set(said["files"]) == {"data-00000.parquet", "problems.jsonl", "README.md"}
    for name, digest in said["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert b"/secret" not in (folder / "data-00000.parquet").read_bytes() + (folder / "README.md").read_bytes()
    assert said["set aside"] == {HOSTILE: 1} and said["settings"]["keep"] == 2


def test_the_same_ledger_gives_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        exported(tmp_path / name)
        found.append({file.name: file.read_bytes() for file in (tmp_path / name / "shards").iterdir()})
    assert found[0] == found[1] and len(found[0]) == 4


def test_without_a_manifest_an_export_is_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="data-00000"):
        exported(tmp_path)
    assert not (tmp_path / "shards/manifest.json").exists() and (tmp_path / "shards/data-00000.parquet").exists()


def test_the_card_is_a_datasets_and_shows_no_markup_of_others(tmp_path: Path) -> None:
    exported(tmp_path)
    card = (tmp_path / "shards/README.md").read_text()
    assert card.startswith("---\nconfigs:") and "data-*.parquet" in card and "`gsm8k-test.jsonl`" in card
    assert "| `math` | reasoning | 2 | 6 | 4 | 1 | 1 | 1 | 3 | 0 |" in card
    assert "`a'\\|<img onerror=x>\\x1b[31m\\u202e`" in card and "\x1b" not in card and "\u202e" not in card


def test_an_answer_that_came_with_its_problem_says_nothing_of_the_teacher(tmp_path: Path) -> None:
    problem = Problem(id="p", position=0, domain="math", prompt=[{"role": "user", "content": "?"}], response="1")
    sample = Sample(
        problem=0, kind="original", index=0, text="1", tokens=1, finish_reason="stop", seed=0, teacher="source"
    )  # fmt: skip
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.begin({"keep": 1, "policy": "first", "benchmarks": [], "ngram": 10}, [problem], [])
        ledger.add_teacher(Teacher(id="source", model="source", weights_hash=None, settings={}))
        ledger.add_samples([sample])
        ledger.add_findings({sample.key: Finding(outcome="right", reason="rule", answer="1")})
        ledger.add_choices({sample.key: Choice(kept=True, reason="kept")})
    _, (row,) = exported(tmp_path)
    assert (row["verdict"], row["pass_rate"], row["weights_hash"]) == ("right", None, None)


def test_problems_keep_their_columns(tmp_path: Path) -> None:
    exported(tmp_path)
    first, second, third = load_rows(str(tmp_path / "shards/problems.jsonl"))
    assert first["tests"] == [{"input": "1", "output": "2"}, {"assert": "x"}] and first["pass_rate"] == 0.5
    assert (second["level"], second["pass_rate"], third["pass_rate"]) == (1, 1.0, None)
