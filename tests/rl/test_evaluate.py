"""Held-out accuracy: pass@k counted out by hand, unknown grades left out, and what counts as thinking."""

import math
from itertools import combinations

import pytest

from rl.evaluate import evaluate, thinks
from rl.prompts import make_source
from rl.score import Scorer
from runtime.rows import Rows
from runtime.statistics import wilson
from sampling.protocol import Completion, SamplingParams

RIGHT, WRONG = r"<think>1+1</think>\boxed{2}", r"\boxed{3}"


class Reciter:
    """A sampler that says what it was given, in order."""

    version = 0

    def __init__(self, tokenizer, texts: list[list[str]]) -> None:
        self.tokenizer, self.texts = tokenizer, texts

    def load(self, weights, *, version):
        return {}

    def sample(self, prompts, params, *, seeds):
        assert len(seeds) == len(prompts) == len(self.texts) and all(len(row) == params.n for row in self.texts)
        return [[self.completion(text) for text in row] for row in self.texts]

    def completion(self, text: str) -> Completion:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        cut = not text.endswith("}")
        ids = ids if cut else [*ids, self.tokenizer.eos_token_id]
        return Completion(ids=ids, logprobs=[0.0] * len(ids), finish_reason="length" if cut else "stop", version=0)

    def score(self, sequences):
        return [[0.0] * (len(s) - 1) for s in sequences]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def scorer():
    with Scorer({"accuracy": 1.0, "format": 0.0}) as scorer:
        yield scorer


@pytest.fixture
def grade(tokenizer, scorer):
    def grade(texts: list[list[str]], *, golds: list[str] | None = None, k=(1,)):
        golds = golds or ["2"] * len(texts)
        rows = Rows(source="given")
        rows.extend({"prompt": [{"role": "user", "content": "1+1?"}], "answer": gold} for gold in golds)
        prompts = make_source(rows, tokenizer, seed=0, max_prompt_tokens=99).first(len(texts))
        params = SamplingParams(n=len(texts[0]), max_tokens=40)
        return evaluate(Reciter(tokenizer, texts), prompts, params, tokenizer, scorer, k=k)

    return grade


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(grade):
    patterns = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]
    evaluation = grade([[RIGHT if right else WRONG for right in row] for row in patterns], k=(2, 3, 4))
    for k in (1, 2, 3, 4):
        per_problem = [sum(any(draw) for draw in combinations(row, k)) / math.comb(4, k) for row in patterns]
        assert evaluation.pass_at[k].mean == pytest.approx(sum(per_problem) / 4, rel=1e-12)
        low, high = wilson(evaluation.pass_at[k].mean, 4)
        assert (evaluation.pass_at[k].low, evaluation.pass_at[k].high) == (low, high)
    assert evaluation.accuracy is evaluation.pass_at[1]
    assert (evaluation.problems, evaluation.unknown) == (4, 0)


def test_what_nobody_could_grade_counts_neither_way(grade):
    evaluation = grade([[RIGHT], [WRONG], [RIGHT]], golds=["2", "2", ""])
    assert (evaluation.problems, evaluation.unknown) == (2, 1)
    assert evaluation.accuracy.mean == 0.5
    assert (evaluation.accuracy.low, evaluation.accuracy.high) == wilson(0.5, 2)


def test_when_nothing_is_gradable_accuracy_is_unknown_and_the_run_goes_on(grade):
    evaluation = grade([[RIGHT]], golds=[""])
    assert (evaluation.problems, evaluation.unknown) == (0, 1)
    assert math.isnan(evaluation.accuracy.mean)


def test_k_beyond_the_samples_has_no_estimate(grade):
    evaluation = grade([[RIGHT, WRONG]], k=(3,))
    assert math.isnan(evaluation.pass_at[3].mean) and evaluation.accuracy.mean == 0.5


def test_habits_are_shares_of_completions(grade, tokenizer):
    texts = [[RIGHT, WRONG], [r"<think></think>\boxed{2}", "<think>on and"]]
    evaluation = grade(texts)
    assert evaluation.thinking == 0.5 and evaluation.truncated == 0.25 and evaluation.accuracy.mean == 0.5
    lengths = [len(tokenizer(t, add_special_tokens=False)["input_ids"]) + t.endswith("}") for row in texts for t in row]
    assert evaluation.mean_length == sum(lengths) / 4
    assert [group.texts for group in evaluation.groups] == texts
    assert [group.parts["accuracy"] for group in evaluation.groups] == [[1.0, 0.0], [1.0, 0.0]]
    assert evaluation.format == 0.5


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>2+2=4</think>4", True),
        ("<think></think>4", False),
        ("<think> \n</think>4", False),
        ("<think>cut off in the mid", True),
        ("<think>", False),
        ("2+2=4</think>4", False),
        ("no tags, though it works 2+2", False),
        ("so <think>late</think>", True),
        ("<think></think><think>second</think>", False),
        ("", False),
    ],
)
def test_thinking_is_something_behind_the_first_think_tag(text, expected):
    assert thinks(text) is expected
