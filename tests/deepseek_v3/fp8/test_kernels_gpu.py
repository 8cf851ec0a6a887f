"""On a GPU: the quantisers' bytes are the reference's, and products are those of the same codes."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_v3 import fp8
from deepseek_v3.fp8 import reference
from deepseek_v3.fp8.reference import E4M3, MAX

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
F32 = torch.float32
UE8M0 = pytest.mark.parametrize("ue8m0", [False, True])
DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert ours[1].cpu().equal(theirs[1])
    assert ours[0].cpu().view(torch.uint8).equal(theirs[0].view(torch.uint8))


def assert_close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    """One code off for one value in a thousand at most: where exp differs in its last place."""
    torch.testing.assert_close(ours[1].cpu(), theirs[1], rtol=1e-6, atol=0)
    differ = (ours[0].cpu().view(torch.uint8).int() - theirs[0].view(torch.uint8).int()).abs()
    assert differ.max() <= 1
    assert differ.count_nonzero() <= 1e-3 * differ.numel() + 1


# --- quantisers ------------------------------------------------------------------------------------------------------


@UE8M0
@DTYPE
def test_quantised_bytes(values: Any, shape: tuple[int, int], dtype: torch.dtype, ue8m0: bool) -> None:
    x = values(*shape).to(dtype)
    assert_same(fp8.quantise_activations(x.cuda(), ue8m0=ue8m0), reference.quantise_activations(x, ue8m0=ue8m0))
    assert_same(fp8.quantise_weight(x.cuda(), ue8m0=ue8m0), reference.quantise_weight(x, ue8m0=ue8m0))


def test_every_code_tie_and_neighbour() -> None:
    """All finite codes, all midpoints and the floats next to them, under scales of many sizes."""
    finite = torch.arange(0x7F, dtype=torch.uint8).view(E4M3).float()
    ties = (finite[1:] + finite[:-1]) / 2
    positive = torch.cat([finite, ties, ties.nextafter(torch.zeros(1)), ties.nextafter(torch.full((1,), MAX))])
    row = torch.cat([positive, -positive])
    row = torch.nn.functional.pad(row, (0, -len(row) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(row, (0, 1), value=MAX).flatten()
    x = x * torch.tensor([1.0, 2.0**-12, 2.0**40, 0.3, 1.7e-3, 9e5])[:, None]
    for ue8m0 in (False, True):
        assert_same(fp8.quantise_activations(x.cuda(), ue8m0=ue8m0), reference.quantise_activations(x, ue8m0=ue8m0))
        assert_same(fp8.quantise_weight(x.cuda(), ue8m0=ue8m0), reference.quantise_weight(x, ue8m0=ue8m0))


def test_a_million_values_round_as_a_division_does() -> None:
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 30, 1024)[:, None]
    assert_same(fp8.quantise_activations(x.cuda()), reference.quantise_activations(x))


@UE8M0
@DTYPE
def test_silu_mul_quantise(gaussian: Any, dtype: torch.dtype, ue8m0: bool) -> None:
    gate_up = (3 * gaussian(83, 2 * 300)).to(dtype)
    assert_close(fp8.silu_mul_quantise(gate_up.cuda(), ue8m0=ue8m0), reference.silu_mul_quantise(gate_up, ue8m0=ue8m0))


def test_strided_and_batched_inputs(values: Any) -> None:
    x = values(200, 384)
    for other in (x.T, x[:, 128:], x[:, ::2], x[::3], x.view(4, 50, 384), x[0]):
        assert_same(fp8.quantise_activations(other.cuda()), reference.quantise_activations(other))
    w = torch.stack([values(130, 300, seed) for seed in range(3)])
    assert_same(fp8.quantise_weight(w.cuda()), reference.quantise_weight(w))


def test_dequantised_values(values: Any, shape: tuple[int, int]) -> None:
    a, b = reference.quantise_activations(values(*shape)), reference.quantise_weight(values(*shape))
    assert fp8.dequantise_activations(*(x.cuda() for x in a)).cpu().equal(reference.dequantise_activations(*a))
    assert fp8.dequantise_weight(*(x.cuda() for x in b)).cpu().equal(reference.dequantise_weight(*b))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_poison_their_row_and_no_other(gaussian: Any, bad: float) -> None:
    x = gaussian(130, 256)
    x[129, 130] = bad
    q, scale = fp8.quantise_activations(x.cuda())
    assert scale.isnan().nonzero().tolist() == [[129, 1]]
    with pytest.raises(ValueError, match="inf or NaN"):
        fp8.require_finite(scale)
    out = fp8.scaled_mm(q, scale, *fp8.quantise_weight(gaussian(64, 256, seed=1).cuda()))
    assert out[129].isnan().all() and out[:129].isfinite().all()


# --- products --------------------------------------------------------------------------------------------------------


def operands(M: int, N: int, K: int, experts: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(max(experts, 1), N, K, generator=generator)
    a = reference.quantise_activations(torch.randn(M, K, generator=generator))
    b = reference.quantise_weight(w if experts else w[0])
    return [*a, *b]


def on_gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [x.cuda() for x in tensors]


@pytest.mark.parametrize("M", [1, 7, 64, 83, 300, 700])
@pytest.mark.parametrize(("N", "K"), [(576, 7168), (2112, 512), (130, 3884), (64, 100)])
def test_products(relative: Any, M: int, N: int, K: int) -> None:
    ab = operands(M, N, K)
    exact = reference.scaled_mm(*ab, F32)
    assert relative(fp8.scaled_mm(*on_gpu(ab)), exact) <= 3e-3  # bf16's own rounding is 1.7e-3
    assert relative(fp8.scaled_mm(*on_gpu(ab), F32), exact) <= 5e-4  # the tensor core's 14 bits, over 128 values


@pytest.mark.parametrize(
    "counts",
    [[70, 0, 5, 625], [0, 0, 700, 0], [700, 0, 0, 0], [1, 64, 1, 634], [175] * 4, [0] * 60 + [3] * 4, [2] * 200],
)
def test_products_of_experts(relative: Any, counts: list[int]) -> None:
    ab = operands(sum(counts), 200, 300, experts=len(counts))
    exact = reference.grouped_scaled_mm(*ab, torch.tensor(counts), F32)
    for dtype in (torch.int32, torch.int64):
        out = fp8.grouped_scaled_mm(*on_gpu(ab), torch.tensor(counts, dtype=dtype, device="cuda"))
        assert relative(out, exact) <= 3e-3


def test_each_block_meets_its_own_scales() -> None:
    """One-hot rows read the weight out, exactly, under scales that all differ."""
    K, N = 1000, 600
    powers = 2.0 ** torch.arange(-8, 9)
    qa = torch.eye(K).to(E4M3)
    qb = torch.randint(-7, 8, (N, K), generator=torch.Generator().manual_seed(0)).float().to(E4M3)
    sa = powers[(3 * torch.arange(K)[:, None] + 5 * torch.arange(8)) % 17]
    sb = powers[(7 * torch.arange(5)[:, None] + 2 * torch.arange(8)) % 17]
    ab = [qa, sa, qb, sb]
    assert fp8.scaled_mm(*on_gpu(ab), F32).cpu().equal(reference.scaled_mm(*ab, F32))


def test_a_row_depends_neither_on_the_others_nor_on_how_many_they_are() -> None:
    qa, sa, qb, sb = on_gpu(operands(2000, 576, 1536))
    whole = fp8.scaled_mm(qa, sa, qb, sb, F32)
    for rows in ([0], [1999], range(64), range(700, 1000)):
        some = fp8.scaled_mm(qa[list(rows)], sa[list(rows)], qb, sb, F32)
        assert some.equal(whole[list(rows)])


def test_experts_are_plain_products(relative: Any) -> None:
    qa, sa, qb, sb = on_gpu(operands(300, 576, 1536, experts=3))
    out = fp8.grouped_scaled_mm(qa, sa, qb, sb, torch.tensor([100, 150, 50], device="cuda"), F32)
    for (start, end), e in zip(itertools.pairwise([0, 100, 250, 300]), range(3), strict=True):
        assert fp8.scaled_mm(qa[start:end], sa[start:end], qb[e], sb[e], F32).equal(out[start:end])


def test_zeros_after_the_last_column_change_nothing() -> None:
    x, w = torch.randn(33, 300), torch.randn(130, 300)
    short, long = (
        fp8.scaled_mm(*fp8.quantise_activations(a.cuda()), *fp8.quantise_weight(b.cuda()), F32)
        for a, b in ((x, w), (torch.nn.functional.pad(x, (0, 212)), torch.nn.functional.pad(w, (0, 212))))
    )
    assert long.equal(short)


@pytest.mark.parametrize("outliers", [False, True])
@UE8M0
def test_errors_are_those_of_eight_bits(gaussian: Any, relative: Any, outliers: bool, ue8m0: bool) -> None:
    x, w = gaussian(256, 2048, outliers=outliers), gaussian(512, 2048, seed=1)
    a, b = fp8.quantise_activations(x.cuda(), ue8m0=ue8m0), fp8.quantise_weight(w.cuda(), ue8m0=ue8m0)
    assert relative(fp8.scaled_mm(*a, *b), x.double() @ w.double().T) <= 0.045
    assert relative(fp8.dequantise_weight(*b), w) <= 0.032
