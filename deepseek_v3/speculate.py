"""Prompts -> drafts and the logits that judge them: V3 decoding of two tokens a round, its MTP layer the drafter.

A round of speculative decoding (arXiv 2211.17192; V3's, arXiv 2412.19437, 5.4.3): the MTP layer, given the last state
and the token sampled after it, says what it expects of the token after that; whoever samples draws a draft from it;
the main model takes token and draft in one step of two tokens; and its logits after the first of them judge the
draft. If it is accepted, those after the second are for the token that follows, otherwise the round has brought one
token. So rows grow by unlike numbers of tokens, and what a refused draft left in the caches is written over.

The MTP layer has a cache of its own. Its entry for place i is made of the main model's state at i and of token i + 1;
that of a token whose next one is a draft is made at once, on the chance that the draft is accepted.

Left out: sampling itself, and chains of more than one draft.
Shapes as in decode.py; L is 1 for a draft, 2 for its judgement.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_v3.decode import GroupDecoder
from deepseek_v3.model import DeepseekV3ForCausalLM
from deepseek_v3.mtp import next_embeddings
from deepseek_v3.packing import Layout

MTP = -1
"""The MTP layer's caches come after those of the main layers."""


class SpeculativeDecoder(GroupDecoder):
    """Rows of token ids growing one or two tokens a round: `draft`, `judge`, `advance`, in this order.

    `logits_BV` is for every row's first token only.
    """

    def __init__(
        self, model: DeepseekV3ForCausalLM, prompts: Sequence[Sequence[int]], *, n: int, max_tokens: int
    ) -> None:
        if model.model.mtp is None:
            raise ValueError("num_nextn_predict_layers=0: this model has no MTP layer to draft with; decode without")
        self.mtp = model.model.mtp
        super().__init__(model, prompts, n=n, max_tokens=max_tokens)
        self.t_B = torch.zeros_like(self.positions_B)

    def _prefill(self, ids_T: Tensor, layout: Layout) -> tuple[Tensor, list[Tensor]]:
        x_TD, entries = super()._prefill(ids_T, layout)
        # A prompt's last token has no next one yet: its entry is that of a row's first draft.
        combined_TD = self.mtp.combine(x_TD, next_embeddings(self.model.model.embed_tokens(ids_T), layout))
        return x_TD, [*entries, self._mtp_entry(combined_TD, layout.positions(ids_T.device))]

    @torch.no_grad()
    def draft(self, ids_B: Tensor) -> Tensor:
        """The token each row has sampled -> the MTP layer's logits for the one after it (B, V)."""
        self.ids_B = ids_B
        self._open(self.t_B[:, None])
        cos, sin = (table[self.positions_B - 1] for table in self.cos_sin)
        x_BD = self.mtp.combine(self.x_BD, self.model.model.embed_tokens(ids_B))
        normed_BD = self.mtp.input_layernorm(x_BD)
        x_BD = x_BD + self._attend(MTP, self.mtp.self_attn, normed_BD, cos, sin, self.mtp_outside_P1S)
        return self.model.lm_head(self.mtp.shared_head["norm"](self.mtp.feed_forward(x_BD)))

    @torch.no_grad()
    def judge(self, draft_B: Tensor) -> Tensor:
        """Feed each row its sampled token and its draft; the main model's logits after either (B, 2, V)."""
        ids_B2 = torch.stack([self.ids_B, draft_B], dim=1)
        ahead = torch.arange(2, device=draft_B.device)
        self._open(self.t_B[:, None] + ahead)
        positions_B2 = self.positions_B[:, None] + ahead
        self.x_B2D = self._feed(ids_B2.flatten(), positions_B2.flatten()).unflatten(0, (-1, 2))
        combined_BD = self.mtp.combine(self.x_B2D[:, 0], self.model.model.embed_tokens(draft_B))
        self._open(self.t_B[:, None] + 1)
        self._remember(MTP, self._mtp_entry(combined_BD, self.positions_B))
        return self._logits(self.x_B2D)

    def advance(self, by_B: Tensor) -> None:
        """Say how many of the two tokens fed each row keeps: 2, its draft too; 1; or 0, for a row that has ended."""
        states_B3D = torch.cat([self.x_BD[:, None], self.x_B2D], dim=1)
        self.x_BD = states_B3D[torch.arange(len(by_B), device=by_B.device), by_B]
        self.positions_B = self.positions_B + by_B
        self.t_B = self.t_B + by_B
        self.t = int(self.t_B.max())

    def keep(self, live_B: Tensor) -> None:
        self.t_B = self.t_B[live_B]
        super().keep(live_B)

    def _arrange(self) -> None:
        super()._arrange()
        self.mtp_outside_P1S = self._outside(self.lengths_P - 1)

    def _mtp_entry(self, combined_TD: Tensor, positions_T: Tensor) -> Tensor:
        cos, sin = (table[positions_T] for table in self.cos_sin)
        mla = self.mtp.self_attn
        return self._entry(mla, *mla.latent(self.mtp.input_layernorm(combined_TD), cos, sin))

    def _open(self, places_BL: Tensor) -> None:
        """The tokens fed next go to these places of a cache, and each sees its row's up to its own."""
        self.places_BL = places_BL
        self.seen = int(places_BL.max()) + 1
        later_BLt = torch.arange(self.seen, device=places_BL.device) > places_BL[..., None]
        self.later_B1Lt = torch.where(later_BLt, float("-inf"), 0.0)[:, None]

    def _remember(self, layer: int, entry_TKE: Tensor) -> Tensor:
        cache_BKtE = self.new_BKtE[layer]
        rows_B1 = torch.arange(len(cache_BKtE), device=entry_TKE.device)[:, None]
        cache_BKtE[rows_B1, :, self.places_BL] = entry_TKE.unflatten(0, (len(rows_B1), -1))
        return cache_BKtE[:, :, : self.seen]

    def _hide(self, scores_BHLt: Tensor) -> None:
        scores_BHLt.add_(self.later_B1Lt)
