"""What `reference` computes, in Triton on Hopper: codes and scales bit for bit, products up to the order of adding.

Quantisers read every value once, in tiles of whole blocks; x/s is rounded exactly as a division, at the price of two
multiply-adds. Inf or NaN makes the block's scale NaN. One kernel multiplies, for plain weights and for experts: codes
come by TMA, and every 128 of K the sum leaves the tensor core's accumulator, which keeps about 14 bits, for fp32, with
both scales in one multiply-add. The counts of the experts' rows stay on the device: nothing waits for the host.

Left out: splitting K over programs (a row's result would then depend on how many rows there are) and, before sm90,
speed. With TRITON_INTERPRET=1 set before the import, all this runs on CPU tensors, to check indices by.
"""
# mypy: disable-error-code="no-untyped-def,assignment"
# Triton compiles functions of its own language: types of parameters mean constants to it.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_v3.fp8.reference import (
    E4M3,
    blocks,
    check_activations,
    check_grouped_scaled_mm,
    check_scaled_mm,
    check_weight,
)

BLOCK = tl.constexpr(128)
_MAX = tl.constexpr(448.0)
_MIN_AMAX_BITS = tl.constexpr(0x38D1B717)  # of 1e-4 in fp32
_INF_BITS = tl.constexpr(0x7F800000)
_SIGN = tl.constexpr(-(2**31))


# --- quantise --------------------------------------------------------------------------------------------------------


@triton.jit
def _magnitude(x):
    """|x| as an integer: ordered as the values are, NaN above inf above all numbers."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale_of(amax_bits, UE8M0: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax_bits, _MIN_AMAX_BITS).to(tl.float32, bitcast=True), _MAX)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x007FFFFF) & _INF_BITS).to(tl.float32, bitcast=True)
    return tl.where(amax_bits < _INF_BITS, scale, float("nan"))


@triton.jit
def _encode(x, scale):
    # The quotient by the rounded reciprocal, corrected by its remainder, is the rounded quotient (Markstein 1990); but
    # the correction of −0 is 0, so the sign is put back.
    inverse = tl.div_rn(1.0, scale)
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, scale, x), inverse, quotient)
    sign = x.to(tl.int32, bitcast=True) & _SIGN
    quotient = (quotient.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.clamp(quotient, -_MAX, _MAX).to(tl.float8e4nv)


@triton.jit
def _quantise_rows(
    x, q, scale, M, K, x_row, scale_block, SILU: tl.constexpr, UE8M0: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """A tile of ROWS×128 and its ROWS scales, which are stored next to each other."""
    tiles_k = tl.cdiv(K, BLOCK)
    block = tl.program_id(0) % tiles_k
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < M)[:, None] & (columns < K)[None, :]
    at = x + rows[:, None] * x_row + columns[None, :]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        values = values * tl.sigmoid(values) * tl.load(at + K, mask=inside, other=0.0).to(tl.float32)
    scales = _scale_of(tl.max(_magnitude(values), axis=1), UE8M0)
    tl.store(q + rows[:, None] * K + columns[None, :], _encode(values, scales[:, None]), mask=inside)
    tl.store(scale + block.to(tl.int64) * scale_block + rows, scales, mask=rows < M)


@triton.jit
def _quantise_blocks(w, q, scale, N, K, w_expert, w_row, UE8M0: tl.constexpr):
    """A tile of 128×128 and its scale."""
    tiles_n, tiles_k = tl.cdiv(N, BLOCK), tl.cdiv(K, BLOCK)
    tile = tl.program_id(0)
    expert = (tile // (tiles_n * tiles_k)).to(tl.int64)
    rows = (tile // tiles_k % tiles_n * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = tile % tiles_k * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    at = w + expert * w_expert + rows[:, None] * w_row + columns[None, :]
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    one = _scale_of(tl.max(tl.max(_magnitude(values), axis=1), axis=0), UE8M0)
    at = q + expert * N * K + rows[:, None] * K + columns[None, :]
    tl.store(at, _encode(values, one), mask=inside)
    tl.store(scale + tile, one)


@triton.jit
def _dequantise(
    q, scale, out, N, K, scale_expert, scale_row, scale_block, ROWS: tl.constexpr, ROWS_PER_SCALE: tl.constexpr
):  # fmt: skip
    """A tile of ROWS×128."""
    tiles_n, tiles_k = tl.cdiv(N, ROWS), tl.cdiv(K, BLOCK)
    tile = tl.program_id(0)
    expert = (tile // (tiles_n * tiles_k)).to(tl.int64)
    block = tile % tiles_k
    rows = (tile // tiles_k % tiles_n * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    at = expert * N * K + rows[:, None] * K + columns[None, :]
    at_scale = expert * scale_expert + rows // ROWS_PER_SCALE * scale_row + block.to(tl.int64) * scale_block
    scales = tl.load(scale + at_scale, mask=rows < N, other=0.0)
    tl.store(out + at, tl.load(q + at, mask=inside, other=0.0).to(tl.float32) * scales[:, None], mask=inside)


def quantise_activations(x: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    """As `reference`; scales of one block lie next to each other, as `scaled_mm` and torch's read them fastest."""
    return _quantise(x, x.shape[-1], silu=False, ue8m0=ue8m0)


def silu_mul_quantise(gate_up: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    return _quantise(gate_up, gate_up.shape[-1] // 2, silu=True, ue8m0=ue8m0)


def _quantise(x: Tensor, K: int, *, silu: bool, ue8m0: bool) -> tuple[Tensor, Tensor]:
    *leading, width = x.shape
    rows = x.reshape(-1, width)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    M = len(rows)
    q = x.new_empty(*leading, K, dtype=E4M3)
    scale = x.new_empty(blocks(K), M, dtype=torch.float32).T
    if q.numel():
        grid = (triton.cdiv(M, _QUANTISE_ROWS) * blocks(K),)
        _quantise_rows[grid](
            rows, q, scale, M, K, rows.stride(0), M, SILU=silu, UE8M0=ue8m0, ROWS=_QUANTISE_ROWS, num_warps=4
        )  # fmt: skip
    return q, scale.view(*leading, blocks(K))


_QUANTISE_ROWS = 32


def quantise_weight(w: Tensor, *, ue8m0: bool = False) -> tuple[Tensor, Tensor]:
    *leading, N, K = w.shape
    experts = w.reshape(-1, N, K)
    experts = experts if experts.stride(2) == 1 else experts.contiguous()
    q = w.new_empty(w.shape, dtype=E4M3)
    scale = w.new_empty(*leading, blocks(N), blocks(K), dtype=torch.float32)
    if q.numel():
        strides = experts.stride()[:2]
        _quantise_blocks[(scale.numel(),)](experts, q, scale, N, K, *strides, UE8M0=ue8m0, num_warps=8)
    return q, scale


def dequantise_activations(q: Tensor, scale: Tensor) -> Tensor:
    check_activations(q, scale)
    K = q.shape[-1]
    return _dequantised(q.reshape(1, -1, K), scale.reshape(1, -1, blocks(K)), rows_per_scale=1).view(q.shape)


def dequantise_weight(q: Tensor, scale_inv: Tensor) -> Tensor:
    check_weight(q, scale_inv)
    *_, N, K = q.shape
    experts, scales = q.reshape(-1, N, K), scale_inv.reshape(-1, blocks(N), blocks(K))
    return _dequantised(experts, scales, rows_per_scale=BLOCK.value).view(q.shape)


def _dequantised(q: Tensor, scale: Tensor, *, rows_per_scale: int) -> Tensor:
    E, N, K = q.shape
    out = q.new_empty(q.shape, dtype=torch.float32)
    if q.numel():
        grid = (E * triton.cdiv(N, 32) * blocks(K),)
        _dequantise[grid](
            q.contiguous(), scale, out, N, K, *scale.stride(), ROWS=32, ROWS_PER_SCALE=rows_per_scale, num_warps=4
        )  # fmt: skip
    return out


# --- multiply --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M", "bucket"])
def _matmul(
    a, b, c, sa, sb, counts, M, N, K, E, bucket, sa_row, sa_block, sb_expert, sb_row, sb_block,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, E_POWER: tl.constexpr,
):  # fmt: skip
    """A tile of c = a b^T, PART columns at a time; `bucket` chooses a configuration.

    A part lies in one block of the weight, so that its weight scale is one number. While the tensor cores work on a
    part, the one before is scaled and added.
    """
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(N, BLOCK_N)
    if counts is None:
        tiles_m = tl.cdiv(M, BLOCK_M)
    else:
        experts = tl.arange(0, E_POWER)
        rows_E = tl.load(counts + experts, mask=experts < E, other=0).to(tl.int32)
        tiles_E = tl.cdiv(rows_E, BLOCK_M)
        last_tile_E = tl.cumsum(tiles_E, 0)
        tiles_m = tl.max(last_tile_E, 0)
        if tile >= tiles_m * tiles_n:
            return

    # Programs that run together share rows of a and of b in L2: go down 8 tiles before the next column.
    first = tile // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - first, 8)
    tile_m = first + tile % (8 * tiles_n) % height
    n = tile % (8 * tiles_n) // height * BLOCK_N
    if counts is None:
        expert = 0
        m = tile_m * BLOCK_M
        end = M
    else:
        expert = tl.sum((last_tile_E <= tile_m).to(tl.int32), 0)
        before = experts < expert
        start = tl.sum(tl.where(before, rows_E, 0), 0)
        m = start + (tile_m - tl.sum(tl.where(before, tiles_E, 0), 0)) * BLOCK_M
        end = tl.minimum(start + tl.sum(tl.where(experts == expert, rows_E, 0), 0), M)

    rows = m + tl.arange(0, BLOCK_M)
    at_sa = sa + tl.minimum(rows, M - 1) * sa_row
    at_sb = sb + expert * sb_expert
    last = tl.cdiv(N, BLOCK) - 1  # of the weight's blocks; parts beyond it are never stored
    sums = ()
    for _ in tl.static_range(BLOCK_N // PART):
        sums += (tl.zeros((BLOCK_M, PART), tl.float32),)
    for k in tl.range(tl.cdiv(K, BLOCK)):
        scale = tl.load(at_sa)
        codes = a.load([m, k * BLOCK])
        longer = ()
        for part in tl.static_range(BLOCK_N // PART):
            column = n + part * PART
            weight_scale = tl.load(at_sb + tl.minimum(column // BLOCK, last) * sb_row)
            weight = b.load([expert * N + column, k * BLOCK])
            longer += (sums[part] + tl.dot(codes, weight.T) * (scale * weight_scale)[:, None],)
        sums = longer
        at_sa += sa_block
        at_sb += sb_block

    for part in tl.static_range(BLOCK_N // PART):
        columns = n + part * PART + tl.arange(0, PART)
        at = c + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(at, sums[part].to(c.dtype.element_ty), mask=(rows < end)[:, None] & (columns < N)[None, :])


def scaled_mm(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, out_dtype: torch.dtype = torch.bfloat16) -> Tensor:
    check_scaled_mm(qa, sa, qb, sb)
    return _multiply(qa, sa, qb[None], sb[None], None, out_dtype)


def grouped_scaled_mm(
    qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, counts_E: Tensor, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """As `reference`, in one launch. Counts are taken at their word: rows beyond their sum stay unset."""
    check_grouped_scaled_mm(qa, sa, qb, sb, counts_E)
    return _multiply(qa, sa, qb, sb, counts_E, out_dtype)


def _multiply(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor, counts: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    (M, K), (E, N, _) = qa.shape, qb.shape
    c = qa.new_empty(M, N, dtype=out_dtype)
    if 0 in (M, N, K):
        return c.zero_()
    operands = [TensorDescriptor.from_tensor(q, [1, BLOCK.value]) for q in (_for_tma(qa), _for_tma(qb.flatten(0, 1)))]
    bucket = max(64, triton.next_power_of_2(M))
    args = [*operands, c, sa, sb, counts, M, N, K, E, bucket, *sa.stride(), *sb.stride()]

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles_m = triton.cdiv(M, meta["BLOCK_M"])
        if counts is not None:  # at most: every expert that has rows ends with a tile that isn't full
            tiles_m = M // meta["BLOCK_M"] + min(E, M)
        return (tiles_m * triton.cdiv(N, meta["BLOCK_N"]),)

    experts = dict(E_POWER=triton.next_power_of_2(E))
    if qa.is_cuda:
        _tuned_matmul[grid](*args, **experts)
    else:
        _set_blocks(dict(zip(("a", "b"), operands, strict=True)) | INTERPRETED.kwargs)
        _matmul[grid](*args, **experts, **INTERPRETED.kwargs)
    return c


def _for_tma(q: Tensor) -> Tensor:
    """q, or a copy, with rows that start at multiples of 16 bytes."""
    rows, K = q.shape
    if q.stride(1) == 1 and q.stride(0) % 16 == 0 and q.data_ptr() % 16 == 0:
        return q
    return q.new_empty(rows, triton.cdiv(K, 16) * 16)[:, :K].copy_(q)


def _set_blocks(args: dict[str, Any]) -> None:
    args["a"].block_shape = [args["BLOCK_M"], BLOCK.value]
    args["b"].block_shape = [args["PART"], BLOCK.value]


def _config(
    block_m: int, block_n: int, part: int, warps: int, stages: int, registers: int | None = None
) -> triton.Config:
    tile = dict(BLOCK_M=block_m, BLOCK_N=block_n, PART=part)
    return triton.Config(tile, num_warps=warps, num_stages=stages, maxnreg=registers, pre_hook=_set_blocks)


INTERPRETED = _config(64, 64, 64, 4, 1)
"""Small, for TRITON_INTERPRET."""
FEW_ROWS = [
    _config(64, 16, 16, 4, 8),
    _config(64, 32, 32, 4, 8),
    _config(64, 64, 64, 4, 6),
    _config(64, 128, 128, 4, 4),
]
"""Bound by reading the weight: narrow tiles, so that every multiprocessor reads some of it."""
MANY_ROWS = [
    _config(64, 128, 128, 4, 3),  # three on a multiprocessor: while one adds, others multiply
    _config(128, 128, 64, 8, 3, 128),  # two
    _config(128, 128, 128, 8, 5),
    _config(64, 256, 128, 4, 2),  # two
    _config(128, 256, 128, 8, 4),  # least traffic from L2
]
"""Bound by the tensor cores."""


def _fitting(configs: list[triton.Config], args: dict[str, Any], **_: Any) -> list[triton.Config]:
    rows = args["M"] / (1 if args["counts"] is None else args["E"])
    return FEW_ROWS if rows <= 64 else configs if rows <= 512 else MANY_ROWS


_tuned_matmul = triton.autotune(
    FEW_ROWS + MANY_ROWS, key=["N", "K", "E", "bucket"], prune_configs_by={"early_config_prune": _fitting}
)(_matmul)
