"""The model being trained, and the reference it may be held to."""

import contextlib
import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.fp8.linear import use_fp8
from rl.config import GRPOConfig
from rl.types import Batch
from runtime.adapters import ADAPTER, add_adapters, load_adapters
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import load_causal_lm, load_tokenizer, mtp_layer
from runtime.packed import decoder_layers, logprobs_at, plain_model, score_sequences
from runtime.sharding import DistributedModel
from runtime.state import load_state
from runtime.weights import checkpoint_views

REFERENCE = "reference"
"""Files of a checkpoint that hold the reference."""


class Policy:
    """π_θ: the trained model with its tokenizer, and π_ref when the loss wants one."""

    def __init__(
        self, config: GRPOConfig, world: World, model: Path | str | None = None, *, checkpoint: Path | None = None
    ) -> None:
        """Load `model` (default: `config.model`); with LoRA, freeze it and add adapters. Shard as `config` says.

        checkpoint: of a run that goes on; the adapters, or a reference that was replaced, are taken from there.
        """
        self.config, self.world = config, world
        path = config.model if model is None else model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(path)
        sharded = world.size > 1 and config.shard
        base = load_causal_lm(path)
        base = base if sharded else base.to(world.device)
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
        policy = base if config.lora is None else add_adapters(base, config.lora, config.seed)
        if (mtp := mtp_layer(policy)) is not None:
            mtp.requires_grad_(False)
        policy.eval()  # no dropout: π_old and π_θ must be the same function
        if config.gradient_checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in decoder_layers(policy):
                layer.training = True  # of the block alone, which asks for it; what is in there may have dropout
        if config.lora is not None and checkpoint is not None:
            load_adapters(policy, checkpoint / ADAPTER)
        self.trained = DistributedModel(policy, world)
        self.reference: DistributedModel | None = None
        if config.loss.beta > 0 and config.lora is None:
            self.reference = self._frozen_copy(None if checkpoint is None else load_state(checkpoint, REFERENCE))
        if sharded:
            for spread in filter(None, (self.trained, self.reference)):
                spread.shard()

    @property
    def model(self) -> nn.Module:
        """The model being trained, with its adapters if it has any; its weights are parts if it is sharded."""
        return self.trained.model

    @property
    def is_plain(self) -> bool:
        """Whether `causal_lm` is whole and without adapters."""
        return self.config.lora is None and not self.trained.is_sharded

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The transformers model, under the adapters if there are any."""
        return plain_model(self.model)

    def logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """log π_θ and entropy of the trained tokens at the sampling temperature, (C,) each."""
        return self._logprobs(self.trained, batch)

    @torch.no_grad()
    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """log π_ref (C,), or None at β = 0. Under LoRA the reference is the model with its adapters off."""
        if self.config.loss.beta == 0:
            return None
        off = contextlib.nullcontext() if self.reference else self.model.disable_adapter()  # type: ignore[operator]
        with off:
            return self._logprobs(self.reference or self.trained, batch)[0]

    def _logprobs(self, model: DistributedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        temperature = self.config.sampling.temperature
        with self.world.autocast():
            return model(logprobs_at, batch.packed, batch.states_C, batch.targets_C, temperature=temperature)

    @torch.no_grad()
    def replace_reference(self) -> None:
        """Make the frozen reference the policy as it is now."""
        assert self.reference is not None
        self.reference.release()
        self.trained.release()
        for held, now in zip(_tensors(self.reference), _tensors(self.trained), strict=True):
            held.copy_(now)

    def _frozen_copy(self, saved: Mapping[str, Tensor] | None) -> DistributedModel:
        """The policy as it is, with the weights `saved` if there are any."""
        model = copy.deepcopy(self.model).requires_grad_(False)
        if saved is not None:
            for name, tensor in checkpoint_views(model).items():
                tensor.copy_(saved[name])
        if self.config.fp8 != "off":
            # FSDP2's weights come and go; codes of those are made at every pass.
            use_fp8(model, "train" if self.world.size > 1 and self.config.shard else "forward")
        return DistributedModel(model, self.world)

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """log π(token_t | before), t = 1.., at temperature 1: the trainer's side of the attestation."""
        with self.world.autocast():
            return self.trained(score_sequences, sequences)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers."""
    return itertools.chain(model.parameters(), model.buffers())
