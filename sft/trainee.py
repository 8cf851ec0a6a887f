"""The model being fine-tuned: what it computes, and how it is spread over processes."""

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.fp8.linear import use_fp8
from runtime.adapters import add_adapters, load_adapters
from runtime.distributed import World
from runtime.errors import UserError
from runtime.models import mtp_layer
from runtime.packed import Packed, Targets, decoder_layers, logprobs_to_sum
from runtime.sharding import DistributedModel
from sft.config import SFTConfig


class Trainee(DistributedModel):
    """A causal LM that gives the log-probs of targets."""

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
        if tokenizer.eos_token_id is None:
            raise UserError(f"model={config.model!r}: its tokenizer has no end token, so no answer could end")
        largest = max(tokenizer.get_vocab().values())
        if largest >= model.config.vocab_size:
            raise UserError(
                f"model={config.model!r}: its tokenizer has ids up to {largest}, its vocab_size is "
                f"{model.config.vocab_size}: this is another model's tokenizer, or the embeddings were not resized"
            )
        sharded = world.size > 1 and config.shard
        model = model if sharded else model.to(world.device)
        if config.fp8:
            if not isinstance(model, DeepseekV3ForCausalLM):
                raise UserError(f"fp8=True: model={config.model!r} is no DeepSeek-V3; leave it out")
            use_fp8(model, "train")
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        super().__init__(model if config.lora is None else add_adapters(model, config.lora, config.seed), world)
        self.config, self.tokenizer = config, tokenizer
        if adapters is not None:
            load_adapters(self.model, adapters)
        mtp = mtp_layer(self.model)
        if mtp is None and config.mtp_loss:
            raise UserError(
                f"mtp_loss={config.mtp_loss}: model={config.model!r} has no MTP layer, by num_nextn_predict_layers in "
                "its config.json; set mtp_loss to 0"
            )
        if mtp is not None and not config.mtp_loss:
            mtp.requires_grad_(False)  # no gradient, and so no weight decay
        if config.compile:
            for layer in decoder_layers(self.model):
                layer.compile()
        if sharded:
            self.shard()

    def logprobs(
        self, packed: Packed, targets: Targets, further: Targets | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """log π(target), (C,) fp32, to be added up; and the same of `further` by the MTP layer, if asked for."""
        return self(logprobs_to_sum, packed, targets, further)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.parameters() if p.requires_grad]
