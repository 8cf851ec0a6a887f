"""One decoder layer: x += MLA(norm(x)); x += FFN(norm(x)), packed for training or over a cache."""

from torch import Tensor, nn
from transformers import Cache, DeepseekV3Config
from transformers.modeling_layers import GradientCheckpointingLayer

from deepseek_v3.attention import MLA, RMSNorm
from deepseek_v3.moe import MLP, MoE
from deepseek_v3.packing import Layout


class Block(GradientCheckpointingLayer):
    """The first layers' FFN is dense, the others' a mixture of experts."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        dense = layer_idx < config.first_k_dense_replace
        self.self_attn = MLA(config, layer_idx)
        self.mlp: nn.Module = MLP(config.hidden_size, config.intermediate_size) if dense else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def feed_forward(self, x: Tensor) -> Tensor:
        h = self.post_attention_layernorm(x)
        return x + self.mlp(h.flatten(0, -2)).view_as(x)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(x_TD), cos, sin, layout)
        return self.feed_forward(x_TD + attended)

    def cached(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, cache: Cache, mask_BLS: Tensor) -> Tensor:
        x_BLD = x_BLD + self.self_attn.cached(self.input_layernorm(x_BLD), cos, sin, cache, mask_BLS)
        return self.feed_forward(x_BLD)
