"""Token states -> expert choice -> mixed expert outputs: DeepSeekMoE with V3's router (arXiv 2412.19437, 2.1.2).

Shapes: T tokens, D hidden, E routed experts, K chosen per token, I expert width.
Left out here: the bias update and the balance loss of pre-training.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DeepseekV3Config


class MLP(nn.Module):
    """W_down(silu(W_gate x) · W_up x): V3's dense feed-forward, and its shared expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """x_TD -> the K experts of each token and their gates (eq. 12-16).

    The bias b steers the choice only; gates come from the unbiased scores. Experts compete within the best
    `topk_group` of `n_group` groups; the others are out by −inf, so a negative bias can't let them back in.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.n_group = config.n_group
        self.topk_group = config.topk_group
        self.normalise = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))
        # Each is given a forward's choice (T, K) and returns the one to take: routing.py records and replays by them.
        self.on_choice: list[Callable[[Tensor], Tensor]] = []
        # Each is shown a forward's scores (T, E) and the choice taken: what balancing loads looks at.
        self.on_scores: list[Callable[[Tensor, Tensor], None]] = []

    def _apply(self, fn: Any, recurse: bool = True) -> "Router":
        # b accumulates steps of 0.001 and is released in fp32: a cast of the model must not round it.
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype != exact.dtype:
            self.e_score_correction_bias = exact.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        # fp32: near-ties between experts must fall alike in the trainer and in the sampler.
        with torch.autocast(x_TD.device.type, enabled=False):
            s_TE = F.linear(x_TD.float(), self.weight.float()).sigmoid()
        c_TE = s_TE.detach() + self.e_score_correction_bias
        if self.n_group > 1:
            c_TGe = c_TE.view(len(c_TE), self.n_group, -1)
            group_scores_TG = c_TGe.topk(2, dim=-1).values.sum(-1)
            kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
            kept_TG.scatter_(1, group_scores_TG.topk(self.topk_group, dim=-1).indices, True)
            c_TE = c_TGe.masked_fill(~kept_TG[..., None], float("-inf")).flatten(1)
        chosen_TK = c_TE.topk(self.top_k, dim=-1).indices
        for hook in self.on_choice:
            chosen_TK = hook(chosen_TK)
        for show in self.on_scores:
            show(s_TE, chosen_TK)
        gates_TK = s_TE.gather(1, chosen_TK)
        if self.normalise:
            gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
        return chosen_TK, gates_TK * self.scale


MANY_TOKENS = 128
"""From so many tokens on, no token's output depends on the others' on a CPU, not even in its last bit."""
_MIN_ROWS = 16


def _rowwise_linear(x_SD: Tensor, weight: Tensor) -> Tensor:
    """x W^T. CPU libraries add up products of a few rows in another order than of many: few are padded."""
    rows = len(x_SD)
    if rows == 0 or rows >= _MIN_ROWS:
        return F.linear(x_SD, weight)
    return F.linear(F.pad(x_SD, (0, 0, 0, _MIN_ROWS - rows)), weight)[:rows]


class Experts(nn.Module):
    """The routed experts, fused as transformers v5 keeps them; checkpoints hold them one by one."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Σ_k gate_k · expert_k(x). Each expert sees its tokens in one contiguous block; none is dropped."""
        T, K = chosen_TK.shape
        expert_S = chosen_TK.flatten()  # S = T·K (token, expert) pairs
        order_S = expert_S.argsort(stable=True)
        counts_E = torch.bincount(expert_S, minlength=len(self.gate_up_proj)).tolist()

        def by_expert(x_SD: Tensor, weight: Tensor) -> Tensor:
            # unbind once: indexing a fused parameter per expert would add a full-size gradient for each.
            blocks = zip(x_SD.split(counts_E), weight.unbind(0), strict=True)
            return torch.cat([linear(x, w) for x, w in blocks])

        linear = _rowwise_linear if x_TD.device.type == "cpu" and T >= MANY_TOKENS else F.linear

        gate_SI, up_SI = by_expert(x_TD[order_S // K], self.gate_up_proj).chunk(2, dim=-1)
        y_SD = by_expert(F.silu(gate_SI) * up_SI, self.down_proj)
        # Back to token order by a gather (not index_add_): the sum over k is then deterministic.
        place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(T * K, device=order_S.device))
        return (y_SD[place_S].view(T, K, -1) * gates_TK[..., None].to(y_SD.dtype)).sum(1)


class MoE(nn.Module):
    """Routed experts plus the shared expert, which sees every token unweighted."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)
        self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        chosen_TK, gates_TK = self.gate(x_TD)
        return self.experts(x_TD, chosen_TK, gates_TK) + self.shared_experts(x_TD)
