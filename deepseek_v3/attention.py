"""Multi-head latent attention (MLA, arXiv 2412.19437, 2.1.1), two ways that compute the same.

*Naive*, for training: keys and values are expanded per head from the latent and packed sequences attend within
themselves. *Absorbed*, for decoding: queries move into the latent space (W_UK folds into q, W_UV into the output),
so the cache is 512 + 64 values a token whatever the number of heads.

Shapes: T packed tokens, B rows, L new tokens per row, S cached tokens, H heads, R = kv_lora_rank,
P = rope part, N = nope part, V = value part, D = hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DeepseekV3Config

from deepseek_v3.fp8.linear import Fp8Linear
from deepseek_v3.packing import Layout, SegmentAttention, flex_attention
from deepseek_v3.rope import rotate, softmax_scale


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, normalised in fp32."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


def packed_attention(q_THd: Tensor, k_THd: Tensor, v_THv: Tensor, layout: Layout, scale: float) -> Tensor:
    """Causal attention (T, H, v) of packed segments: each token sees its own segment's past, and all of the segment
    that its own continues, if any. On CUDA by FlexAttention, elsewhere segment by segment."""
    v_size, device = v_THv.shape[-1], q_THd.device.type
    # Neither path is an autocast function, so casts are ours.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q_THd.dtype
    q, k, v = (x.to(dtype) for x in (q_THd, k_THd, v_THv))
    if q.is_cuda:
        out = flex_attention(q, k, v, layout, scale)
    else:
        # The CPU's fast kernel needs one head size for q, k and v.
        size = max(v_size, q.shape[-1])
        q, k, v = (F.pad(x, (0, size - x.shape[-1])) for x in (q, k, v))
        out = SegmentAttention.apply(q, k, v, layout, scale)
    return out[..., :v_size]


class MLA(nn.Module):
    """V3's attention layer: forward() is the naive packed form, cached() the absorbed one."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.num_attention_heads
        self.nope, self.rope, self.value = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        self.rank = config.kv_lora_rank
        self.interleaved = bool(config.rope_interleave)
        self.scale = softmax_scale(config)
        D, bias, q_size = (
            config.hidden_size,
            config.attention_bias,
            self.heads * (self.nope + self.rope),
        )
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(D, q_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(D, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)  # eps 1e-6 whatever rms_norm_eps is, as released
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, D, bias=bias)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> q_nope (..., H, N) and rotated q_rope (..., H, P)."""
        q = self.q_proj(x) if hasattr(self, "q_proj") else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        return q_nope, rotate(q_rope, cos[..., None, :], sin[..., None, :], interleaved=self.interleaved)

    def latent(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., D) -> what is cached: normalised c_kv (..., R) and rotated k_rope (..., P), one for all heads."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        return self.kv_a_layernorm(c_kv), rotate(k_rope, cos, sin, interleaved=self.interleaved)

    def forward(self, x_TD: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Naive MLA over packed segments; returns the output (T, D) and the latents a cache would keep."""
        q_nope, q_rope = self.queries(x_TD, cos, sin)
        c_kv, k_rope = self.latent(x_TD, cos, sin)
        k_nope, v = self.kv_b_proj(c_kv).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        k = torch.cat([k_nope, k_rope[:, None, :].expand(-1, self.heads, -1)], dim=-1)
        out = packed_attention(q, k, v, layout, self.scale)
        return self.o_proj(out.flatten(-2)), (c_kv, k_rope)

    def absorbable(self, c_kv: Tensor) -> Tensor:
        """c_kv as kv_b_proj takes it in: what a cache is to hold for the absorbed form to be the naive one."""
        return self.kv_b_proj.rounded(c_kv) if isinstance(self.kv_b_proj, Fp8Linear) else c_kv

    def absorption(self) -> tuple[Tensor, Tensor]:
        """W_UK (H, N, R) and W_UV (H, R, V): the two halves of kv_b_proj, per head."""
        weight = self.kv_b_proj.weight
        if type(self.kv_b_proj) is not nn.Linear:
            # An adapter or a quantised layer: what it computes for the unit vectors is its effective weight.
            unit = torch.eye(self.rank, device=weight.device, dtype=self.kv_a_layernorm.weight.dtype)
            weight = self.kv_b_proj(unit).T
        w_uk, w_uv = weight.view(self.heads, self.nope + self.value, self.rank).split([self.nope, self.value], dim=1)
        return w_uk, w_uv.transpose(1, 2)

    def cached(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, cache: Cache, mask_BLS: Tensor) -> Tensor:
        """Absorbed MLA of L new tokens per row over a latent cache. mask: True = may be attended to.

        `cache` is any transformers cache; its "keys" hold c_kv and its "values" k_rope, each with one head.
        """
        q_nope, q_rope = self.queries(x_BLD, cos, sin)
        c_kv, k_rope = self.latent(x_BLD, cos, sin)
        c_kv = self.absorbable(c_kv)
        c_BSR, k_BSP = (t[:, 0] for t in cache.update(c_kv[:, None], k_rope[:, None], self.layer_idx))
        w_uk, w_uv = self.absorption()
        q_BLHR = torch.einsum("blhn,hnr->blhr", q_nope, w_uk)
        scores = torch.einsum("blhr,bsr->bhls", q_BLHR, c_BSR) + torch.einsum("blhp,bsp->bhls", q_rope, k_BSP)
        scores = (scores.float() * self.scale).masked_fill(~mask_BLS[:, None], float("-inf"))
        weights = scores.softmax(-1).to(c_BSR.dtype)
        out_BLHR = torch.einsum("bhls,bsr->blhr", weights, c_BSR)
        return self.o_proj(torch.einsum("blhr,hrv->blhv", out_BLHR, w_uv).flatten(-2))
