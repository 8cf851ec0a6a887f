"""FP8 as DeepSeek-V3 trained with it: `kernels` (Triton) for CUDA tensors, `reference` (torch) elsewhere.

Shapes, scales and what is refused: see `reference`. On CUDA inf and NaN turn the block's scale into NaN instead of
raising, because looking would wait for the device: `require_finite(scale)` asks.
"""

from typing import Any

import torch
from torch import Tensor

from deepseek_v3.fp8 import reference
from deepseek_v3.fp8.reference import require_finite

__all__ = [
    "dequantise_activations",
    "dequantise_weight",
    "grouped_scaled_mm",
    "quantise_activations",
    "quantise_weight",
    "require_finite",
    "scaled_mm",
    "silu_mul_quantise",
]


def quantise_activations(x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return _on(x).quantise_activations(x, ue8m0=ue8m0)


def quantise_weight(w: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return _on(w).quantise_weight(w, ue8m0=ue8m0)


def silu_mul_quantise(gate_up: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return _on(gate_up).silu_mul_quantise(gate_up, ue8m0=ue8m0)


def dequantise_activations(q: Tensor, scale: Tensor) -> Tensor:
    return _on(q).dequantise_activations(q, scale)


def dequantise_weight(q: Tensor, scale_inv: Tensor) -> Tensor:
    return _on(q).dequantise_weight(q, scale_inv)


def scaled_mm(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return _on(qa).scaled_mm(qa, sa, qb, sb, out_dtype)


def grouped_scaled_mm(
    qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    return _on(qa).grouped_scaled_mm(qa, sa, qb, sb, counts_E, out_dtype)


def _on(x: Tensor) -> Any:
    """The module that computes where x is."""
    if x.device.type != "cuda":
        return reference
    from deepseek_v3.fp8 import kernels  # here, so that the package needs no Triton where there is no GPU

    return kernels
