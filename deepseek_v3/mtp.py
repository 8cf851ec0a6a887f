"""The main model's states and the next tokens -> states that predict the token after next (MTP, arXiv 2412.19437, 2.2).

Position i of a sample sees h_i, the state after the last main block, and its own next token t_{i+1}; through the main
model's head its state predicts t_{i+2}. A sample's last token has no next one and gets zeros for it; nothing of the
sample comes after it, so its state, which predicts nothing, reaches no other.

What the paper leaves open:
- The order in the concatenation: the paper has [h; Emb(t)], the released weights have the embedding first.
- h is taken before the main model's final norm. `hnorm` normalises it again, so a norm before it would only scale the
  channels, with weights fitted for the head. vLLM and transformers draft from the normed state.
- Positions: those of i. Counting from i + 1, as transformers does, is the same to rounding: RoPE sees differences only.

Left out: more than one token ahead (D > 1), and segments that continue others, whose last token would need the next
token of every continuation.

Shapes: T packed tokens, D hidden.
"""

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config

from deepseek_v3.attention import RMSNorm
from deepseek_v3.block import Block
from deepseek_v3.packing import Layout


class MTPBlock(Block):
    """TRM(M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)]) and the norm before the head (eq. 21-23).

    To decode, run `combine`, then the block's parts over a cache as for any other block, then `shared_head["norm"]`.
    Names are the released ones; `embed_tokens` and `shared_head.head` of released files repeat the main model's.
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        D, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = RMSNorm(D, eps), RMSNorm(D, eps)
        self.eh_proj = nn.Linear(2 * D, D, bias=False)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(D, eps)})

    def combine(self, h: Tensor, next_embedding: Tensor) -> Tensor:
        """h_i and Emb(t_{i+1}), (..., D) each -> what the block takes in."""
        return self.eh_proj(torch.cat([self.enorm(next_embedding), self.hnorm(h)], dim=-1))

    def forward(  # type: ignore[override]  # the states of two places instead of one
        self, h_TD: Tensor, next_TD: Tensor, cos: Tensor, sin: Tensor, layout: Layout
    ) -> Tensor:
        """h_i, Emb(t_{i+1}) -> (T, D), ready for the head."""
        return self.shared_head["norm"](super().forward(self.combine(h_TD, next_TD), cos, sin, layout))


def next_embeddings(embedded_TD: Tensor, layout: Layout) -> Tensor:
    """Emb(t_{i+1}) in the place of token i, zeros in that of a sample's last."""
    if layout.parents is not None:
        raise ValueError("output_mtp: a segment that others continue has several next tokens; pack each sample whole")
    last = torch.tensor(layout.cu_seqlens[1:], device=embedded_TD.device) - 1
    return embedded_TD.roll(-1, 0).index_fill(0, last, 0)


def prediction_depth(config: DeepseekV3Config) -> int:
    """Tokens predicted beyond the next one: 1 with the layer, 0 without."""
    depth = getattr(config, "num_nextn_predict_layers", 0)
    if depth not in (0, 1):
        raise ValueError(f"num_nextn_predict_layers={depth}: use 0, or 1 as in DeepSeek-V3")
    return depth
