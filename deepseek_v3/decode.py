"""Prompts -> next-token logits, step by step, for groups of rows that share a prompt: V3 decoding in lock step.

Each prompt is prefilled once, whatever the size of its group; its rows read one copy of its latents. All attention
is absorbed MLA over 576 cached values a token. Rows can be dropped as they finish; what remains is unchanged by it.

Shapes: P prompts, S longest prompt, B live rows, G rows in the largest live group, H heads, t new tokens so far,
R latent rank, C = R + rope: what one token caches.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from deepseek_v3.attention import MLA
from deepseek_v3.model import DeepseekV3ForCausalLM


class GroupDecoder:
    """Rows of token ids growing one token a step. `logits_BV` always holds the logits for the next token."""

    @torch.no_grad()
    def __init__(
        self, model: DeepseekV3ForCausalLM, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int
    ) -> None:
        """Prefill every prompt once and open n rows for each; row b belongs to prompt b // n."""
        self.model = model
        device = model.lm_head.weight.device
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        hidden_TD, latents = self._prefill(prompts, device)
        P, S = len(prompts), int(lengths.max())
        last_P = lengths.cumsum(0) - 1
        self.logits_BV = model.lm_head(hidden_TD[last_P]).repeat_interleave(n, dim=0)

        inside_PS = torch.arange(S, device=device) < lengths[:, None]
        self.outside_P1S = torch.where(inside_PS, 0.0, float("-inf"))[:, None, :]
        self.prompt_PSC = [c.new_zeros(P, S, c.shape[-1]) for c in latents]
        for padded, c in zip(self.prompt_PSC, latents, strict=True):
            padded[inside_PS] = c
        self.new_BTC = [c.new_empty(P * n, max_tokens, c.shape[-1]) for c in latents]
        self.t = 0
        self.positions_B = lengths.repeat_interleave(n)
        self.prompt_B = torch.arange(P, device=device).repeat_interleave(n)
        self._arrange()

    def _prefill(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
        model = self.model.model
        cu_seqlens = [0]
        for prompt in prompts:
            cu_seqlens.append(cu_seqlens[-1] + len(prompt))
        ids_T = torch.tensor([i for prompt in prompts for i in prompt], device=device)
        positions_T = torch.cat([torch.arange(b - a, device=device) for a, b in pairwise(cu_seqlens)])
        x_TD = model.embed_tokens(ids_T)
        cos, sin = model.rope(positions_T, x_TD.dtype)
        latents = []
        for block in model.layers:
            attended, latent = block.self_attn(block.input_layernorm(x_TD), cos, sin, cu_seqlens)
            x_TD = block.feed_forward(x_TD + attended)
            latents.append(torch.cat(latent, dim=-1))
        return model.norm(x_TD), latents

    def _arrange(self) -> None:
        """Give each live row a place in a (P, G) grid, so that a group's queries meet its prompt in one matmul."""
        order = torch.arange(len(self.prompt_B), device=self.prompt_B.device)
        counts = torch.bincount(self.prompt_B, minlength=len(self.outside_P1S))
        first = counts.cumsum(0) - counts
        self.G = int(counts.max())
        place_B = self.prompt_B * self.G + order - first[self.prompt_B]
        # With every row alive the grid is the batch itself and nothing needs moving.
        self.place_B = None if len(place_B) == len(counts) * self.G else place_B

    def keep(self, live_B: Tensor) -> None:
        """Drop the rows where live_B is False, and the prompts no row needs any more."""
        rows = live_B.nonzero()[:, 0]
        self.logits_BV = self.logits_BV[rows]
        self.new_BTC = [self._taken(c, rows) for c in self.new_BTC]
        self.positions_B = self.positions_B[rows]
        needed, self.prompt_B = self.prompt_B[rows].unique(return_inverse=True)
        if len(needed) < len(self.outside_P1S):
            self.outside_P1S = self.outside_P1S[needed]
            self.prompt_PSC = [c[needed] for c in self.prompt_PSC]
        if len(rows):
            self._arrange()

    def _taken(self, cache_BTC: Tensor, rows: Tensor) -> Tensor:
        """The chosen rows of a cache, copying only the tokens that are in it."""
        out = cache_BTC.new_empty(len(rows), *cache_BTC.shape[1:])
        out[:, : self.t] = cache_BTC[rows, : self.t]
        return out

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> None:
        """Append one token to every row; `logits_BV` then predicts the one after."""
        model = self.model.model
        x_BD = model.embed_tokens(ids_B)
        cos, sin = model.rope(self.positions_B, x_BD.dtype)
        for i, block in enumerate(model.layers):
            x_BD = x_BD + self._attend(i, block.self_attn, block.input_layernorm(x_BD), cos, sin)
            x_BD = block.feed_forward(x_BD)
        self.logits_BV = self.model.lm_head(model.norm(x_BD))
        self.positions_B = self.positions_B + 1
        self.t += 1

    def _attend(self, layer: int, mla: MLA, x_BD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, H, R = len(x_BD), mla.heads, mla.rank
        prompt_PSC, outside_P1S = self.prompt_PSC[layer], self.outside_P1S
        P, S, C = prompt_PSC.shape
        new_BtC = self.new_BTC[layer][:, : self.t + 1]
        new_BtC[:, -1] = torch.cat(mla.latent(x_BD, cos, sin), dim=-1)

        w_uk, w_uv = mla.absorption()
        q_nope, q_rope = mla.queries(x_BD, cos, sin)
        q_BHC = torch.cat([torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1), q_rope], dim=-1)
        q_BHC = q_BHC * mla.scale

        q_PGC = self._to_grid(q_BHC.flatten(1)).view(P, self.G * H, C)
        prompt_scores = torch.bmm(q_PGC, prompt_PSC.transpose(1, 2)) + outside_P1S
        prompt_scores_BHS = self._from_grid(prompt_scores.view(P * self.G, H * S)).view(B, H, S)
        new_scores_BHt = torch.bmm(q_BHC, new_BtC.transpose(1, 2))
        # One softmax over prompt and new tokens, in fp32 as everywhere.
        p = torch.cat([prompt_scores_BHS, new_scores_BHt], dim=-1).float().softmax(-1).to(x_BD.dtype)
        p_prompt_BHS, p_new_BHt = p.split([S, self.t + 1], dim=-1)

        p_PGS = self._to_grid(p_prompt_BHS.flatten(1)).view(P, self.G * H, S)
        from_prompt = self._from_grid(torch.bmm(p_PGS, prompt_PSC[..., :R]).view(P * self.G, H * R))
        out_BHR = from_prompt.view(B, H, R) + torch.bmm(p_new_BHt, new_BtC[..., :R])
        return mla.o_proj(torch.bmm(out_BHR.transpose(0, 1), w_uv).transpose(0, 1).flatten(1))

    def _to_grid(self, x_Bn: Tensor) -> Tensor:
        if self.place_B is None:
            return x_Bn
        grid = x_Bn.new_zeros(len(self.outside_P1S) * self.G, x_Bn.shape[-1])
        return grid.index_copy_(0, self.place_B, x_Bn)

    def _from_grid(self, grid_Gn: Tensor) -> Tensor:
        return grid_Gn if self.place_B is None else grid_Gn[self.place_B]
