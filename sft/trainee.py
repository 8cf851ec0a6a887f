"""The model being fine-tuned: what it computes, how it is spread over processes, and the whole of it for saving."""

import copy
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.fp8.linear import use_fp8
from runtime.adapters import add_adapters
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import mtp_layer
from runtime.packed import Packed, Targets, logprobs_to_sum, plain_model
from runtime.sharding import is_sharded, shard, whole_state
from sft.config import SFTConfig


class Trainee(nn.Module):
    """A causal LM whose forward gives the log-probs of targets.

    A module of its own, and the root of FSDP2: inside its forward the head's weights are whole while the head runs in
    chunks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: SFTConfig,
        world: World,
        *,
        adapters: Path | None = None,
    ) -> None:
        """Adds adapters, compiles, shards, as `config` says. `model` is taken over, not copied.

        adapters: folder with the adapters' weights; by default they are new.
        """
        super().__init__()
        self.config, self.world, self.tokenizer = config, world, tokenizer
        if tokenizer.eos_token_id is None:
            raise UserError(f"model={config.model!r}: its tokenizer has no end token, so no answer could end")
        largest = max(tokenizer.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise UserError(
                f"model={config.model!r}: its tokenizer has ids up to {largest}, its vocab_size is "
                f"{model.config.vocab_size}: this is another model's tokenizer, or the embeddings were not resized"
            )
        model = model.to(world.device)
        if config.fp8:
            if not isinstance(model, DeepseekV3ForCausalLM):
                raise UserError(f"fp8=True: model={config.model!r} is no DeepSeek-V3; leave it out")
            use_fp8(model, "train")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        self.model: nn.Module = model if config.lora is None else add_adapters(model, config.lora, config.seed)
        if adapters is not None:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.model, load_peft_weights(str(adapters)))
        mtp = mtp_layer(self.model)
        if mtp is None and config.mtp_loss:
            raise UserError(
                f"mtp_loss={config.mtp_loss}: model={config.model!r} has no MTP layer, by num_nextn_predict_layers in "
                "its config.json; set mtp_loss to 0"
            )
        if mtp is not None and not config.mtp_loss:
            mtp.requires_grad_(False)  # no gradient, and so no weight decay
        layers: Any = plain_model(self.model).base_model.layers
        if config.compile:
            for layer in layers:
                layer.compile()
        self._skeleton: tuple[nn.Module, ...] = ()  # in a tuple: no part of what is sharded
        if world.size > 1 and config.shard:
            if world.is_main:
                self._skeleton = (_without_weights(self.model),)
            shard(self, layers, world)

    def forward(self, packed: Packed, targets: Targets, further: Targets | None = None) -> tuple[Tensor, Tensor | None]:
        """log π(target), (C,) fp32, to be added up; and the same of `further` by the MTP layer, if asked for."""
        return logprobs_to_sum(self.model, packed, targets, further)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.parameters() if p.requires_grad]

    def whole(self) -> nn.Module | None:
        """The model with whole weights; None but in the first process if it is sharded. All must call it."""
        if not is_sharded(self):
            return self.model
        state = whole_state(self)
        if not self._skeleton:
            return None
        model = copy.deepcopy(self._skeleton[0])
        model.load_state_dict({name.removeprefix("model."): t for name, t in state.items()}, strict=True, assign=True)
        return model

    def sum_gradients(self) -> None:
        """Over all processes; FSDP2 has done it already."""
        if not is_sharded(self):
            self.world.sum_gradients(self)


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy on the CPU whose parameters have no memory; buffers that no state dict holds (RoPE's) are as they were."""
    parts: dict[int, object] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    parts |= {id(b): b.cpu() for b in model.buffers()}
    return copy.deepcopy(model, memo=parts)
