"""TRL's rewards in our scorer, and our rewards in TRL's trainer."""

import copy
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rewards.code_tests import code_reward
from rewards.compose import compose
from rewards.language import language_reward
from rewards.length import length_reward
from rewards.math_answer import accuracy
from rewards.repetition import repetition_reward
from rewards.tag_format import format_reward, think_answer_format
from rl.score import Scorer

trl_rewards = pytest.importorskip("trl.rewards", reason="TRL is not installed")

TEXTS = ["<think>a</think>b", "<think>a", "<think><think>a</think>b"]
IDS = [[0] * 10, [0] * 95, list(range(200))]


def test_trl_rewards_give_the_same_in_our_scorer_as_called_directly() -> None:
    talk = [[{"role": "assistant", "content": text}] for text in TEXTS]
    punish = trl_rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    repeat = trl_rewards.get_repetition_penalty_reward(ngram_size=3)
    with Scorer(
        {trl_rewards.think_format_reward: 1.0, punish: 0.5, repeat: 1.0, "trl.rewards.think_format_reward": 0.0}
    ) as scorer:
        scores = scorer.score(["p"] * 3, talk, IDS)
    assert scores.unknown == []
    assert scores.parts["think_format_reward"] == trl_rewards.think_format_reward(talk) == [1.0, 0.0, 0.0]
    assert scores.parts["trl.rewards.think_format_reward"] == [1.0, 0.0, 0.0]
    assert scores.parts["soft_overlong_punishment_reward"] == punish(completion_ids=IDS) == [0.0, -0.75, -1.0]
    assert scores.parts["repetition_penalty_reward"] == repeat(completion_ids=IDS) == [-7 / 8, -92 / 93, 0.0]


def test_trl_makers_of_rewards_are_named_with_their_options() -> None:
    name = "trl.rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)"
    with Scorer({name: 1.0}) as scorer:
        assert scorer.score(["p"] * 3, TEXTS, IDS).total == [0.0, -0.75, -1.0]


def test_trl_accuracy_gives_the_same_in_our_scorer() -> None:
    pytest.importorskip("math_verify", reason="math-verify, which TRL's accuracy_reward calls, is not installed")
    talk = [[{"role": "assistant", "content": text}] for text in (r"\boxed{3}", r"\boxed{4}", "3")]
    with Scorer({"trl.rewards.accuracy_reward": 1.0}) as scorer:
        scores = scorer.score(["p"] * 3, talk, IDS, {"solution": ["$3$"] * 3})
    assert scores.parts["trl.rewards.accuracy_reward"] == trl_rewards.accuracy_reward(talk, solution=["$3$"] * 3)


@pytest.mark.parametrize("conversational", [False, True])
def test_our_rewards_run_in_trls_trainer_and_its_calls_score_the_same_here(
    conversational: bool, tmp_path: Path
) -> None:
    """Two steps of a random model whose every token is a whole answer, so rewards of 0 and 1 both come."""
    import torch
    from datasets import Dataset
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    answers = [
        r"<think>add them</think>\boxed{3}",
        r"<think></think>\boxed{4}",
        "<think>把它们相加</think><answer>3</answer>",
        "so so so so so so so so so so",
    ]
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": 1, "[EOS]": 2, "Q": 3}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.add_tokens([AddedToken(answer, normalized=False) for answer in answers])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]", padding_side="left"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
        )
    )
    ours = {
        "accuracy": accuracy,
        "code_reward": code_reward,
        "format_reward": format_reward,
        "think_answer_format": think_answer_format,
        "length_reward": partial(length_reward, max_tokens=4, buffer=4),
        "language_reward": language_reward,
        "repetition_reward": repetition_reward,
        "gated": compose({accuracy: 1.0, format_reward: 0.5}, gates={"format_reward": "accuracy"}, name="gated"),
    }
    calls: list[dict[str, Any]] = []

    def recorder(**arguments: Any) -> list[float]:
        own = ("trainer_state", "log_extra", "log_metric")
        calls.append(copy.deepcopy({name: value for name, value in arguments.items() if name not in own}))
        return [0.0] * len(arguments["completions"])

    prompt = [{"role": "user", "content": "Q"}] if conversational else "Q"
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[*ours.values(), recorder],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=128,
            num_generations=64,
            max_completion_length=1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": prompt, "answer": answer, "tests": [{"input": "", "output": "3\n"}]} for answer in ("3", None)]
        ),
        processing_class=tokenizer,
    )
    trainer.train()

    logged = [log for log in trainer.state.log_history if "rewards/accuracy/mean" in log]
    assert len(logged) == 2 and len(calls) == 2
    for log, arguments in zip(logged, calls, strict=True):
        with Scorer(dict.fromkeys(ours.values(), 1.0)) as scorer:
            given = [arguments.pop(name) for name in ("prompts", "completions", "completion_ids")]
            scores = scorer.score(*given, arguments)
        for name in ours:
            known = [value for value in scores.parts[name] if not math.isnan(value)]
            # TRL keeps values in fp32, and calls a mean of nothing NaN.
            mean = sum(known) / len(known) if known else math.nan
            assert log[f"rewards/{name}/mean"] == pytest.approx(mean, abs=1e-6, nan_ok=True), name
        # The prompt without a gold is unknown to both, and right and wrong were both sampled for the other.
        assert {str(value) for value in scores.parts["accuracy"]} == {"0.0", "1.0", "nan"}
        assert sum(map(math.isnan, scores.parts["gated"])) == sum(map(math.isnan, scores.parts["accuracy"])) == 64
        assert log["rewards/gated/mean"] == pytest.approx(1.5 * log["rewards/accuracy/mean"])
        assert {0.0, 1.0} == set(scores.parts["format_reward"]) == set(scores.parts["language_reward"])
        assert min(scores.parts["repetition_reward"]) < -0.5 and max(scores.parts["length_reward"]) == -0.25
