"""Token states -> expert choice -> mixed expert outputs: DeepSeekMoE with V3's router (arXiv 2412.19437, 2.1.2).

The experts' products run in one of two ways: one by one (`_Mixed`: CPUs, and fp32 on CUDA), or as grouped matrix
products (bf16 on CUDA).

Shapes: T tokens, D hidden, E routed experts, K chosen per token, I expert width, J = 2·I; S = T·K (token, expert) pairs
sorted by expert, s those of a block of experts.
Left out here: the bias update and the balance loss of pre-training; FP8 is fp8/linear.py.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    ValueError when those groups haven't K experts.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, K, groups, kept = config.n_routed_experts, config.num_experts_per_tok, config.n_group, config.topk_group
        if E % groups or kept > groups or E // groups * kept < K or (groups > 1 and E // groups < 2):
            raise ValueError(
                f"n_group={groups}, topk_group={kept}: {E} experts (n_routed_experts) must fall into equal groups of "
                f"two or more, and those kept have num_experts_per_tok={K} or more; lower n_group or raise topk_group"
            )
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
_BLOCK_ROWS = 1024
"""Of experts computed together: few enough for a cache, enough that a call costs little beside its arithmetic."""


class _Mixed(torch.autograd.Function):
    """Σ_k gate_k · expert_k(x), a block of experts after the other: its rows stay in the cache from gather to sum.

    Only the products with W_gate and W_up are kept for the backward pass, block by block: one of their full size
    would be asked of the system and zeroed anew each time. Gates are applied before W_down, where rows are shortest.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor
    ) -> Tensor:
        T, K = chosen_TK.shape
        exact = x_TD.device.type == "cpu" and T >= MANY_TOKENS
        expert_S = chosen_TK.flatten()  # S = T·K (token, expert) pairs
        order_S = expert_S.argsort(stable=True)
        ctx.blocks = _blocks(torch.bincount(expert_S, minlength=len(gate_up_EJD)).tolist())
        rows = [sum(counts) for _, counts in ctx.blocks]
        tokens, gates = (order_S // K).split(rows), gates_TK.flatten()[order_S, None].split(rows)
        gate_up, down = gate_up_EJD.mT.unbind(), down_EDI.mT.unbind()
        out_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        products = []
        for (experts, counts), token_s, gate_s1 in zip(ctx.blocks, tokens, gates, strict=True):
            gate_up_sJ = _products(x_TD.index_select(0, token_s), gate_up[experts], counts, exact=exact)
            gate_sI, up_sI = gate_up_sJ.chunk(2, dim=-1)
            h_sI = F.silu(gate_sI).mul_(up_sI).mul_(gate_s1)
            out_TD.index_add_(0, token_s, _products(h_sI, down[experts], counts, exact=exact).to(out_TD.dtype))
            products.append(gate_up_sJ)
        ctx.save_for_backward(x_TD, gates_TK, gate_up_EJD, down_EDI, order_S, *products)
        return out_TD.to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gates_TK, gate_up_EJD, down_EDI, order_S, *products = ctx.saved_tensors
        _, _, _, train_gate_up, train_down = ctx.needs_input_grad
        rows = [len(product) for product in products]
        tokens = (order_S // gates_TK.shape[1]).split(rows)
        gates = gates_TK.flatten()[order_S, None].split(rows)
        gate_up, down = gate_up_EJD.unbind(), down_EDI.unbind()
        d_x_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
        d_gate_up_EJD = torch.empty_like(gate_up_EJD) if train_gate_up else None
        d_down_EDI = torch.empty_like(down_EDI) if train_down else None
        d_gates = []
        for (experts, counts), token_s, gate_s1, gate_up_sJ in zip(ctx.blocks, tokens, gates, products, strict=True):
            gate_sI, up_sI = gate_up_sJ.chunk(2, dim=-1)
            d_y_sD = d_out_TD.index_select(0, token_s)
            d_h_sI = _products(d_y_sD, down[experts], counts)
            silu_sI = F.silu(gate_sI)
            h_sI = silu_sI * up_sI
            d_gates.append((d_h_sI * h_sI).sum(-1))
            if d_down_EDI is not None:
                _outer_products(d_y_sD, h_sI.mul_(gate_s1), counts, out=d_down_EDI[experts])
            d_h_sI.mul_(gate_s1)
            d_gate_up_sJ = torch.empty_like(gate_up_sJ)
            d_gate_sI, d_up_sI = d_gate_up_sJ.chunk(2, dim=-1)
            torch.mul(d_h_sI, silu_sI, out=d_up_sI)
            torch.ops.aten.silu_backward.grad_input(d_h_sI.mul_(up_sI), gate_sI, grad_input=d_gate_sI)
            if d_gate_up_EJD is not None:
                _outer_products(d_gate_up_sJ, x_TD.index_select(0, token_s), counts, out=d_gate_up_EJD[experts])
            d_x_TD.index_add_(0, token_s, _products(d_gate_up_sJ, gate_up[experts], counts).to(d_x_TD.dtype))
        d_gates_S = torch.empty_like(gates_TK).flatten().index_copy_(0, order_S, torch.cat(d_gates).to(gates_TK.dtype))
        return d_x_TD.to(x_TD.dtype), None, d_gates_S.view_as(gates_TK), d_gate_up_EJD, d_down_EDI


def _blocks(counts: list[int]) -> list[tuple[slice, list[int]]]:
    """Rows of each expert -> neighbours that have up to _BLOCK_ROWS together, or one that has more; and their rows."""
    bounds, rows = [0], 0
    for e, count in enumerate(counts):
        if rows and rows + count > _BLOCK_ROWS:
            bounds.append(e)
            rows = 0
        rows += count
    return [(slice(a, b), counts[a:b]) for a, b in pairwise([*bounds, len(counts)])]


def _products(x_sI: Tensor, weights: Sequence[Tensor], counts: list[int], *, exact: bool = False) -> Tensor:
    """x W_e of each expert's rows, W_e (I, O).

    exact: CPU libraries add up products of a few rows in another order than of many, so few are padded.
    """
    out_sO = x_sI.new_empty(len(x_sI), weights[0].shape[1])
    for x, weight, out in zip(x_sI.split(counts), weights, out_sO.split(counts), strict=True):
        if exact and 0 < len(x) < _MIN_ROWS:
            out.copy_(torch.mm(F.pad(x, (0, 0, 0, _MIN_ROWS - len(x))), weight)[: len(x)])
        else:
            torch.mm(x, weight, out=out)
    return out_sO


def _outer_products(a_sO: Tensor, b_sI: Tensor, counts: list[int], *, out: Tensor) -> None:
    """a^T b of each expert's rows, (O, I) each."""
    for a, b, product in zip(a_sO.split(counts), b_sI.split(counts), out.unbind(), strict=True):
        torch.mm(a.T, b, out=product)


def grouped_linear(x_SI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """x W_e^T, the first counts_E[0] rows by expert 0, and so on: one kernel on CUDA, nothing waits for the host."""
    return F.grouped_mm(x_SI, weight_EOI.mT, offs=counts_E.cumsum(0, dtype=torch.int32))


def can_group(x_TD: Tensor, *weights: Tensor) -> bool:
    """Whether CUDA has a kernel for `grouped_linear`: bf16, rows of a multiple of 16 bytes, Ampere or later."""
    if not x_TD.is_cuda or x_TD.dtype != torch.bfloat16 or len(x_TD) == 0:
        return False
    return all(w.shape[-1] % 8 == 0 for w in weights) and torch.cuda.get_device_capability(x_TD.device) >= (8, 0)


class _Rows(torch.autograd.Function):
    """x[rows], each row of x K times. Gradients are gathered too: `back` says where. Scattered, they'd be added up in
    any order on CUDA."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows_S: Tensor, back_S: Tensor, K: int) -> Tensor:
        ctx.save_for_backward(back_S)
        ctx.K = K
        return x.index_select(0, rows_S)

    @staticmethod
    def backward(ctx: Any, d_y_SD: Tensor) -> tuple[Tensor | None, ...]:
        (back_S,) = ctx.saved_tensors
        return d_y_SD.index_select(0, back_S).view(-1, ctx.K, d_y_SD.shape[1]).sum(1), None, None, None


def grouped_mlp(x_SD: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert of its own rows."""
    gate_SI, up_SI = grouped_linear(x_SD, gate_up_EJD, counts_E).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate_SI) * up_SI, down_EDI, counts_E)


def mixed_in_groups(
    x_TD: Tensor,
    chosen_TK: Tensor,
    gates_TK: Tensor,
    gate_up_EJD: Tensor,
    down_EDI: Tensor,
    mlp: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = grouped_mlp,
) -> Tensor:
    """Σ_k gate_k · expert_k(x), all experts at once; `mlp` as `grouped_mlp`."""
    T, K = chosen_TK.shape
    expert_S = chosen_TK.flatten()
    order_S = expert_S.argsort(stable=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(T * K, device=order_S.device))
    # bincount would wait for the host.
    counts_E = expert_S.new_zeros(len(gate_up_EJD)).scatter_add_(0, expert_S, torch.ones_like(expert_S))
    y_SD = mlp(_Rows.apply(x_TD, order_S // K, place_S, K), gate_up_EJD, down_EDI, counts_E)
    y_TKD = _Rows.apply(y_SD, place_S, order_S, 1).view(T, K, x_TD.shape[1])
    return (y_TKD * gates_TK[..., None].to(y_SD.dtype)).sum(1)


class Experts(nn.Module):
    """The routed experts, fused as transformers v5 keeps them; checkpoints hold them one by one."""

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        E, D, I = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Σ_k gate_k · expert_k(x). Each expert sees its tokens in one contiguous block; none is dropped."""
        # Once each: an adapter computes them on every access.
        gate_up_EJD: Tensor = self.gate_up_proj
        down_EDI: Tensor = self.down_proj
        if torch.is_autocast_enabled(x_TD.device.type):  # neither way below is an autocast function
            dtype = torch.get_autocast_dtype(x_TD.device.type)
            x_TD, gate_up_EJD, down_EDI = x_TD.to(dtype), gate_up_EJD.to(dtype), down_EDI.to(dtype)
        if can_group(x_TD, gate_up_EJD, down_EDI):
            return mixed_in_groups(x_TD, chosen_TK, gates_TK, gate_up_EJD, down_EDI)
        return _Mixed.apply(x_TD, chosen_TK, gates_TK, gate_up_EJD, down_EDI)


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
