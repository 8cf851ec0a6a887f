"""verl's contract: what `compute_score` returns, and verl's own reward managers calling it."""

import asyncio
import importlib.util
import json
from typing import Any

import pytest

from rewards.verl import compute_score, kind_of, read_tests

RIGHT, WRONG = r"<think>10+8</think>\boxed{18}", r"<think>10+8</think>\boxed{19}"
DOUBLE = "```python\nprint(2 * int(input()))\n```"
needs_verl = pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")


@pytest.mark.parametrize(
    ("response", "gold", "score", "unknown", "pred"),
    [
        (RIGHT, "18", 1.0, 0.0, "18"),
        (WRONG, "18", 0.0, 0.0, "19"),
        ("<think>10+8", "18", 0.0, 0.0, ""),
        ("10 + 8 = 18\n#### 18", "18", 1.0, 0.0, "18"),
        (RIGHT, 18, 1.0, 0.0, "18"),
        (RIGHT, "", 0.0, 1.0, "18"),  # no gold: nobody can say
    ],
)
def test_maths_is_graded_against_the_gold(response: str, gold: object, score: float, unknown: float, pred: str) -> None:
    result = compute_score("openai/gsm8k", response, gold)
    assert result.pop("reason")
    assert result == {"score": score, "acc": score, "unknown": unknown, "pred": pred}


def test_a_scalar_of_a_data_frame_is_a_gold() -> None:
    numpy = pytest.importorskip("numpy")
    assert compute_score("math", RIGHT, numpy.int64(18))["score"] == 1.0
    assert compute_score("math", RIGHT, numpy.float64(19))["score"] == 0.0


@pytest.mark.parametrize(
    ("ground_truth", "tests"),
    [
        ({"inputs": ["1\n"], "outputs": ["2\n"]}, [{"input": "1\n", "output": "2\n"}]),
        (
            {"inputs": ["1\n[2]", [3, 4]], "outputs": ["3", [7]], "fn_name": "f"},
            [{"call": "f", "args": [1, [2]], "output": 3}, {"call": "f", "args": [3, 4], "output": [7]}],
        ),
        ({"assert_case": ["assert f(1) == 2"]}, [{"assert": "assert f(1) == 2"}]),
        ([{"assert": "assert f(1) == 2"}], [{"assert": "assert f(1) == 2"}]),
    ],
)
def test_tests_come_as_verl_or_we_write_them(ground_truth: Any, tests: list[dict[str, Any]]) -> None:
    assert read_tests(ground_truth) == read_tests(json.dumps(ground_truth)) == tests


def test_code_is_run_against_its_tests() -> None:
    result = compute_score("codeforces", DOUBLE, json.dumps({"inputs": ["3\n"], "outputs": ["6\n"]}))
    if result["reason"] == "sandbox-unavailable":
        pytest.skip("this machine can't isolate programs: see python -m rewards doctor")
    assert result == {"score": 1.0, "acc": 1.0, "unknown": 0.0, "reason": "passed", "pred": ""}
    assert compute_score("codeforces", DOUBLE, {"inputs": ["3\n"], "outputs": ["7\n"]})["score"] == 0.0


@pytest.mark.parametrize(
    "tests", ["{", "[]", "3", "null", '{"inputs": ["1"]}', '{"inputs": ["3"], "outputs": ["6", "7"]}']
)
def test_tests_that_cannot_be_read_are_unknown(tests: str) -> None:
    result = compute_score("apps", DOUBLE, tests)
    assert (result["score"], result["unknown"], result["reason"]) == (0.0, 1.0, "tests-unusable")


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("openai/gsm8k", "math"),
        ("lighteval/MATH", "math"),
        ("DigitalLearningGmbH/MATH-lighteval", "math"),
        ("math_dapo", "math"),
        ("aime2024", "math"),
        ("numina_olympiads", "math"),
        ("codecontests", "code"),
        ("taco", "code"),
        ("hiyouga/geometry3k", None),
        ("searchR1_nq", None),
    ],
)
def test_the_data_source_says_what_it_is(source: str, kind: str | None) -> None:
    assert kind_of(source) == kind


def test_the_row_goes_before_the_settings_and_both_before_the_name() -> None:
    assert compute_score("mine", RIGHT, "18", kind="math")["score"] == 1.0
    assert compute_score("mine", RIGHT, "18", {"kind": "math"}, kind="code")["score"] == 1.0
    assert compute_score("taco", RIGHT, "18", {"kind": "math", "num_turns": None})["score"] == 1.0
    with pytest.raises(ValueError, match="data_source='mine': give kind=math or kind=code"):
        compute_score("mine", RIGHT, "18")


class _Texts:
    """A tokenizer whose every id is a whole text."""

    eos_token = "</s>"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return "".join(self.texts[i] for i in ids)


@needs_verl
@pytest.mark.parametrize("manager", ["naive", "dapo"])
def test_verl_loads_it_and_scores_with_it(manager: str) -> None:
    """`load_reward_manager` from the configuration a run has, then its manager on padded responses."""
    import torch
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.reward import load_reward_manager

    config = OmegaConf.create(
        {
            "reward": {
                "custom_reward_function": {"path": "pkg://rewards.verl", "name": "compute_score"},
                "reward_manager": {"source": "register", "name": manager},
                "reward_kwargs": {},
            }
        }
    )
    loaded = load_reward_manager(config, _Texts(["", RIGHT, WRONG, "<think>"]))
    sources = ["openai/gsm8k", "lighteval/MATH", "math_dapo"]
    golds = ["18", "18", ""]

    def row(i: int) -> Any:
        return DataProto.from_dict(
            tensors={
                "prompts": torch.zeros(1, 2, dtype=torch.long),
                "responses": torch.tensor([[i + 1, 0]]),
                "attention_mask": torch.tensor([[1, 1, 1, 0]]),
            },
            non_tensors={
                "data_source": [sources[i]],
                "reward_model": [{"ground_truth": golds[i]}],
                "extra_info": [{}],
            },
        )

    results = [loaded.loop.run_until_complete(loaded.run_single(row(i))) for i in range(3)]
    assert [result["reward_score"] for result in results] == [1.0, 0.0, 0.0]
    extra = [result["reward_extra_info"] for result in results]
    assert [info["unknown"] for info in extra] == [0.0, 0.0, 1.0]
    assert [set(info) for info in extra] == [{"score", "acc", "unknown", "reason", "pred"}] * 3


@needs_verl
def test_verls_validation_metrics_take_what_it_returns() -> None:
    from verl.trainer.ppo.metric_utils import process_validation_metrics

    results = [compute_score("openai/gsm8k", response, "18") for response in (RIGHT, RIGHT, WRONG, WRONG)]
    infos = {key: [result[key] for result in results] for key in results[0]}
    metrics = process_validation_metrics(["gsm8k"] * 4, ["a", "a", "b", "b"], infos)["gsm8k"]
    assert metrics["acc"]["mean@2"] == 0.5 and metrics["unknown"]["mean@2"] == 0.0


def test_it_can_be_called_from_verls_threads() -> None:
    async def calls() -> list[dict[str, Any]]:
        loop = asyncio.get_running_loop()
        rows = [RIGHT, WRONG] * 20
        return await asyncio.gather(
            *(loop.run_in_executor(None, compute_score, "math", response, "18") for response in rows)
        )

    assert [result["score"] for result in asyncio.run(calls())] == [1.0, 0.0] * 20
