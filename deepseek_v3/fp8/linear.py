"""A DeepSeek-V3 -> the same model with its linear layers multiplying in FP8 (arXiv 2412.19437, 3.3).

In FP8: the projections of q, kv and o, dense FFNs, shared and routed experts, also those of an MTP layer. In higher
precision: embedding, head, router, norms, eh_proj, and attention itself. Weights stay what they were, under their
names: they are what is trained, saved and sent to samplers, and codes are made of them.

Backward passes go straight through: quantising has the derivative 1, and gradients are those of the product of what
was dequantised, dX = dY Ŵ and dW = dY^T X̂, in dY's dtype. As in the paper, where they are made of the codes of the
forward pass too; differs: it also quantises dY.

Left out: gradients in FP8, scales that are powers of two, adapters on routed experts.
Shapes as in reference.py and moe.py; M rows are tokens, or in the experts' case (token, expert) pairs.
"""

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deepseek_v3.fp8 import (
    dequantise_activations,
    dequantise_weight,
    grouped_scaled_mm,
    quantise_activations,
    quantise_weight,
    scaled_mm,
    silu_mul_quantise,
)
from deepseek_v3.moe import MLP, Experts, MoE, can_group, mixed_in_groups

Mode = Literal["forward", "train"]

HIGH_PRECISION = ("lm_head", "eh_proj")
"""The linear layers that stay as they are, as in the released checkpoint."""


def use_fp8(model: nn.Module, mode: Mode) -> None:
    """Turn a `DeepseekV3ForCausalLM` over to FP8, or from one mode to the other, in place.

    mode: "forward" keeps the codes of frozen weights, a byte each, until they are written to; for samplers and
        references. "train" makes them at every pass, as FSDP2 needs, whose weights come and go without a trace.
    """
    if not any(isinstance(module, MLP) for module in model.modules()) or hasattr(model, "peft_config"):
        raise ValueError(f"use_fp8: {type(model).__name__}: give a DeepseekV3ForCausalLM, before adapters are added")
    for name, module in model.named_modules():
        if isinstance(module, MoE) and not isinstance(module.experts, Experts):
            raise ValueError(f"use_fp8: {name}.experts is a {type(module.experts).__name__}: call it before that")
        if type(module) in (nn.Linear, Fp8Linear) and not name.endswith(HIGH_PRECISION):
            # The class is changed in place, as FSDP2 does it: hooks stay, and so does whoever refers to the module.
            linear = cast(Fp8Linear, module)
            linear.__class__, linear.codes = Fp8Linear, Codes(mode)
        elif isinstance(module, Experts):
            experts = cast(Fp8Experts, module)
            experts.__class__, experts.gate_up_codes, experts.down_codes = Fp8Experts, Codes(mode), Codes(mode)


class Codes:
    """A weight -> its codes and scale."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._kept: tuple[Tensor, tuple[int, int], tuple[Tensor, Tensor]] | None = None

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # Of what is trained never: torch's fused optimizers write without a new version. Nor of parts or products.
        if self.mode == "train" or weight.requires_grad or not isinstance(weight, nn.Parameter):
            return quantise_weight(weight)
        # Otherwise every write in place makes a new version, but one through `.data`, which is only seen if it moves.
        state = weight._version, weight.data_ptr()
        if self._kept is None or self._kept[0] is not weight or self._kept[1] != state:
            self._kept = weight, state, quantise_weight(weight)
        return self._kept[2]


class _Product(torch.autograd.Function):
    """x̂ ŵ^T in FP8. With counts_E, of each expert's rows with its weight; with `swiglu`, of silu(gate) · up instead of
    x = [gate, up]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, codes: Codes, counts_E: Tensor | None, swiglu: bool, dtype: torch.dtype
    ) -> Tensor:
        qa, sa = silu_mul_quantise(x) if swiglu else quantise_activations(x)
        ctx.codes, ctx.swiglu, ctx.dtype = codes, swiglu, x.dtype
        # As in the paper (3.3.3): codes of x, a byte each; of a SwiGLU its inputs, to compute it again.
        ctx.save_for_backward(weight, counts_E, *((x,) if swiglu else (qa, sa)))
        if counts_E is None:
            return scaled_mm(qa, sa, *codes(weight), dtype)
        return grouped_scaled_mm(qa, sa, *codes(weight), counts_E, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y_MN: Tensor) -> tuple[Tensor | None, ...]:
        weight, counts_E, *operand = ctx.saved_tensors
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            w = dequantise_weight(*ctx.codes(weight)).to(d_y_MN.dtype)
            d_x = _d_x(d_y_MN, w, counts_E)
            d_x = (_d_swiglu(d_x, *operand) if ctx.swiglu else d_x).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            x = dequantise_activations(*(silu_mul_quantise(*operand) if ctx.swiglu else operand)).to(d_y_MN.dtype)
            d_weight = _d_weight(d_y_MN, x, weight, counts_E).to(weight.dtype)
        return d_x, d_weight, None, None, None, None


def _d_x(d_y_MN: Tensor, w: Tensor, counts_E: Tensor | None) -> Tensor:
    if counts_E is None:
        return d_y_MN @ w
    if can_group(d_y_MN, w, w.mT):
        return F.grouped_mm(d_y_MN, w, offs=counts_E.cumsum(0, dtype=torch.int32))
    return torch.cat([d_y @ w_NK for d_y, w_NK in zip(d_y_MN.split(counts_E.tolist()), w, strict=True)])


def _d_weight(d_y_MN: Tensor, x_MK: Tensor, weight: Tensor, counts_E: Tensor | None) -> Tensor:
    if counts_E is None:
        return d_y_MN.T @ x_MK
    if can_group(d_y_MN, weight, weight.mT):
        return F.grouped_mm(d_y_MN.T, x_MK, offs=counts_E.cumsum(0, dtype=torch.int32))
    counts = counts_E.tolist()
    return torch.stack([d_y.T @ x for d_y, x in zip(d_y_MN.split(counts), x_MK.split(counts), strict=True)])


def _d_swiglu(d_h_SI: Tensor, gate_up_SJ: Tensor) -> Tensor:
    """Of silu(gate) · up, to both."""
    gate_SI, up_SI = gate_up_SJ.to(d_h_SI.dtype).chunk(2, dim=-1)
    d_gate_SI = torch.ops.aten.silu_backward(d_h_SI * up_SI, gate_SI)
    return torch.cat([d_gate_SI, d_h_SI * F.silu(gate_SI)], dim=-1)


def _result_dtype(x: Tensor) -> torch.dtype:
    """autocast's, where it is on: it doesn't reach into our own functions."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class Fp8Linear(nn.Linear):
    """`nn.Linear` in FP8."""

    codes: Codes

    def forward(self, x: Tensor) -> Tensor:
        dtype = _result_dtype(x)
        y_MN = _Product.apply(x.reshape(-1, self.in_features), self.weight, self.codes, None, False, dtype)
        y = y_MN.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)

    @torch.no_grad()
    def rounded(self, x: Tensor) -> Tensor:
        """x as the product takes it in."""
        return dequantise_activations(*quantise_activations(x)).to(x.dtype)


class Fp8Experts(Experts):
    """`Experts` in FP8: two grouped products, silu and quantising between them in one."""

    gate_up_codes: Codes
    down_codes: Codes

    def forward(self, x_TD: Tensor, chosen_TK: Tensor, gates_TK: Tensor) -> Tensor:
        return mixed_in_groups(x_TD, chosen_TK, gates_TK, self.gate_up_proj, self.down_proj, self._products)

    def _products(self, x_SD: Tensor, gate_up_EJD: Tensor, down_EDI: Tensor, counts_E: Tensor) -> Tensor:
        dtype = _result_dtype(x_SD)
        gate_up_SJ = _Product.apply(x_SD, gate_up_EJD, self.gate_up_codes, counts_E, False, dtype)
        return _Product.apply(gate_up_SJ, down_EDI, self.down_codes, counts_E, True, dtype)
