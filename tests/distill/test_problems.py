"""Sources -> problems: what is kept, what is set aside, and that GSM8K's own splits are seen to overlap."""

import json
from pathlib import Path

import pytest

from distill.contamination import Benchmarks
from distill.problems import CONTAMINATED, NEAR, SAME, SAME_ID, ProblemsConfig, load_problems
from runtime.errors import UserError

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's files in {GSM8K}")

LONG = "A farmer keeps hens in two sheds and sells a third of all the eggs they lay every week at the market in town"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: Path, *rows: object, **settings: object) -> ProblemsConfig:
    return ProblemsConfig(path=write(path, *rows), **{"domain": "math", **settings})


def test_a_row_becomes_a_problem_with_all_it_had(tmp_path: Path) -> None:
    rows = [
        {"id": 7, "prompt": "2 + 2?", "answer": 4, "tests": [1], "response": "four"},
        {"question": "Half of 8?", "answer": "8 / 2 = 4\n#### 4"},
        {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}], "domain": "talk"},
        {"problem": "3 + 3?", "answer": "6", "solution": "It is 6."},
        {"prompt": "5 + 5?", "gold": "10"},
    ]
    kept = load_problems([source(tmp_path / "rows.jsonl", *rows)]).kept
    assert [p.position for p in kept] == [0, 1, 2, 3, 4]
    assert [p.answer for p in kept] == ["4", "4", "", "6", "10"]
    assert [p.response for p in kept] == ["four", "8 / 2 = 4", "Hi!", "It is 6.", None]
    assert kept[0].id == "7" and kept[0].columns == {"tests": [1]}
    assert kept[2].prompt == [{"role": "user", "content": "Hello"}] and kept[2].domain == "math"
    assert load_problems([source(tmp_path / "own.jsonl", rows[2], domain=None)]).kept[0].domain == "talk"


def test_an_id_is_the_prompts_and_stays_the_same(tmp_path: Path) -> None:
    a, b = load_problems([source(tmp_path / "a.jsonl", {"prompt": "1 + 1?"}, {"prompt": "1 + 2?"})]).kept
    again = load_problems([source(tmp_path / "b.jsonl", {"prompt": "1 + 2?", "answer": "3"})]).kept[0]
    assert a.id != b.id == again.id


def test_bad_rows_are_set_aside_with_line_and_reason(tmp_path: Path) -> None:
    good = {"prompt": "1 + 1?"}
    rows = ["not json\n", {"answer": "no prompt"}, good, {"prompt": "x", "id": [1]}, {"prompt": "y", "response": 3}]
    rows += [
        {"prompt": [{"role": "assistant", "content": "I begin"}]},
        {"messages": "no list"},
        {"prompt": "z", "id": True},
    ]
    problems = load_problems([source(tmp_path / "rows.jsonl", *rows)])
    assert len(problems.kept) == 1
    assert [(aside.line, aside.reason) for aside in problems.aside] == [
        (1, "broken JSON"),
        (2, "no prompt, question or problem"),
        (4, "id is of type list, not a string or a number"),
        (5, "the original response is of type int, not a string"),
        (6, "the prompt doesn't end with the user's turn"),
        (7, "messages is not a list of messages"),
        (8, "id is of type bool, not a string or a number"),
    ]


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is left to answer: 1 × no domain"):
        load_problems([source(tmp_path / "rows.jsonl", {"prompt": "1 + 1?"}, domain=None)])


def test_what_came_before_is_set_aside_across_sources(tmp_path: Path) -> None:
    first = source(
        tmp_path / "a.jsonl", {"id": "a", "prompt": "What is 3 + 5?"}, {"id": "b", "prompt": "What is 3 - 5?"}
    )
    second = source(
        tmp_path / "b.jsonl",
        {"id": "c", "prompt": "what  is 3 + 5"},
        {"id": "b", "prompt": "What is 8 + 5?"},
        {"id": "d", "prompt": "What is 8 + 5?"},
    )
    problems = load_problems([first, second])
    assert [p.id for p in problems.kept] == ["a", "b", "d"]
    assert [(a.line, a.reason, a.detail) for a in problems.aside] == [(1, SAME, "a"), (2, SAME_ID, "b")]


def test_near_duplicates_need_the_same_numbers(tmp_path: Path) -> None:
    texts = [f"{LONG}. They lay 90 eggs.", f"{LONG}. They lay 90 eggs!! Really.", f"{LONG}. They lay 60 eggs."]
    rows = [{"id": i, "prompt": text} for i, text in enumerate(texts)]
    problems = load_problems([source(tmp_path / "rows.jsonl", *rows)], likeness=0.8)
    assert [p.id for p in problems.kept] == ["0", "2"]
    assert [(a.line, a.reason, a.detail) for a in problems.aside] == [(2, NEAR, "0, likeness 0.96")]
    assert len(load_problems([source(tmp_path / "rows.jsonl", *rows)], likeness=0.99).kept) == 3
    assert len(load_problems([source(tmp_path / "rows.jsonl", *rows)]).kept) == 3


def test_a_benchmarks_words_are_found_wherever_they_stand(tmp_path: Path) -> None:
    benchmark = write(tmp_path / "bench.jsonl", {"prompt": "Short one?"}, {"prompt": f"{LONG}. How many are left?"})
    rows = [
        {"prompt": f"Think hard: {LONG.upper()}, or so."},
        {"prompt": "short ONE"},
        {"prompt": "Is this a short one?"},
        {"prompt": " ".join(LONG.split()[:7])},
    ]
    problems = load_problems([source(tmp_path / "rows.jsonl", *rows)], benchmarks=Benchmarks([benchmark], n=8))
    assert [p.prompt[0]["content"] for p in problems.kept] == [row["prompt"] for row in rows[2:]]
    assert [(a.line, a.reason) for a in problems.aside] == [(1, CONTAMINATED), (2, CONTAMINATED)]
    assert problems.aside[0].detail == f"{benchmark}:2: a farmer keeps hens in two sheds and"
    assert problems.aside[1].detail == f"{benchmark}:1: short one"


def test_a_hit_names_the_first_place_and_reads_the_users_words_only(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Answer in one word and never say anything else"}
    asked = [[system, {"role": "user", "content": f"{LONG}. {n}"}] for n in range(2)]
    benchmarks = Benchmarks([write(tmp_path / "bench.jsonl", *({"prompt": prompt} for prompt in asked))], n=8)
    hit = benchmarks.hit(LONG)
    assert hit is not None and hit.line == 1
    assert benchmarks.hit(system["content"]) is None


def test_no_more_rows_are_read_than_asked(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n} + 1?"} for n in range(5)]
    assert len(load_problems([source(tmp_path / "rows.jsonl", *rows, max_rows=2)]).kept) == 2


def test_a_benchmark_without_problems_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench\.jsonl' holds no problem"):
        Benchmarks([write(tmp_path / "bench.jsonl", {"text": "?"})], n=8)


@needs_gsm8k
def test_gsm8ks_train_split_repeats_its_test_split_in_four_places() -> None:
    # Read by hand: each shares most of a sentence with a problem of the test split.
    problems = load_problems(
        [ProblemsConfig(path=str(GSM8K / "train.jsonl"), domain="math")],
        benchmarks=Benchmarks([str(GSM8K / "test.jsonl")], n=13),
    )
    assert [a.line for a in problems.aside if a.reason == CONTAMINATED] == [21, 407, 1315, 5163]
    assert len(problems.kept) == 7473 - 4
    copied = load_problems(
        [ProblemsConfig(path=str(GSM8K / "test.jsonl"), domain="math"), ProblemsConfig(path="stories", domain="math")],
        benchmarks=Benchmarks([str(GSM8K / "test.jsonl")], n=13),
    )
    assert copied.reasons[CONTAMINATED] == 1319 and len(copied.kept) == 12_000 - copied.reasons[SAME]
