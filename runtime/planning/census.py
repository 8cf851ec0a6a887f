"""A DeepSeek-V3 config -> its parameters part by part, the FLOPs of a token, and what a token leaves in the cache.

Parameters are counted on the model itself, built on the meta device: no memory, and no second list of shapes to go
wrong. FLOPs are those of matrix products, 2 a multiply-add; norms, softmax and routing are a per cent and left out.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import DeepseekV3Config

from deepseek_v3 import DeepseekV3ForCausalLM
from runtime.adapters import ATTENTION_PROJECTIONS
from runtime.settings import LoraConfig


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Parameters of one decoder layer."""

    matrices: int
    """Attention and the dense or shared feed-forward."""
    experts: int
    """All routed ones."""
    router: int
    vectors: int
    """Norms."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.matrices + self.experts + self.router + self.vectors


@dataclass(frozen=True, kw_only=True)
class Census:
    """Parameters of a model."""

    config: DeepseekV3Config
    layers: tuple[Layer, ...]
    """Main layers in order, and after them the MTP layer if there is one."""
    embedding: int
    head: int
    """0 where it is the embedding."""
    norm: int
    bias: int
    """Elements of the routers' fp32 biases: buffers, not parameters."""
    muon: int
    """Of the parameters, those that sft/optimizer.py gives to Muon if asked: matrices between embedding and head."""
    adapters: int
    """Parameters of the LoRA adapters asked for."""

    @property
    def main(self) -> tuple[Layer, ...]:
        """The layers without MTP's."""
        return self.layers[: self.config.num_hidden_layers]

    @property
    def mtp(self) -> int:
        """Parameters of the MTP layer; 0 without one."""
        return sum(layer.total for layer in self.layers[len(self.main) :])

    @property
    def experts(self) -> int:
        """Of all layers."""
        return sum(layer.experts for layer in self.layers)

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.norm + sum(layer.total for layer in self.layers)

    @property
    def activated(self) -> int:
        """Those a token meets, embedding and head among them, the MTP layer not (arXiv 2412.19437: 37B)."""
        share = self.config.num_experts_per_tok / self.config.n_routed_experts
        idle = sum(round(layer.experts * (1 - share)) for layer in self.main)
        return self.total - self.mtp - idle


def count(config: DeepseekV3Config, lora: LoraConfig | None = None) -> Census:
    """Count the parameters of the model that `config` describes, and of the adapters that `lora` would add."""
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(config)
    named = list(model.named_parameters())
    head = 0 if config.tie_word_embeddings else model.lm_head.weight.numel()
    return Census(
        config=config,
        layers=tuple(_layer(layer) for layer in model.model.layers),
        embedding=model.model.embed_tokens.weight.numel(),
        head=head,
        norm=model.model.norm.weight.numel(),
        bias=sum(buffer.numel() for buffer in model.buffers()),
        muon=sum(p.numel() for name, p in named if p.ndim == 2 and not _outside_muon(name)),
        adapters=0 if lora is None else _adapters(model, lora),
    )


def _layer(layer: nn.Module) -> Layer:
    sizes = {"matrices": 0, "experts": 0, "router": 0, "vectors": 0}
    for name, p in layer.named_parameters():
        if p.ndim == 1:
            part = "vectors"
        elif ".experts." in name:
            part = "experts"
        else:
            part = "router" if name == "mlp.gate.weight" else "matrices"
        sizes[part] += p.numel()
    return Layer(**sizes)


def _outside_muon(name: str) -> bool:
    return any(part in name for part in ("embed", "lm_head", "mlp.gate.weight"))


def _adapters(model: DeepseekV3ForCausalLM, lora: LoraConfig) -> int:
    """r (in + out) for every linear layer of the main blocks that is adapted (arXiv 2106.09685, section 4)."""
    targets = ATTENTION_PROJECTIONS if lora.target_modules == "attention" else lora.target_modules
    linears = [
        module
        for layer in model.model.blocks
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear) and name.rsplit(".", 1)[-1] in targets
    ]
    return sum(lora.rank * (linear.in_features + linear.out_features) for linear in linears)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def block_flops(census: Census, context: float, *, mtp: bool = False) -> float:
    """Forward of all layers, a token, in the naive form of MLA that training uses. mtp: with the MTP layer.

    2 a parameter it meets; and at `context` tokens seen on average, H (N + P) + H V multiply-adds for each of them.
    """
    config = census.config
    share = config.num_experts_per_tok / config.n_routed_experts
    layers = census.layers if mtp else census.main
    matrices = sum(layer.matrices + layer.router + layer.experts * share for layer in layers)
    per_position = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return 2 * matrices + 2 * len(layers) * per_position * context


def head_flops(census: Census) -> float:
    """Forward of the vocabulary head, a token that is predicted."""
    return 2 * census.embedding  # V D, also where the two are one matrix


def decode_flops(census: Census, context: float) -> float:
    """A token decoded with absorbed MLA: H (R + P) + H R multiply-adds for each latent in its cache."""
    config = census.config
    latent = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    attention = 2 * len(census.main) * config.num_attention_heads * latent * context
    return block_flops(census, 0) + attention + head_flops(census)


# --- cache ------------------------------------------------------------------------------------------------------------


def latent_values(config: DeepseekV3Config) -> int:
    """Values a token leaves in every layer of vLLM's cache: c_kv and one rotated key, 576 for V3."""
    return config.kv_lora_rank + config.qk_rope_head_dim


def native_values(config: DeepseekV3Config) -> int:
    """The same of our own decoder, which keeps the smaller of MLA's two forms (deepseek_v3/decode.py)."""
    expanded = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return min(latent_values(config), expanded)


def experts_met(config: DeepseekV3Config, tokens: float) -> float:
    """Share of the experts that at least one of so many tokens is sent to, if all are as likely."""
    return 1 - (1 - config.num_experts_per_tok / config.n_routed_experts) ** tokens
