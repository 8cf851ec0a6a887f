"""Prompts -> next-token logits, step by step, for groups of rows that share a prompt: V3 decoding in lock step.

Each prompt is prefilled once, whatever the size of its group, and its rows all read that one copy. Rows can be
dropped as they finish; what remains is unchanged by it.

What a token leaves behind is the smaller of MLA's two forms. *Absorbed*: one entry [k_rope | c_kv] of 576 values,
key and value of all heads at once; queries move into the latent space. *Expanded*: an entry [k_rope | k_nope | v] for
each head. DeepSeek-V3's 128 heads make the first 71 times smaller; for two small heads the second is, and cheaper too.

Shapes: P prompts, S longest prompt, B live rows, G rows in the largest live group, t new tokens so far, H heads,
K entries per token (1 absorbed, H expanded), E values per entry, C of them key, V of them value, R latent rank.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from deepseek_v3.attention import MLA
from deepseek_v3.model import DeepseekV3ForCausalLM
from deepseek_v3.packing import Layout


class GroupDecoder:
    """Rows of token ids growing one token a step. `logits_BV` always holds the logits for the next token."""

    @torch.no_grad()
    def __init__(
        self, model: DeepseekV3ForCausalLM, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int
    ) -> None:
        """Prefill every prompt once and open n rows for each; row b belongs to prompt b // n."""
        self.model = model
        device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
        mla = model.model.blocks[0].self_attn
        self.absorbed = mla.rank + mla.rope <= mla.heads * (mla.rope + mla.nope + mla.value)
        self.H, self.K = mla.heads, 1 if self.absorbed else mla.heads
        # Where key and value lie in an entry. Absorbed, the latent is part of both.
        self.key = slice(0, mla.rope + (mla.rank if self.absorbed else mla.nope))
        self.value = slice(mla.rope if self.absorbed else self.key.stop, None)

        lengths = torch.tensor([len(p) for p in prompts], device=device)
        P, S = len(prompts), int(lengths.max())
        self.cos_sin = model.model.rope(torch.arange(S + max_tokens, device=device), dtype)  # of every position
        inside_PS = torch.arange(S, device=device) < lengths[:, None]
        self.outside_P1S = torch.where(inside_PS, 0.0, float("-inf"))[:, None, :]
        self.positions_B = lengths.repeat_interleave(n)
        self.prompt_B = torch.arange(P, device=device).repeat_interleave(n)
        self.t = 0
        self._arrange()

        hidden_TD, entries_TKE = self._prefill(prompts, device)
        self.logits_BV = model.lm_head(hidden_TD[lengths.cumsum(0) - 1]).repeat_interleave(n, dim=0)
        self.prompt_PKSE, self.new_BKtE = [], []
        for entry_TKE in entries_TKE:
            padded_PSKE = entry_TKE.new_zeros(P, S, *entry_TKE.shape[1:])
            padded_PSKE[inside_PS] = entry_TKE
            self.prompt_PKSE.append(padded_PSKE.transpose(1, 2).contiguous())
            self.new_BKtE.append(entry_TKE.new_empty(P * n, self.K, max_tokens, entry_TKE.shape[-1]))

    def _prefill(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[Tensor]]:
        model = self.model.model
        layout = Layout([0, *accumulate(map(len, prompts))])
        cos, sin = (table[layout.positions(device)] for table in self.cos_sin)
        x_TD = model.embed_tokens(torch.tensor([i for p in prompts for i in p], device=device))
        entries = []
        for block in model.blocks:
            attended, latent = block.self_attn(block.input_layernorm(x_TD), cos, sin, layout)
            x_TD = block.feed_forward(x_TD + attended)
            entries.append(self._entry(block.self_attn, *latent))
        return model.norm(x_TD), entries

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> None:
        """Append one token to every row; `logits_BV` then predicts the one after."""
        model = self.model.model
        cos, sin = (table[self.positions_B] for table in self.cos_sin)
        x_BD = model.embed_tokens(ids_B)
        for i, block in enumerate(model.blocks):
            x_BD = x_BD + self._attend(i, block.self_attn, block.input_layernorm(x_BD), cos, sin)
            x_BD = block.feed_forward(x_BD)
        self.logits_BV = self.model.lm_head(model.norm(x_BD))
        self.positions_B = self.positions_B + 1
        self.t += 1

    def _entry(self, mla: MLA, c_kv_TR: Tensor, k_rope: Tensor) -> Tensor:
        """What tokens leave behind, (T, K, E)."""
        if self.absorbed:
            return torch.cat([k_rope, c_kv_TR], dim=-1)[:, None]
        kv_TH = mla.kv_b_proj(c_kv_TR).unflatten(-1, (self.H, -1))
        return torch.cat([k_rope[:, None].expand(-1, self.H, -1), kv_TH], dim=-1)

    def _attend(self, layer: int, mla: MLA, x_BD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        prompt_PKSE, new_BKtE = self.prompt_PKSE[layer], self.new_BKtE[layer][:, :, : self.t + 1]
        new_BKtE[:, :, -1] = self._entry(mla, *mla.latent(x_BD, cos, sin))
        B, S = len(x_BD), prompt_PKSE.shape[2]

        q_nope, q_rope = mla.queries(x_BD, cos, sin)
        if self.absorbed:
            w_uk, w_uv = mla.absorption()
            q_nope = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        q_BHC = torch.cat([q_rope, q_nope], dim=-1) * mla.scale

        keys = prompt_PKSE[..., self.key].flatten(0, 1)
        scores = torch.bmm(self._by_prompt(q_BHC), keys.transpose(1, 2))
        scores.view(len(prompt_PKSE), -1, S).add_(self.outside_P1S)
        keys = new_BKtE[..., self.key].flatten(0, 1)
        new_scores = torch.bmm(q_BHC.view(B * self.K, -1, q_BHC.shape[-1]), keys.transpose(1, 2))
        # One softmax over prompt and new tokens, in fp32 as everywhere.
        scores_BHs = torch.cat([self._by_row(scores), new_scores.view(B, self.H, -1)], dim=-1)
        p_prompt, p_new = scores_BHs.float().softmax(-1).to(x_BD.dtype).split([S, self.t + 1], dim=-1)

        from_prompt = torch.bmm(self._by_prompt(p_prompt), prompt_PKSE[..., self.value].flatten(0, 1))
        p_new = p_new.reshape(B * self.K, -1, self.t + 1)
        from_new = torch.bmm(p_new, new_BKtE[..., self.value].flatten(0, 1))
        out_BHV = self._by_row(from_prompt) + from_new.view(B, self.H, -1)
        if self.absorbed:
            out_BHV = torch.bmm(out_BHV.transpose(0, 1), w_uv).transpose(0, 1)
        return mla.o_proj(out_BHV.flatten(1))

    def _by_prompt(self, x_BHn: Tensor) -> Tensor:
        """(B, H, n) of rows -> (P·K, G·H/K, n): all that meets one prompt entry in one matmul, zeros in free places."""
        x_Gn = x_BHn.flatten(1)
        if self.place_B is not None:
            x_Gn = x_Gn.new_zeros(self.P * self.G, x_Gn.shape[-1]).index_copy_(0, self.place_B, x_Gn)
        x_PKG = x_Gn.view(self.P, self.G, self.K, -1).transpose(1, 2)
        return x_PKG.reshape(self.P * self.K, -1, x_BHn.shape[-1])

    def _by_row(self, x: Tensor) -> Tensor:
        """The way back: (P·K, G·H/K, n) -> (B, H, n)."""
        x_PGK = x.view(self.P, self.K, self.G, -1).transpose(1, 2)
        x_GHn = x_PGK.reshape(self.P * self.G, self.H, x.shape[-1])
        return x_GHn if self.place_B is None else x_GHn[self.place_B]

    def _arrange(self) -> None:
        """Give each live row a place in a (P, G) grid: groups of unlike sizes leave some of it free."""
        order = torch.arange(len(self.prompt_B), device=self.prompt_B.device)
        counts = torch.bincount(self.prompt_B)
        first = counts.cumsum(0) - counts
        self.P, self.G = len(counts), int(counts.max())
        place_B = self.prompt_B * self.G + order - first[self.prompt_B]
        # With no place free the grid is the batch itself and nothing needs moving.
        self.place_B = None if len(place_B) == self.P * self.G else place_B

    def keep(self, live_B: Tensor) -> None:
        """Drop the rows where live_B is False, at least one staying, and the prompts no row needs any more."""
        rows = live_B.nonzero()[:, 0]
        self.logits_BV = self.logits_BV[rows]
        self.new_BKtE = [self._taken(new, rows) for new in self.new_BKtE]
        self.positions_B = self.positions_B[rows]
        needed, self.prompt_B = self.prompt_B[rows].unique(return_inverse=True)
        if len(needed) < len(self.outside_P1S):
            self.outside_P1S = self.outside_P1S[needed]
            self.prompt_PKSE = [prompt[needed] for prompt in self.prompt_PKSE]
        self._arrange()

    def _taken(self, new_BKtE: Tensor, rows: Tensor) -> Tensor:
        """The chosen rows of a cache, copying only the tokens that are in it."""
        out = new_BKtE.new_empty(len(rows), *new_BKtE.shape[1:])
        out[:, :, : self.t] = new_BKtE[rows, :, : self.t]
        return out
