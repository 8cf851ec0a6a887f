"""TRL's rewards in our scorer, and our rewards in TRL's trainer."""

import copy
from pathlib import Path
from typing import Any

import pytest

from rewards.math_answer import accuracy
from rewards.tag_format import format_reward
from rl.score import Scorer

trl_rewards = pytest.importorskip("trl.rewards", reason="TRL is not installed")


def test_trl_rewards_give_the_same_in_our_scorer_as_called_directly() -> None:
    texts = ["<think>a</think>b", "<think>a", "<think><think>a</think>b"]
    talk = [[{"role": "assistant", "content": text}] for text in texts]
    ids = [[0] * 10, [0] * 95, [0] * 200]
    punish = trl_rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    with Scorer({trl_rewards.think_format_reward: 1.0, punish: 0.5, "trl.rewards.think_format_reward": 0.0}) as scorer:
        scores = scorer.score(["p"] * 3, talk, ids)
    assert scores.unknown == []
    assert scores.parts["think_format_reward"] == trl_rewards.think_format_reward(talk) == [1.0, 0.0, 0.0]
    assert scores.parts["trl.rewards.think_format_reward"] == [1.0, 0.0, 0.0]
    assert scores.parts["soft_overlong_punishment_reward"] == punish(completion_ids=ids) == [0.0, -0.75, -1.0]


@pytest.mark.slow
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

    answers = [r"<think></think>\boxed{3}", r"<think></think>\boxed{4}", r"\boxed{3}", "3"]
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
    calls: list[tuple[dict[str, Any], list[float | None]]] = []

    def recorder(**arguments: Any) -> list[float]:
        kept = {
            k: copy.deepcopy(v) for k, v in arguments.items() if k not in ("trainer_state", "log_extra", "log_metric")
        }
        calls.append((kept, accuracy(**arguments)))
        return [0.0] * len(arguments["completions"])

    prompt = [{"role": "user", "content": "Q"}] if conversational else "Q"
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[accuracy, format_reward, recorder],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=16,
            num_generations=16,
            max_completion_length=1,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "answer": "3"}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()

    logged = [log for log in trainer.state.log_history if "rewards/accuracy/mean" in log]
    assert len(logged) == 2 and len(calls) == 2
    assert all("rewards/format_reward/mean" in log for log in logged)
    for log, (arguments, direct) in zip(logged, calls, strict=True):
        assert {0.0, 1.0} == set(direct)
        assert log["rewards/accuracy/mean"] == pytest.approx(sum(filter(None, direct)) / 16)
        with Scorer({"accuracy": 1.0, "format": 1.0}) as scorer:
            given = [arguments.pop(name) for name in ("prompts", "completions", "completion_ids")]
            scores = scorer.score(*given, arguments)
        assert scores.parts["accuracy"] == direct
        assert log["rewards/format_reward/mean"] == pytest.approx(sum(scores.parts["format"]) / 16)
