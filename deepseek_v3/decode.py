"""Prompts -> next-token logits, step by step, for groups of rows that share a prompt: V3 decoding in lock step.

Each prompt is prefilled once, whatever the size of its group, and its rows all read that one copy. Rows can be
dropped as they finish; what remains is unchanged by it. Rows that grow by unlike numbers of tokens: speculate.py.

What a token leaves behind is the smaller of MLA's two forms. *Absorbed*: one entry [k_rope | c_kv] of 576 values,
key and value of all heads at once; queries move into the latent space. *Expanded*: an entry [k_rope | k_nope | v] for
each head. DeepSeek-V3's 128 heads make the first 71 times smaller; for two small heads the second is, and cheaper too.

Shapes: P prompts, S longest prompt, B live rows, G rows in the largest live group, t new tokens so far, L tokens fed
to a row at once, T = B·L (in a prefill, all prompts' tokens), H heads, Q = H·L queries of a row, K entries per token
(1 absorbed, H expanded), E values per entry, C of them key, V of them value, R latent rank.
"""

from collections.abc import Sequence
from itertools import accumulate, chain

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

        self.lengths_P = torch.tensor([len(p) for p in prompts], device=device)
        P, self.S = len(prompts), int(self.lengths_P.max())
        self.cos_sin = model.model.rope(torch.arange(self.S + max_tokens, device=device), dtype)  # of every position
        self.positions_B = self.lengths_P.repeat_interleave(n)
        self.prompt_B = torch.arange(P, device=device).repeat_interleave(n)
        self.t = 0
        self._arrange()

        ids_T = torch.tensor(list(chain.from_iterable(prompts)), device=device)
        x_TD, entries_TKE = self._prefill(ids_T, Layout([0, *accumulate(map(len, prompts))]))
        self.x_BD = x_TD[self.lengths_P.cumsum(0) - 1].repeat_interleave(n, dim=0)  # after each row's last block
        self.logits_BV = self._logits(self.x_BD)
        self.prompt_PKSE, self.new_BKtE = [], []
        inside_PS = self._before(self.lengths_P)
        for entry_TKE in entries_TKE:
            padded_PSKE = entry_TKE.new_zeros(P, self.S, *entry_TKE.shape[1:])
            padded_PSKE[inside_PS] = entry_TKE
            self.prompt_PKSE.append(padded_PSKE.transpose(1, 2).contiguous())
            self.new_BKtE.append(entry_TKE.new_zeros(P * n, self.K, max_tokens, entry_TKE.shape[-1]))

    def _prefill(self, ids_T: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        """States after the last block, and what every layer is to keep."""
        cos, sin = (table[layout.positions(ids_T.device)] for table in self.cos_sin)
        x_TD = self.model.model.embed_tokens(ids_T)
        entries = []
        for block in self.model.model.blocks:
            attended, latent = block.self_attn(block.input_layernorm(x_TD), cos, sin, layout)
            x_TD = block.feed_forward(x_TD + attended)
            entries.append(self._entry(block.self_attn, *latent))
        return x_TD, entries

    @torch.no_grad()
    def step(self, ids_B: Tensor) -> None:
        """Append one token to every row; `logits_BV` then predicts the one after."""
        self.x_BD = self._feed(ids_B, self.positions_B)
        self.logits_BV = self._logits(self.x_BD)
        self.positions_B = self.positions_B + 1
        self.t += 1

    def _feed(self, ids_T: Tensor, positions_T: Tensor) -> Tensor:
        """L tokens of every row, row after row -> their states after the last block (T, D)."""
        cos, sin = (table[positions_T] for table in self.cos_sin)
        x_TD = self.model.model.embed_tokens(ids_T)
        for i, block in enumerate(self.model.model.blocks):
            x_TD = x_TD + self._attend(i, block.self_attn, block.input_layernorm(x_TD), cos, sin, self.outside_P1S)
            x_TD = block.feed_forward(x_TD)
        return x_TD

    def _logits(self, x: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(x))

    def _entry(self, mla: MLA, c_kv_TR: Tensor, k_rope: Tensor) -> Tensor:
        """What tokens leave behind, (T, K, E)."""
        if self.absorbed:
            return torch.cat([k_rope, mla.absorbable(c_kv_TR)], dim=-1)[:, None]
        kv_TH = mla.kv_b_proj(c_kv_TR).unflatten(-1, (self.H, -1))
        return torch.cat([k_rope[:, None].expand(-1, self.H, -1), kv_TH], dim=-1)

    def _remember(self, layer: int, entry_TKE: Tensor) -> Tensor:
        """Write the entries of tokens being fed; return those of all new tokens so far, with these (B, K, t, E)."""
        new_BKtE = self.new_BKtE[layer][:, :, : self.t + 1]
        new_BKtE[:, :, -1] = entry_TKE
        return new_BKtE

    def _hide(self, scores_BHLt: Tensor) -> None:
        """Take out, in place, the new tokens that a fed one may not see: in lock step it sees them all."""

    def _attend(self, layer: int, mla: MLA, x_TD: Tensor, cos: Tensor, sin: Tensor, outside_P1S: Tensor) -> Tensor:
        """Attention of the tokens being fed over a layer's prompts, less what is outside, and new tokens."""
        new_BKtE = self._remember(layer, self._entry(mla, *mla.latent(x_TD, cos, sin)))
        prompt_PKSE = self.prompt_PKSE[layer]
        B, t = len(new_BKtE), new_BKtE.shape[2]

        q_nope, q_rope = mla.queries(x_TD, cos, sin)
        if self.absorbed:
            w_uk, w_uv = mla.absorption()
            q_nope = torch.bmm(q_nope.transpose(0, 1), w_uk).transpose(0, 1)
        q_THC = torch.cat([q_rope, q_nope], dim=-1) * mla.scale
        q_BQC = q_THC.unflatten(0, (B, -1)).transpose(1, 2).flatten(1, 2)  # a head's queries side by side

        keys = prompt_PKSE[..., self.key].flatten(0, 1)
        scores = torch.bmm(self._by_prompt(q_BQC), keys.transpose(1, 2))
        scores.view(len(prompt_PKSE), -1, self.S).add_(outside_P1S)
        keys = new_BKtE[..., self.key].flatten(0, 1)
        new_scores = torch.bmm(q_BQC.view(B * self.K, -1, q_BQC.shape[-1]), keys.transpose(1, 2))
        self._hide(new_scores.view(B, self.H, -1, t))
        # One softmax over prompt and new tokens, in fp32 as everywhere.
        scores_BQs = torch.cat([self._by_row(scores), new_scores.view(B, -1, t)], dim=-1)
        p_prompt, p_new = scores_BQs.float().softmax(-1).to(x_TD.dtype).split([self.S, t], dim=-1)

        from_prompt = torch.bmm(self._by_prompt(p_prompt), prompt_PKSE[..., self.value].flatten(0, 1))
        from_new = torch.bmm(p_new.reshape(B * self.K, -1, t), new_BKtE[..., self.value].flatten(0, 1))
        out_BQV = self._by_row(from_prompt) + from_new.view(B, -1, from_new.shape[-1])
        out_THV = out_BQV.unflatten(1, (self.H, -1)).transpose(1, 2).flatten(0, 1)
        if self.absorbed:
            out_THV = torch.bmm(out_THV.transpose(0, 1), w_uv).transpose(0, 1)
        return mla.o_proj(out_THV.flatten(1))

    def _by_prompt(self, x_BQn: Tensor) -> Tensor:
        """(B, Q, n) of rows -> (P·K, G·Q/K, n): all that meets one prompt entry in one matmul, zeros in free places."""
        x_Gn = x_BQn.flatten(1)
        if self.place_B is not None:
            x_Gn = x_Gn.new_zeros(self.P * self.G, x_Gn.shape[-1]).index_copy_(0, self.place_B, x_Gn)
        x_PKG = x_Gn.view(self.P, self.G, self.K, -1).transpose(1, 2)
        return x_PKG.reshape(self.P * self.K, -1, x_BQn.shape[-1])

    def _by_row(self, x: Tensor) -> Tensor:
        """The way back: (P·K, G·Q/K, n) -> (B, Q, n)."""
        x_PGK = x.view(self.P, self.K, self.G, -1).transpose(1, 2)
        x_GQn = x_PGK.reshape(self.P * self.G, -1, x.shape[-1])
        return x_GQn if self.place_B is None else x_GQn[self.place_B]

    def _before(self, ends_P: Tensor) -> Tensor:
        """(P, S): which places of the prompts lie before these."""
        return torch.arange(self.S, device=ends_P.device) < ends_P[:, None]

    def _outside(self, ends_P: Tensor) -> Tensor:
        """(P, 1, S): what to add to scores so that only places before these count."""
        return torch.where(self._before(ends_P), 0.0, float("-inf"))[:, None, :]

    def _arrange(self) -> None:
        """Give each live row a place in a (P, G) grid: groups of unlike sizes leave some of it free."""
        self.outside_P1S = self._outside(self.lengths_P)
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
        self.x_BD, self.logits_BV, self.positions_B = (x[rows] for x in (self.x_BD, self.logits_BV, self.positions_B))
        self.new_BKtE = [self._taken(new, rows) for new in self.new_BKtE]
        needed, self.prompt_B = self.prompt_B[rows].unique(return_inverse=True)
        if len(needed) < len(self.lengths_P):
            self.lengths_P = self.lengths_P[needed]
            self.prompt_PKSE = [prompt[needed] for prompt in self.prompt_PKSE]
        self._arrange()

    def _taken(self, new_BKtE: Tensor, rows: Tensor) -> Tensor:
        """The chosen rows of a cache, copying only the tokens that are in it."""
        out = new_BKtE.new_zeros(len(rows), *new_BKtE.shape[1:])
        out[:, :, : self.t] = new_BKtE[rows, :, : self.t]
        return out
