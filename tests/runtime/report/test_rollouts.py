"""Completions: which are shown, what is said of their tokens, and numbers over steps by hand."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.report import rollouts
from runtime.report.read import Run, read_run
from runtime.report.rollouts import Browser, browse, pick, scan, spread, token_texts


@pytest.fixture(scope="module")
def browser(run: Path) -> Browser:
    return browse(read_run(run), wanted=[])


def sample(browser: Browser, step: int, group: int, number: int) -> dict[str, Any]:
    (found,) = [s for s in browser.samples if (s["s"], s["g"], s["n"]) == (step, group, number)]
    return found


def test_each_completion_is_there_once(browser: Browser) -> None:
    assert browser.steps == [1, 10, 20]
    assert len(browser.samples) == 36
    assert browser.note.startswith("36 of the 36 completions of 3 steps.")
    assert len(browser.prompts) == 9  # one of the first group, and eight that are all different


def test_verdicts_and_flags(browser: Browser) -> None:
    assert [sample(browser, 1, 0, n)["v"] for n in range(4)] == ["right", "wrong", "right", "wrong"]
    assert [sample(browser, 1, 1, n)["v"] for n in range(4)] == ["right", "unknown", "right", "right"]
    assert [sample(browser, 1, g, 0)["eq"] for g in range(3)] == [False, True, False]
    assert [sample(browser, 1, 0, n)["cut"] for n in range(2)] == [True, False]


def test_why_a_completion_was_not_trained_on(browser: Browser) -> None:
    assert sample(browser, 1, 0, 0)["mask"] == ""
    assert sample(browser, 1, 1, 0)["mask"] == "advantage 0: nothing to learn from its reward"
    assert sample(browser, 1, 1, 1)["mask"] == "reward unknown: left out of the update"
    assert sample(browser, 1, 2, 0)["mask"].startswith("spare")


def test_truncated_completions_are_masked_where_the_run_masked_them(run: Path) -> None:
    read = read_run(run)
    read.config["loss.mask_truncated"] = True
    masked = browse(read, [])
    assert sample(masked, 1, 0, 0)["mask"] == "truncated: left out by loss.mask_truncated"
    assert sample(masked, 1, 0, 1)["mask"] == ""


def test_tokens_with_their_log_probs_and_ratios(browser: Browser) -> None:
    plain = sample(browser, 10, 0, 1)
    assert plain["tok"] == ["b", "b", "b"]
    assert plain["lp"] == [-0.25, -0.5, -0.75]
    assert plain["lr"] == [0.1, 1.0, 0.0]  # trainer's less sampler's
    assert plain["cap"] == [1]  # e^1 is above the cap of 2
    assert "lr" not in sample(browser, 10, 2, 0)  # spare: the trainer has not seen it


def test_ratios_of_another_completion_are_not_taken(run: Path, tmp_path: Path, make_run: Any) -> None:
    other = make_run(tmp_path / "run")
    path = other / "trainer/step-000001.parquet"
    rows = [{**row, "logprobs": row["logprobs"][:-1]} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = browse(read_run(other), [])
    assert not any("lr" in s for s in found.samples if s["s"] == 1)
    assert any("lr" in s for s in found.samples if s["s"] == 10)


def test_without_a_tokenizer_tokens_are_numbers(tmp_path: Path, make_run: Any) -> None:
    run = make_run(tmp_path / "run")
    (run / "checkpoints/final/tokenizer.json").write_text("{")
    read = read_run(run)
    found = sample(browse(read, []), 1, 0, 1)
    assert found["text"] == "abc" * 3 and len(found["tok"]) == 3 and all(t.strip().isdecimal() for t in found["tok"])
    assert any(note.startswith("final/tokenizer.json can't be read") for note in read.notes)


def test_a_long_completion_shows_both_ends(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr(rollouts, "HEAD", 5)
    monkeypatch.setattr(rollouts, "TAIL", 2)
    whole = "".join(sample(browse(read_run(run), []), 1, 0, 0)["tok"])
    monkeypatch.undo()
    full = sample(browse(read_run(run), []), 1, 0, 0)
    assert whole == "".join([*full["tok"][:5], *full["tok"][-2:]])
    assert len(full["tok"]) > 7 == 5 + 2


def test_a_page_full_of_completions_stops(monkeypatch: pytest.MonkeyPatch, run: Path) -> None:
    monkeypatch.setattr(rollouts, "MOST_BYTES", 9_000)
    found = browse(read_run(run), [])
    assert 0 < len(found.samples) < 36
    assert {s["s"] for s in found.samples} == {1, 10, 20}  # every step has its share
    assert f"{len(found.samples)} of the 36" in found.note


def test_steps_that_findings_name_are_among_those_shown(tmp_path: Path, make_run: Any) -> None:
    run = make_run(tmp_path / "run")
    table = pq.read_table(run / "rollouts/step-000001.parquet")
    for step in range(100, 160):
        pq.write_table(table, run / f"rollouts/step-{step:06d}.parquet")
    steps = browse(read_run(run), wanted=[133, 999]).steps
    assert len(steps) <= 12 and {1, 133, 159} <= set(steps) and 999 not in steps
    assert 133 not in browse(read_run(run), wanted=[]).steps


def test_every_kind_gets_a_place() -> None:
    rows = [
        {"at": i, "process": 0, "group": i // 8, "verdict": "wrong", "cut": False, "used": True, "reward": 0.0}
        for i in range(800)
    ]
    rows[417]["verdict"] = "unknown"
    rows[600]["cut"] = True
    picked = [row["at"] for row in pick(rows, 32)]
    assert len(picked) == 32 and picked == sorted(picked) and {417, 600} <= set(picked)
    assert set(range(8)) <= set(picked) and set(range(792, 800)) <= set(picked)  # whole groups


def test_spread_keeps_the_ends() -> None:
    assert spread(list(range(100)), 5) == [0, 25, 50, 74, 99]
    assert spread([1, 2], 5) == [1, 2]
    assert spread([1, 2, 3], 0) == []


def test_numbers_over_steps_by_hand(run: Path) -> None:
    first = scan(read_run(run))[0]
    assert (first.step, first.completions, first.groups) == (1, 12, 3)
    # Of the first group 0.5, -0.5, ...; of the second 0; the third was not trained on.
    assert sorted(first.advantages) == [-0.5, -0.5, 0.0, 0.0, 0.0, 0.5, 0.5]
    assert (first.equal_high, first.equal_low) == (1, 0)


@pytest.mark.parametrize(("lengths", "expected"), [([9, 1, 9, 1], 1.0), ([1, 9, 1, 9], -1.0), ([5, 5, 5, 5], math.nan)])
def test_length_and_reward_correlate_within_groups(tmp_path: Path, lengths: list[int], expected: float) -> None:
    """The second group is longer and worse paid as a whole, which is no matter."""
    rows = [
        {"process": 0, "group": g, "reward": float(i % 2 == 0) - g, "completion_ids": [1] * (n + 20 * g)}
        for g in (0, 1)
        for i, n in enumerate(lengths)
    ]
    (tmp_path / "rollouts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rollouts/step-000001.parquet")
    (found,) = scan(Run(path=tmp_path, name="run"))
    assert found.length_pays == pytest.approx(expected, nan_ok=True)


def test_pieces_add_up_to_the_text() -> None:
    """Bytes as tokens: a character of several has its text at its last token."""
    text = "aé€😀b�c"
    ids = list(text.encode())
    pieces = list(token_texts(ids, lambda part: bytes(part).decode(errors="replace")))
    assert "".join(pieces) == text
    assert pieces[:7] == ["a", "", "é", "", "", "€", ""]


def test_a_tokenizer_that_joins_words_keeps_its_spaces() -> None:
    """SentencePiece's decoders drop the space before the first word alone."""
    words = ["▁Hello", "▁there", "!"]
    decode = lambda part: "".join(words[i] for i in part).replace("▁", " ").removeprefix(" ")  # noqa: E731
    assert list(token_texts([0, 1, 2], decode)) == ["Hello", " there", "!"]
