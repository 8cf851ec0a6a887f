"""Token ids -> hidden states -> logits: DeepSeek-V3 as a transformers `PreTrainedModel`.

The config class, the parameter names and the checkpoint names are transformers' own, so transformers, vLLM and peft
load what this saves and this loads what they save. Inside, everything is packed: rows become one stream of T tokens
with `cu_seqlens`, padding is taken out before the first layer, and only what is asked for reaches the head.
The layer that predicts a second token (mtp.py), where the config has one, stands behind the others and runs only when
asked for. Left out: FP8, parallelism.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DeepseekV3Config, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from deepseek_v3.attention import RMSNorm
from deepseek_v3.block import Block
from deepseek_v3.moe import Experts, Router
from deepseek_v3.mtp import MTPBlock, next_embeddings, prediction_depth
from deepseek_v3.packing import Layout
from deepseek_v3.rope import cos_sin, cos_sin_scale, inverse_frequencies

# Checkpoints hold experts one by one, the model holds them fused. transformers converts between the two for its own
# V3; classes from elsewhere get the same conversion only if it's registered again by hand.
register_checkpoint_conversion_mapping("deepseek_v3", get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True)


class DeepseekV3PreTrainedModel(PreTrainedModel):
    config: DeepseekV3Config
    config_class = DeepseekV3Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "MTPBlock")
    _skip_keys_device_placement = ("past_key_values",)
    _supports_sdpa = True
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    def __init__(self, config: DeepseekV3Config, *args: Any, **kwargs: Any) -> None:
        # The MTP layer of a checkpoint may be left behind; its copies of embedding and head always are.
        ignored = r"(embed_tokens|shared_head\.head)\." if prediction_depth(config) else ""
        self._keys_to_ignore_on_load_unexpected = {rf"model\.layers\.{config.num_hidden_layers}\.{ignored}"}
        # vLLM takes V3's router only when config.json names it, and transformers doesn't write the names.
        config.topk_method, config.scoring_func = "noaux_tc", "sigmoid"
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=std)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


@dataclass
class Output(BaseModelOutputWithPast):
    """Hidden states (B, L, D), and those of the MTP layer."""

    mtp_hidden_state: Tensor | None = None


class DeepseekV3Model(DeepseekV3PreTrainedModel):
    """Embedding, blocks and final norm. Returns hidden states in the shape of the input."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        if prediction_depth(config):
            self.layers.append(MTPBlock(config, config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def blocks(self) -> list[Block]:
        """The main layers."""
        return cast(list[Block], list(self.layers)[: self.config.num_hidden_layers])

    @property
    def mtp(self) -> MTPBlock | None:
        """The layer that predicts a second token, if there is one."""
        return cast(MTPBlock, self.layers[-1]) if prediction_depth(self.config) else None

    def rope(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        frequencies = inverse_frequencies(self.config).to(positions.device)
        return cos_sin(positions, frequencies, cos_sin_scale(self.config), dtype=dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        cu_seqlens: Sequence[int] | None = None,
        layout: Layout | None = None,
        output_hidden_states: bool = False,
        output_mtp: bool = False,
        **_: Any,
    ) -> Output:
        """Ids (B, L) -> hidden states (B, L, D).

        cu_seqlens: boundaries [0, ..., B·L] of samples packed along the flattened rows; positions restart at each
            unless `position_ids` says otherwise. Excludes `attention_mask` and a cache.
        layout: instead of cu_seqlens, when some of the packed segments continue others.
        attention_mask: (B, L), or (B, S + L) with a cache of S; 0 marks padding. Padded positions return zeros.
        output_mtp: also return the states that predict the token after the next; of no use at a sample's last token.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        x_BLD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if attention_mask is not None and (attention_mask.dim() != 2 or bool(attention_mask.all())):
            if attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask has {attention_mask.dim()} dimensions: only (rows, tokens) masks; "
                    "pack samples with cu_seqlens instead of passing a block mask"
                )
            attention_mask = None
        if cu_seqlens is not None:
            layout = Layout(cu_seqlens)
        if use_cache or past_key_values is not None:
            if layout is not None:
                raise ValueError("cu_seqlens packs samples for training; it can't be combined with a cache")
            past_key_values = past_key_values if past_key_values is not None else DynamicCache()
            hidden = self._cached(x_BLD, attention_mask, position_ids, past_key_values)
            return Output(last_hidden_state=hidden, past_key_values=past_key_values)
        return self._packed(x_BLD, attention_mask, position_ids, layout, output_hidden_states, output_mtp)

    def _packed(
        self,
        x_BLD: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        layout: Layout | None,
        keep_states: bool,
        with_mtp: bool,
    ) -> Output:
        B, L, D = x_BLD.shape
        x_TD = x_BLD.reshape(B * L, D)
        kept: Tensor | None = None
        if attention_mask is not None:
            if layout is not None:
                raise ValueError("pass either attention_mask (padded rows) or cu_seqlens (packed rows)")
            kept = attention_mask.bool().flatten().nonzero()[:, 0]
            x_TD = x_TD[kept]
            lengths = attention_mask.bool().sum(1)
            layout = Layout([0, *lengths[lengths > 0].cumsum(0).tolist()])
        if layout is None:
            layout = Layout(range(0, B * L + 1, L))
        if position_ids is not None:
            positions = position_ids.expand(B, L).flatten()
            positions = positions if kept is None else positions[kept]
        else:
            positions = layout.positions(x_BLD.device) if kept is None else kept % L
        cos, sin = self.rope(positions, x_BLD.dtype)

        def in_rows(x: Tensor) -> Tensor:
            if kept is not None:
                x = x.new_zeros(B * L, D).index_copy(0, kept, x)
            return x.view(B, L, D)

        embedded_TD, states = x_TD, []
        for block in self.blocks:
            if keep_states:
                states.append(in_rows(x_TD))
            x_TD = block(x_TD, cos, sin, layout)
        hidden = in_rows(self.norm(x_TD))
        further = None
        if with_mtp:
            if self.mtp is None:
                raise ValueError("output_mtp: num_nextn_predict_layers=0, this model has no MTP layer")
            further = in_rows(self.mtp(x_TD, next_embeddings(embedded_TD, layout), cos, sin, layout))
        return Output(
            last_hidden_state=hidden,
            hidden_states=(*states, hidden) if keep_states else None,
            mtp_hidden_state=further,
        )

    def _cached(
        self, x_BLD: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache
    ) -> Tensor:
        B, L, _ = x_BLD.shape
        past = int(cache.get_seq_length())
        at = torch.arange(past, past + L, device=x_BLD.device)
        if position_ids is None:
            position_ids = at[None]
        visible = torch.arange(past + L, device=x_BLD.device)[None, :] <= at[:, None]
        mask_BLS = visible[None].expand(B, L, past + L)
        if attention_mask is not None:
            # A padded query still sees itself, so that no softmax row is empty; its output is never used.
            itself = torch.arange(past + L, device=x_BLD.device)[None, :] == at[:, None]
            mask_BLS = (mask_BLS & attention_mask.bool()[:, None, :]) | itself[None]
        cos, sin = self.rope(position_ids.expand(B, L), x_BLD.dtype)
        for block in self.blocks:
            x_BLD = block.cached(x_BLD, cos, sin, cache, mask_BLS)
        return self.norm(x_BLD)


class DeepseekV3ForCausalLM(DeepseekV3PreTrainedModel, GenerationMixin):
    """DeepSeek-V3 with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers' form)

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        self.model = DeepseekV3Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Sequence[int] | None = None,
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, vocab), of the last `logits_to_keep` positions if that is positive, and the loss of `labels`.

        The arguments are those of every causal LM of transformers, and the packing of `DeepseekV3Model`.
        """
        return_dict = kwargs.pop("return_dict", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            layout=layout,
            output_hidden_states=bool(kwargs.pop("output_hidden_states", False)),
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )
        return result.to_tuple() if return_dict is False else result
