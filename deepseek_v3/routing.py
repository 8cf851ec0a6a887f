"""A model -> which experts its tokens were sent to; and recorded choices -> a forward that takes them again.

A sampler and a trainer that differ by rounding choose other experts for some tokens, and a token sent elsewhere gets
another log-prob. Rollout routing replay (R3, arXiv 2510.11370) gives the update the sampler's choices; how many would
have differed, the flips, is worth watching either way. Selection alone is replayed: gates are computed from the
scores of the current weights, with their gradient, normalised and scaled as ever.

Left out: routers other than `deepseek_v3.moe.Router`, and replacing the choice of some layers only.
Shapes: L mixture-of-experts layers in the model's order, T tokens, K experts per token; −1 for all K: not recorded.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deepseek_v3.moe import Router
from deepseek_v3.mtp import MTPBlock


def has_routers(model: nn.Module) -> bool:
    """Whether there is anything here to record or replay."""
    return bool(_routers(model))


@dataclass
class Flips:
    """How often recorded experts were not those the model itself would choose, as sets."""

    flipped: int = 0
    """Tokens × layers that would be sent elsewhere."""
    total: int = 0
    """Tokens × layers with a recorded choice."""

    @property
    def rate(self) -> float:
        """Their share; 0 when nothing was recorded."""
        return self.flipped / max(self.total, 1)


def set_flips(a_LTK: Tensor, b_LTK: Tensor) -> tuple[int, int]:
    """(tokens × layers whose two sets of experts differ, tokens × layers where both are recorded)."""
    recorded = (a_LTK[..., 0] >= 0) & (b_LTK[..., 0] >= 0)
    differ = (a_LTK.sort(dim=-1).values != b_LTK.sort(dim=-1).values).any(-1)
    return int((differ & recorded).sum()), int(recorded.sum())


class Choices:
    """What `recorded` collects."""

    def __init__(self, layers: int) -> None:
        self._parts: list[list[Tensor]] = [[] for _ in range(layers)]

    @property
    def chosen_LTK(self) -> Tensor:
        """int16, the tokens of all forwards so far end to end."""
        if not all(self._parts):
            raise ValueError(f"no forward has reached all {len(self._parts)} routers: there is no choice to return")
        return torch.stack([torch.cat(parts) for parts in self._parts])


@contextmanager
def recorded(model: nn.Module) -> Iterator[Choices]:
    """Collect the experts of every token of every forward inside. What a backward recomputes isn't collected again."""
    routers = _routers(model)
    choices = Choices(len(routers))

    def collecting(parts: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def collect(chosen_TK: Tensor) -> Tensor:
            if not _recomputing():
                parts.append(chosen_TK.to(torch.int16))
            return chosen_TK

        return collect

    with _on_choice(routers, [collecting(parts) for parts in choices._parts]):
        yield choices


@contextmanager
def replayed(model: nn.Module, chosen_LTK: Tensor, *, use: bool = True, flips: Flips | None = None) -> Iterator[Flips]:
    """Send the tokens of all forwards inside, in order, to the given experts; count those that would go elsewhere.

    use=False only counts. Tokens with −1 choose freely and aren't counted. Counts are added to `flips`, if given.
    The backward pass belongs inside as well: checkpointed blocks run their forward again in it, and would choose for
    themselves outside; here each takes what it took the first time, and nothing is counted twice.

    Raises ValueError when shapes don't fit or, on leaving, when the forwards had fewer tokens than were given.
    """
    routers = _routers(model)
    _check(chosen_LTK, routers)
    flips = Flips() if flips is None else flips
    layers = [_Replay(given_TK, use, flips) for given_TK in chosen_LTK]
    with _on_choice(routers, layers):
        yield flips
    for i, layer in enumerate(layers):
        if layer.seen != chosen_LTK.shape[1]:
            raise ValueError(f"replay: {chosen_LTK.shape[1]} tokens given, forwards took {layer.seen} (MoE layer {i})")


class _Replay:
    """One layer's part of a replay."""

    def __init__(self, given_TK: Tensor, use: bool, flips: Flips) -> None:
        self.given_TK, self.use, self.flips = given_TK, use, flips
        self.seen = 0
        self.calls: list[tuple[Tensor, Tensor]] = []  # of each forward: its own choice, and the one it took

    def __call__(self, own_TK: Tensor) -> Tensor:
        if _recomputing():
            return self._again(own_TK) if self.use else own_TK
        start, self.seen = self.seen, self.seen + len(own_TK)
        if self.seen > len(self.given_TK):
            raise ValueError(
                f"replay: {len(self.given_TK)} tokens given, but after {start} of them a forward brings {len(own_TK)}"
            )
        given_TK = self.given_TK[start : self.seen].to(own_TK)
        flipped, total = set_flips(given_TK, own_TK)
        self.flips.flipped += flipped
        self.flips.total += total
        if not self.use:
            return own_TK
        taken_TK = torch.where(given_TK < 0, own_TK, given_TK)
        self.calls.append((own_TK, taken_TK))
        return taken_TK

    def _again(self, own_TK: Tensor) -> Tensor:
        """What was taken by the forward that is being recomputed. Nothing says which that is, and backwards come in
        any order, so it is the one whose own choices recur; the latest if it doesn't matter."""
        alike = [call for call in reversed(self.calls) if call[0].shape == own_TK.shape]
        if not alike:
            raise ValueError(f"replay: a backward recomputes {len(own_TK)} tokens of a forward outside the replay")
        if len(alike) == 1:
            return alike[0][1]
        return min(alike, key=lambda call: int((call[0] != own_TK).sum()))[1]


def _routers(model: nn.Module) -> list[Router]:
    """Those of the main layers: what the MTP layer predicts is sampled by nobody."""
    others = {part for module in model.modules() if isinstance(module, MTPBlock) for part in module.modules()}
    return [module for module in model.modules() if isinstance(module, Router) and module not in others]


@contextmanager
def _on_choice(routers: Sequence[Router], hooks: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
    for router, hook in zip(routers, hooks, strict=True):
        router.on_choice.append(hook)
    try:
        yield
    finally:
        for router, hook in zip(routers, hooks, strict=True):
            router.on_choice.remove(hook)


def _recomputing() -> bool:
    """Inside a backward pass: torch's own way to know, in torch.utils.checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _check(chosen_LTK: Tensor, routers: Sequence[Router]) -> None:
    if not routers:
        raise ValueError("replay: the model has no routers")
    K, E = routers[0].top_k, len(routers[0].weight)
    if chosen_LTK.dim() != 3 or (len(chosen_LTK), chosen_LTK.shape[2]) != (len(routers), K):
        raise ValueError(
            f"replay: choices of shape {tuple(chosen_LTK.shape)}; the model has {len(routers)} MoE layers and {K} "
            f"experts per token: give ({len(routers)}, tokens, {K})"
        )
    if chosen_LTK.numel() == 0:
        return
    ordered = chosen_LTK.sort(dim=-1).values
    if int(ordered.min()) < -1 or int(ordered.max()) >= E:
        raise ValueError(f"replay: experts {int(ordered.min())}..{int(ordered.max())}; the model has 0..{E - 1}")
    # One expert twice, or some of K at −1: what the all-zero row of a dense layer, or a bad join, looks like.
    wrong = (ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0) | (ordered[..., :1] < 0) & (ordered[..., 1:] >= 0)
    if bool(wrong.any()):
        layer, token, _ = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"replay: token {token} of MoE layer {layer} has experts {chosen_LTK[layer, token].tolist()}: give "
            f"{K} different ones, or −1 for all"
        )
