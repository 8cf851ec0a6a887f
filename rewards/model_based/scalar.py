"""A checkpoint with one output and a batch of responses -> a number each, the same in whatever company they come.

The text that is scored is prompt, response, end token, and, if one is given, a judgement (the reasoning about this
response, after DeepSeek-V3's report, 5.2.1) with an end token of its own; the score is read at the end. Control tokens
spelt out in a response stay text (sft/chat.py), so a response can't forge its judgement. Training: recipes/
reward_model.py, which encodes by `encode` too. Only safetensors are loaded, and no remote code.
As a reward: `rewards.model_based.scalar:reward(source=CHECKPOINT)`, or a YAML file of `RewardModelConfig`.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

from rewards.completions import after_thinking, text_of
from rewards.model_based.backends import Endpoint, connect
from rewards.model_based.judge import judgements
from rewards.model_based.settings import read_settings

Part = Literal["whole", "answer"]
READING = "reading.json"
"""The file beside the weights that says how texts were read in training; reward models of others have none."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a reward model reads a response; saved with it, so that it is scored as it was trained."""

    part: Part = "whole"
    """What of a response is read: all of it, or what follows the reasoning (R1 scores helpfulness so)."""
    judgements: bool = False
    """Whether it has learnt to read judgements."""
    max_length: int | None = None
    """Longest text, tokens. None: as long as the model's positions reach."""


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A reward model to score by."""

    model: str
    """Checkpoint folder or hub name, with one output."""
    device: str = "auto"
    """torch's name of a device; "auto": a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What to compute in; "auto": float32 on a CPU, else bfloat16."""
    batch_tokens: int = 16_384
    """Tokens of a forward pass, padding included."""
    critic: Endpoint | None = None
    """Who writes the judgement of each response before it is scored. None: scored without one."""

    def __post_init__(self) -> None:
        if self.batch_tokens < 1:
            raise ValueError(f"batch_tokens={self.batch_tokens}: give a positive number")


def reward(source: str) -> Callable[..., list[float | None]]:
    """The reward function of a checkpoint folder or of a YAML file of `RewardModelConfig`; loads the model now.

    Its values are the model's own, on no fixed scale. None: a text too long for it, or a judgement nobody could write.
    """
    yaml = source.endswith((".yaml", ".yml"))
    config = read_settings(source, RewardModelConfig) if yaml else RewardModelConfig(model=source)
    scorer = RewardModel.load(config)
    critic = connect(config.critic) if config.critic else None
    if critic and not scorer.reading.judgements:
        raise ValueError(
            f"critic: {config.model} has not learnt to read judgements; train it on some, or leave this out"
        )

    def reward_model(prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float | None]:
        texts = [text_of(completion) for completion in completions]
        written = judgements(critic, prompts, texts) if critic else None
        return scorer.score(prompts, texts, written)

    return reward_model


class RewardModel:
    """A sequence classifier of one output, its tokenizer, and how it reads."""

    def __init__(
        self, model: Any, tokenizer: Any, *, reading: Reading | None = None, batch_tokens: int = 16_384
    ) -> None:
        """model: a transformers sequence classifier; it is scored as it stands, on its device."""
        self.model, self.tokenizer = model, tokenizer
        self.reading = reading or Reading()
        self.batch_tokens = batch_tokens
        self.max_length = self.reading.max_length or model.config.max_position_embeddings
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        model.config.pad_token_id = tokenizer.pad_token_id  # by it transformers finds a text's last token

    @classmethod
    def load(cls, config: RewardModelConfig) -> Self:
        """Raises ValueError where there is no reward model: nothing to load, no safetensors, or not one output."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        dtype = config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                config.model, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(config.model)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"model={config.model!r}: can't be loaded: {str(error).strip().splitlines()[0]}"
            ) from error
        if report["missing_keys"] or model.config.num_labels != 1:
            why = (
                f"it has no {sorted(report['missing_keys'])[0]}" if report["missing_keys"] else "it has several outputs"
            )
            raise ValueError(
                f"model={config.model!r} is no reward model: {why}; train one: python -m recipes.reward_model"
            )
        file = Path(config.model) / READING
        reading = Reading(**json.loads(file.read_text())) if file.is_file() else Reading()
        return cls(model.to(device).eval(), tokenizer, reading=reading, batch_tokens=config.batch_tokens)

    def save(self, folder: Path) -> None:
        """Write what `load` reads."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / READING).write_text(json.dumps(asdict(self.reading)) + "\n")

    def encode(self, prompt: Any, response: str, judgement: str | None = None) -> list[int]:
        """Ids of one text to score: a prompt (text or messages), a whole response, and what was judged of it."""
        if judgement is not None and not self.reading.judgements:
            raise ValueError("judgement: this reward model has not learnt to read any")
        return encode(self.tokenizer, prompt, response, judgement, part=self.reading.part)

    def score(
        self, prompts: Sequence[Any], responses: Sequence[str], written: Sequence[str | None] | None = None
    ) -> list[float | None]:
        """A number for each response; None where it is too long, where it isn't finite, or where `written` is None.

        written: judgements, one for each response. Not given: the responses are scored without.
        """
        texts: dict[int, list[int]] = {}
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            if written is None or written[i] is not None:
                ids = self.encode(prompt, response, None if written is None else written[i])
                if len(ids) <= self.max_length:
                    texts[i] = ids
        scores: list[float | None] = [None] * len(responses)
        for batch in batches({i: len(ids) for i, ids in texts.items()}, self.batch_tokens):
            for i, score in zip(batch, self._forward([texts[i] for i in batch]), strict=True):
                scores[i] = score if math.isfinite(score) else None
        return scores

    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        import torch

        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        device = self.model.device
        ids_BT = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
        mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with torch.inference_mode():
            logits_B1 = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        return [float(score) for score in logits_B1.squeeze(-1).float().tolist()]


def encode(
    tokenizer: Any, prompt: Any, response: str, judgement: str | None = None, *, part: Part = "whole"
) -> list[int]:
    """Ids of prompt, response and end token, then of the judgement and an end token if there is one.

    part "answer": what follows the reasoning; of a response that never gets there, nothing.
    """
    from sft.chat import encode_example

    if part == "answer":
        response = (after_thinking(response) or "").strip()
    ids, _ = encode_example(tokenizer, prompt, response)
    if judgement is not None:
        added, completes = encode_example(tokenizer, "", judgement)
        ids += [i for i, trained in zip(added, completes, strict=True) if trained]
    return ids


def batches(lengths: Mapping[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Keys in groups of similar length whose padded size is at most `batch_tokens`, or of one key; longest first."""
    batch: list[int] = []
    for key in sorted(lengths, key=lambda k: -lengths[k]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(key)
    if batch:
        yield batch
