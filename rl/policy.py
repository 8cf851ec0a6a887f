"""The model being trained, and the reference it may be held to."""

import contextlib
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.fp8.linear import use_fp8
from rl.config import GRPOConfig
from rl.types import Batch
from runtime.adapters import add_adapters
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, load_tokenizer, mtp_layer
from runtime.packed import logprobs_at, plain_model, score_sequences
from runtime.weights import save_pretrained


class Policy:
    """π_θ: the trained model with its tokenizer, and π_ref when the loss wants one."""

    def __init__(self, config: GRPOConfig, world: World, model: Path | str | None = None) -> None:
        """Load `model` (default: `config.model`); with LoRA, freeze it and add adapters."""
        self.config, self.world = config, world
        path = config.model if model is None else model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        base = load_causal_lm(path).to(world.device)
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"model={config.model!r}: its tokenizer has no end token, so no completion could end")
        largest = max(self.tokenizer.get_vocab().values())
        if largest >= base.config.vocab_size:
            raise UserError(
                f"model={config.model!r}: its tokenizer has ids up to {largest}, its vocab_size is "
                f"{base.config.vocab_size}: this is another model's tokenizer, or the embeddings were not resized"
            )
        if config.fp8 != "off" and not isinstance(base, DeepseekV3ForCausalLM):
            raise UserError(f"fp8={config.fp8}: model={config.model!r} is no DeepSeek-V3; use off")
        if config.fp8 == "train":
            use_fp8(base, "train")
        self.model: nn.Module = base if config.lora is None else add_adapters(base, config.lora, config.seed)
        if (mtp := mtp_layer(self.model)) is not None:
            mtp.requires_grad_(False)
        self.model.eval()  # no dropout: π_old and π_θ must be the same function
        self.reference: nn.Module | None = None
        if config.loss.beta > 0 and config.lora is None:
            self.replace_reference()

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, under the adapters if there are any."""
        return plain_model(self.model)

    def logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log π_θ and entropy of the trained tokens at the sampling temperature, (C,) each."""
        return self._logprobs(self.model, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """log π_ref (C,), or None at β = 0. Under LoRA the reference is the model with its adapters off."""
        if self.config.loss.beta == 0:
            return None
        off = contextlib.nullcontext() if self.reference else self.model.disable_adapter()  # type: ignore[operator]
        with off:
            return self._logprobs(self.reference or self.model, batch)[0]

    def _logprobs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        temperature = self.config.sampling.temperature
        with self.world.autocast():
            return logprobs_at(model, batch.packed, batch.states_C, batch.targets_C, temperature=temperature)

    def replace_reference(self) -> None:
        """Freeze a copy of the policy as it is now."""
        self.reference = copy.deepcopy(self.model).requires_grad_(False)
        if self.config.fp8 != "off":
            use_fp8(self.reference, "forward")

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π(token_t | before), t = 1.., at temperature 1: the trainer's side of the attestation."""
        with self.world.autocast():
            return score_sequences(self.model, sequences)

    def save_pretrained(self, folder: Path) -> None:
        """Write a checkpoint that transformers and vLLM load as it is; adapters are merged in."""
        save_pretrained(folder, self.model, self.tokenizer)
