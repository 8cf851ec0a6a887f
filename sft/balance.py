"""Experts kept evenly loaded: the bias that needs no gradient, and the sequence-wise loss (arXiv 2412.19437, 2.1.2).

Both watch the routers through hooks, during the forward passes of training. Off after pre-training as a rule: SFT data
is narrow, and an even load over it is not what the model learnt.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepseek_v3.moe import Router
from deepseek_v3.packing import Layout
from runtime.distributed import World


class Balance:
    """Watches a model's routers; nothing happens before `watching` is entered."""

    def __init__(self, model: nn.Module) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self._loads: list[Tensor] = [torch.zeros(len(r.e_score_correction_bias)) for r in self.routers]
        self._seen: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def watching(self, *, counted: bool = True) -> Iterator[None]:
        """Note scores and choices of the forward pass inside for `loss` and, if it is to count, for `update`."""
        hooks = []
        for router, load in zip(self.routers, self._loads, strict=True):

            def note(scores_TE: Tensor, chosen_TK: Tensor, load: Tensor = load) -> None:
                if counted:
                    load += torch.bincount(chosen_TK.flatten(), minlength=len(load)).to(load)
                self._seen.append((scores_TE, chosen_TK))

            router.on_scores.append(note)
            hooks.append((router, note))
        try:
            self._seen.clear()
            yield
        finally:
            for router, note in hooks:
                router.on_scores.remove(note)

    def loss(self, layout: Layout) -> Tensor:
        """Σ over layers and sequences of Σ_e f_e·P_e (eq. 17-20 without α): 1 a sequence and layer at an even load.

        f_e = E/(K·T) · tokens of the sequence sent to e; P_e = the mean of its scores, normalised over experts.
        differs: eq. 18 ranks the scores alone; here counts where tokens went, by bias and groups too.
        """
        total = torch.zeros(())
        for scores_TE, chosen_TK in self._seen:
            E = scores_TE.shape[1]
            sequence_T = torch.repeat_interleave(
                torch.arange(len(layout.lengths)), torch.tensor(layout.lengths)
            ).to(scores_TE.device)  # fmt: skip
            length_S = torch.tensor(layout.lengths, device=scores_TE.device, dtype=torch.float32)
            f_SE = scores_TE.new_zeros(len(length_S), E, dtype=torch.float32)
            ones = torch.ones_like(chosen_TK, dtype=torch.float32)
            f_SE.view(-1).index_add_(0, (sequence_T[:, None] * E + chosen_TK).flatten(), ones.flatten())
            f_SE *= E / chosen_TK.shape[1] / length_S[:, None]
            shares_TE = scores_TE.float() / scores_TE.float().sum(-1, keepdim=True)
            P_SE = torch.zeros_like(f_SE).index_add_(0, sequence_T, shares_TE) / length_S[:, None]
            total = total.to(f_SE.device) + (f_SE * P_SE).sum()
        return total

    @torch.no_grad()
    def update(self, speed: float, world: World) -> dict[str, float]:
        """b_e ± speed after a step, down where the load was above the mean; returns the largest load over the mean."""
        worst = 0.0
        for router, load in zip(self.routers, self._loads, strict=True):
            load_E = world.sum(load.clone()).cpu()
            mean = load_E.mean()
            if speed:
                direction = torch.sign(mean - load_E).to(router.e_score_correction_bias)
                router.e_score_correction_bias += speed * direction
            worst = max(worst, float(load_E.max() / mean.clamp_min(1e-9)))
            load.zero_()
        return {"router/max_load": worst} if self.routers else {}
