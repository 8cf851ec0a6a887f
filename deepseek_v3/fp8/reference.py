"""Tensors -> E4M3 codes with a scale per block, and products of such codes: what the kernels must compute.

DeepSeek-V3's FP8 (arXiv 2412.19437, 3.3): activations have a scale for every 1×128 values along K, weights one for
every 128×128. s = max(amax, 1e-4)/448, or the next power of two (UE8M0); codes are x/s to nearest, ties to even. A
product adds up 128 values of K, takes both scales, and goes on in fp32. Every edge may be ragged: a last block holds
what there is.

Plain torch on any device, written for exactness: the 128 products of a block are added in float64, where their sum is
exact, so that results depend neither on the order of adding nor on the other rows. `kernels` computes the same fast.

Shapes: M rows of activations, N rows of weight, K the axis summed over, E experts, I their width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
"""Values along K that share a scale; of a weight, along N as well."""
MAX = 448.0
"""Largest E4M3 value."""
MIN_AMAX = 1e-4
"""A block of smaller values is scaled as if this were its largest: zeros stay zeros, nothing is divided by 0."""
E4M3 = torch.float8_e4m3fn


def quantise_activations(x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """x (..., K) -> codes (..., K), scale (..., ⌈K/128⌉) in fp32.

    Raises ValueError if x holds inf or NaN.
    """
    x = _finite(x)
    scale = _scale(_row_blocks(x).abs().amax(-1), ue8m0)
    return _encode(x / _spread_activation_scale(scale, x)), scale


def quantise_weight(w: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """w (..., N, K) -> codes (..., N, K), scale (..., ⌈N/128⌉, ⌈K/128⌉) in fp32; w ≈ codes × scale.

    Checkpoints call the scale `weight_scale_inv`, "inv" notwithstanding. Raises ValueError if w holds inf or NaN.
    """
    w = _finite(w)
    rows = _row_blocks(w.abs()).amax(-1)  # (..., N, ⌈K/128⌉)
    scale = _scale(_row_blocks(rows.mT).amax(-1).mT.contiguous(), ue8m0)
    return _encode(w / _spread_weight_scale(scale, w)), scale


def silu_mul_quantise(gate_up: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """(..., 2I) of gate values, then up values -> codes and scale of silu(gate) · up, in fp32 till it is quantised."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantise_activations(F.silu(gate) * up, ue8m0=ue8m0)


def dequantise_activations(q: Tensor, scale: Tensor) -> Tensor:
    """Codes (..., K) and their scale -> fp32."""
    check_activations(q, scale)
    return q.float() * _spread_activation_scale(scale, q)


def dequantise_weight(q: Tensor, scale_inv: Tensor) -> Tensor:
    """Codes (..., N, K) and their scale -> fp32."""
    check_weight(q, scale_inv)
    return q.float() * _spread_weight_scale(scale_inv, q)


def scaled_mm(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """a b^T of activations (M, K) and a weight (N, K) -> (M, N)."""
    check_scaled_mm(qa, sa, qb, sb)
    acc = qa.new_zeros(len(qa), len(qb), dtype=torch.float32)
    for k, (a, b) in enumerate(zip(qa.split(BLOCK, dim=1), qb.split(BLOCK, dim=1), strict=True)):
        # Products of E4M3 are multiples of 2^-18 below 2^18: float64 adds 128 of them without rounding.
        exact = (a.double() @ b.double().T).float()
        acc += exact * (sa[:, k, None] * sb[:, k].repeat_interleave(BLOCK)[: len(qb)])
    return acc.to(out_dtype)


def grouped_scaled_mm(
    qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """`scaled_mm` of every expert with its own rows: qa (M, K) sorted by expert, qb (E, N, K) -> (M, N).

    counts_E: rows of each expert, int; an expert may have none.
    """
    check_grouped_scaled_mm(qa, sa, qb, sb, counts_E)
    counts = counts_E.tolist()
    if min(counts) < 0 or sum(counts) != len(qa):
        raise ValueError(f"counts_E: {counts} add up to {sum(counts)}, qa has {len(qa)} rows: give each row an expert")
    parts = zip(qa.split(counts), sa.split(counts), qb, sb, strict=True)
    return torch.cat([scaled_mm(*part, out_dtype=out_dtype) for part in parts])


def require_finite(scale: Tensor) -> None:
    """ValueError if what the scale was made of held inf or NaN.

    The kernels don't look back at their input: such a block gets the scale NaN, and so does every product with it.
    This reads one value in 128, and waits for the device.
    """
    if not bool(scale.isfinite().all()):
        raise ValueError(_NOT_FINITE)


# --- shapes, which the kernels ask for too ---------------------------------------------------------------------------


def blocks(n: int) -> int:
    """⌈n/128⌉."""
    return -(-n // BLOCK)


def check_activations(q: Tensor, scale: Tensor) -> None:
    _check("scale", scale, (*q.shape[:-1], blocks(q.shape[-1])), "a scale for every 128 values of a row")


def check_weight(q: Tensor, scale: Tensor) -> None:
    *leading, N, K = q.shape
    _check("scale_inv", scale, (*leading, blocks(N), blocks(K)), "a scale for every 128×128 values")


def check_scaled_mm(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor) -> None:
    _check_codes(qa, qb, weight_dims=2)
    check_activations(qa, sa)
    check_weight(qb, sb)


def check_grouped_scaled_mm(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, counts_E: Tensor) -> None:
    _check_codes(qa, qb, weight_dims=3)
    check_activations(qa, sa)
    check_weight(qb, sb)
    _check("counts_E", counts_E, (len(qb),), "the number of rows of each expert")


def _check_codes(qa: Tensor, qb: Tensor, *, weight_dims: int) -> None:
    if (qa.dtype, qb.dtype) != (E4M3, E4M3):
        raise ValueError(f"qa, qb: dtypes {qa.dtype} and {qb.dtype}: quantise both to {E4M3} first")
    if (qa.dim(), qb.dim()) != (2, weight_dims) or qa.shape[1] != qb.shape[-1]:
        want = "(M, K) and (N, K)" if weight_dims == 2 else "(M, K) and (E, N, K)"
        raise ValueError(f"qa, qb: shapes {tuple(qa.shape)} and {tuple(qb.shape)}: give {want}")


def _check(name: str, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if x.shape != shape:
        raise ValueError(f"{name}: shape {tuple(x.shape)}: give {shape}, {meaning}")


# --- parts -----------------------------------------------------------------------------------------------------------

_NOT_FINITE = "quantise: inf or NaN among the values: E4M3 has no code for them; look at what computed them"


def _finite(x: Tensor) -> Tensor:
    # Before quantising: whether a cast to E4M3 makes inf a NaN or 448 depends on torch's version.
    x = x.float()
    if not bool(x.isfinite().all()):
        raise ValueError(_NOT_FINITE)
    return x


def _row_blocks(x: Tensor) -> Tensor:
    """(..., K) -> (..., ⌈K/128⌉, 128), filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))


def _scale(amax: Tensor, ue8m0: bool) -> Tensor:
    # By a tensor: by a number, CUDA multiplies by 1/448 and is off by one place.
    scale = amax.clamp(min=MIN_AMAX) / amax.new_full((), MAX)
    if not ue8m0:
        return scale
    # To the next power of two by the bits: any fraction carries into the exponent. A log2 may land on either side.
    bits = scale.view(torch.int32)
    return ((bits + 0x007FFFFF) & 0x7F800000).view(torch.float32)


def _spread_activation_scale(scale: Tensor, x: Tensor) -> Tensor:
    return scale.repeat_interleave(BLOCK, dim=-1)[..., : x.shape[-1]]


def _spread_weight_scale(scale: Tensor, w: Tensor) -> Tensor:
    return _spread_activation_scale(scale.repeat_interleave(BLOCK, dim=-2)[..., : w.shape[-2], :], w)


def _encode(x: Tensor) -> Tensor:
    # amax/s may round to just above 448, where older casts give NaN.
    return x.clamp(-MAX, MAX).to(E4M3)
