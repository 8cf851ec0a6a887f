"""Layouts, bad rows and kinds of source; the order of draws."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from runtime.errors import UserError
from runtime.rows import Rows, load_rows, order, take

GOOD = {"prompt": "2+2?", "answer": "4"}


def write(path: Path, *rows: Any) -> str:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return str(path)


def load(path: Path, *rows: Any, **options: Any) -> Rows:
    return load_rows(write(path, *rows), **options)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def test_prompt_and_answer_pass_as_they_are(file: Path) -> None:
    chat = {
        "prompt": [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}],
        "answer": "1",
        "x": [2],
    }
    assert load(file, GOOD, chat) == [GOOD, chat]


def test_gsm8k_keeps_the_number_and_the_solution(file: Path) -> None:
    (row,) = load(file, {"question": "How much?", "answer": "500*2=<<500*2=1000>>1000\nSo 1,000.\n#### 1,000"})
    assert row == {
        "prompt": [{"role": "user", "content": "How much?"}],
        "answer": "1000",
        "solution": "500*2=<<500*2=1000>>1000\nSo 1,000.",
    }


def test_numina_keeps_its_columns_and_skips_what_has_no_answer(file: Path) -> None:
    (row, *rest), proofs = [{"problem": "x?", "answer": "\\frac{1}{2}", "solution": "s", "source": "amc"}], 3
    unusable = [{"problem": "Show it.", "answer": "proof"}] * proofs
    typed = {"problem": "Show it.", "answer": "2", "question_type": "proof"}
    rows = load(file, row, *unusable, typed, *rest)  # not malformed: max_bad_fraction doesn't count them
    assert rows == [
        {
            "prompt": [{"role": "user", "content": "x?"}],
            "answer": "\\frac{1}{2}",
            "solution": "s",
            "source": "amc",
        }
    ]
    assert rows.reasons == {"nothing to verify (answer is proof or notfound)": 4}


@pytest.mark.parametrize(("given", "kept"), [(4, "4"), (0.5, "0.5"), (None, ""), ("four", "four")])
def test_answer_becomes_a_string(file: Path, given: object, kept: str) -> None:
    assert load(file, {"prompt": "p", "answer": given})[0]["answer"] == kept


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"prompt": "p", "answer"', "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
        (b'{"prompt": "p", "answer": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b'{"prompt": "\xff", "answer": "1"}', "broken UTF-8"),
        (b'{"prompt": "\\ud800", "answer": "1"}', "broken UTF-8"),
        (["p", "1"], "not an object but of type list"),
        ({"answer": "1"}, "no prompt, question or problem"),
        ({"prompt": None, "answer": "1"}, "no prompt, question or problem"),
        ({"prompt": " \n", "answer": "1"}, "empty prompt"),
        ({"prompt": [], "answer": "1"}, "empty prompt"),
        ({"prompt": 5, "answer": "1"}, "prompt is of type int, not a string or a list of messages"),
        ({"question": ["q"], "answer": "1"}, "question is of type list, not a string"),
        (
            {"prompt": [{"role": "user"}], "answer": "1"},
            "prompt has a message that isn't an object with the strings role and content",
        ),
        ({"prompt": "p", "answer": ["1"]}, "answer is of type list, not a string"),
        ({"prompt": "p", "answer": True}, "answer is of type bool, not a string"),
        ({"question": "q", "answer": "so #### "}, "no answer after ####"),
    ],
)
def test_a_bad_row_is_set_aside_with_line_and_reason(file: Path, bad: Any, reason: str) -> None:
    rows = load(file, GOOD, bad, b"", GOOD, max_bad_fraction=0.5)
    assert rows == [GOOD, GOOD]
    assert rows.lines == [1, 4]
    (reject,) = rows.rejects
    assert (reject.line, reject.reason) == (2, reason)
    assert 0 < len(reject.text) <= 200
    assert rows.summary() == f"{file}: 2 rows; 1 set aside: {reason}"


def test_too_many_bad_rows_are_refused_with_the_first_reasons(file: Path) -> None:
    bad = {"prompt": "", "answer": "1"}
    assert len(load(file, *[GOOD] * 9, bad)) == 9
    with pytest.raises(UserError, match=r"2 of 10 rows are bad.*max_bad_fraction=0.1[^$]*line 9: empty prompt"):
        load(file, *[GOOD] * 8, bad, bad)


def test_no_good_row_is_refused(file: Path) -> None:
    with pytest.raises(UserError, match=r"none of its 1 rows can be used[^$]*line 1: no prompt"):
        load(file, {"qestion": "q"}, max_bad_fraction=1.0)
    with pytest.raises(UserError, match="holds no rows"):
        load(file, b"")


def test_limit_stops_after_that_many_good_rows(file: Path) -> None:
    rows = load(file, GOOD, b"{", *[GOOD] * 8, b"{", limit=2, max_bad_fraction=0.5)
    assert (len(rows), len(rows.rejects)) == (2, 1)
    with pytest.raises(UserError, match="limit=0"):
        load_rows(str(file), limit=0)


def test_byte_order_mark_and_windows_lines_are_harmless(file: Path) -> None:
    assert load(file, b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r", b"\r") == [GOOD]


def test_line_separators_inside_a_string_do_not_split_it(file: Path) -> None:
    row = {"prompt": "a\u2028b\u0085c", "answer": "1"}
    assert load(file, json.dumps(row, ensure_ascii=False).encode()) == [row]


def test_a_json_array_is_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD], indent=2))
    with pytest.raises(UserError, match="one object per line; convert it with: jq"):
        load_rows(str(path))


def test_gzip_reads_like_the_plain_file_and_a_torn_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(json.dumps(GOOD).encode())
    path.write_bytes(packed)
    assert load_rows(str(path)) == [GOOD]
    path.write_bytes(packed[:-9])
    with pytest.raises(UserError, match=r"rows.jsonl.gz.*can't be read"):
        load_rows(str(path))


def test_parquet_reads_messages_and_counts_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    chat = {"prompt": [{"role": "user", "content": "hi"}], "answer": "1"}
    empty = {"prompt": [], "answer": "1"}
    pq.write_table(pa.Table.from_pylist([chat, empty, chat]), path)
    rows = load_rows(str(path), max_bad_fraction=0.5)
    assert rows == [chat, chat]
    assert [(r.line, r.reason) for r in rows.rejects] == [(2, "empty prompt")]


def test_parquet_with_broken_utf8_loses_only_that_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    prompts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts, "answer": ["1", "2", "3"]}), path)
    rows = load_rows(str(path), max_bad_fraction=0.5)
    assert [row["prompt"] for row in rows] == ["a", "c"]
    assert [(r.line, r.reason) for r in rows.rejects] == [(2, "broken UTF-8")]


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        load_rows(str(path))


def test_datasets_folders_load_with_their_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    part = datasets.Dataset.from_list([{"question": "q", "answer": "#### 5"}])
    kept = {"prompt": [{"role": "user", "content": "q"}], "answer": "5", "solution": ""}
    part.save_to_disk(str(tmp_path / "one"))
    assert load_rows(str(tmp_path / "one")) == [kept]
    datasets.DatasetDict({"test": part}).save_to_disk(str(tmp_path / "many"))
    assert load_rows(f"{tmp_path / 'many'}:test") == [kept]
    with pytest.raises(UserError, match="can't load it"):
        load_rows(f"{tmp_path / 'many'}:nowhere")
    (tmp_path / "plain").mkdir()
    write(tmp_path / "plain" / "train.jsonl", GOOD)
    assert load_rows(str(tmp_path / "plain")) == [GOOD]


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/nowhere/at/all", "a b", "a:b:c:d", "stories:test"])
def test_a_source_that_is_not_there_names_itself_and_the_kinds(source: str) -> None:
    with pytest.raises(UserError, match="stories:heldout") as error:
        load_rows(source)
    assert source in str(error.value)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\n")
    with pytest.raises(UserError, match=r"rows.csv.*what kind of file.*Parquet"):
        load_rows(str(tmp_path / "rows.csv"))


def test_stories_are_built_in() -> None:
    train, held_out = load_rows("stories", limit=30), load_rows("stories:heldout", limit=30)
    assert len(train) == len(held_out) == 30
    assert not any(row in train for row in held_out)


def test_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    assert sorted(order(100, seed=1, epoch=2)) == list(range(100))
    assert order(100, seed=1, epoch=2) == order(100, seed=1, epoch=2)
    assert len({tuple(order(100, seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


def test_order_is_pinned() -> None:
    # A change here reorders the data of every resumed run.
    assert order(8, seed=0, epoch=0) == [3, 2, 1, 6, 0, 7, 4, 5]
    assert order(1, seed=0, epoch=0) == [0]


def test_order_is_uniform() -> None:
    seen = Counter(tuple(order(3, seed=s, epoch=0)) for s in range(1200))
    assert len(seen) == 6 and min(seen.values()) > 150


def test_take_runs_through_the_epochs_from_any_cursor() -> None:
    whole = take(5, seed=3, start=0, count=17)
    assert [epoch for epoch, _ in whole] == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 2
    assert [row for _, row in whole[5:10]] == order(5, seed=3, epoch=1)
    assert take(5, seed=3, start=7, count=6) == whole[7:13]
    assert take(5, seed=3, start=7, count=0) == []
    with pytest.raises(ValueError, match="n_rows=0"):
        take(0, seed=3, start=0, count=1)
    with pytest.raises(ValueError, match="seed=-1"):
        take(5, seed=-1, start=0, count=1)
