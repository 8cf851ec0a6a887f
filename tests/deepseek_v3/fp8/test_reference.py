"""The FP8 reference against arithmetic written out here, against torch's and transformers' own, and its invariances."""

import importlib
import itertools
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

from deepseek_v3.fp8 import reference
from deepseek_v3.fp8.reference import E4M3, MAX

UE8M0 = pytest.mark.parametrize("ue8m0", [False, True])
F32 = torch.float32


def decode(code: int) -> float:
    """E4M3FN, written out: sign, 4 bits of exponent (bias 7), 3 of fraction; no infinity, 0x7f is NaN."""
    sign, exponent, fraction = -1.0 if code & 0x80 else 1.0, code >> 3 & 15, code & 7
    if (exponent, fraction) == (15, 7):
        return math.nan
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


POSITIVE = [decode(code) for code in range(0x7F)]  # ascending


def encode(x: float) -> int:
    """To the nearest code, ties to the even one."""
    code = min(range(0x7F), key=lambda code: (abs(POSITIVE[code] - abs(x)), code & 1))
    return code | (0x80 if math.copysign(1, x) < 0 else 0)


def codes(q: Tensor) -> list[int]:
    return q.contiguous().view(torch.uint8).flatten().tolist()


def with_scale_one(values: list[float]) -> Tensor:
    """One row that ends each block of 128 with 448, so that the scale is 1."""
    blocks = [values[i : i + 127] for i in range(0, len(values), 127)]
    return torch.tensor([x for block in blocks for x in [*block, *[0.0] * (127 - len(block)), MAX]])


def quantised_at_scale_one(values: list[float]) -> list[int]:
    q, scale = reference.quantise_activations(with_scale_one(values))
    assert scale.tolist() == [1.0] * len(scale)
    kept = torch.arange(len(q)) % 128 != 127
    return codes(q[kept])[: len(values)]


# --- codes -----------------------------------------------------------------------------------------------------------


def test_all_256_codes_are_torchs() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
    torch.testing.assert_close(theirs, torch.tensor([decode(c) for c in range(256)]), rtol=0, atol=0, equal_nan=True)


def test_every_representable_value_keeps_its_code() -> None:
    every = [code for code in range(256) if code & 0x7F != 0x7F]
    assert quantised_at_scale_one([decode(code) for code in every]) == every


def test_ties_go_to_even_and_neighbours_to_the_nearest() -> None:
    ties = [(a + b) / 2 for a, b in itertools.pairwise(POSITIVE)]
    near = [x for tie in ties for x in (tie, math.nextafter(tie, 0), math.nextafter(tie, MAX))]
    rounded = torch.tensor(near + [-x for x in near]).tolist()  # to fp32, where a neighbour may be the tie itself
    assert quantised_at_scale_one(rounded) == [encode(x) for x in rounded]


def test_subnormals_and_what_is_below_them() -> None:
    smallest = 2.0**-9
    below = [smallest / 2, smallest * 0.50001, smallest / 4, 1e-30, -smallest / 2]
    assert quantised_at_scale_one([smallest, *below]) == [1, 0, 1, 0, 0, 0x80]


def test_nothing_lies_beyond_448() -> None:
    # amax/s may round to above 448; a cast alone gives NaN from 464 on in older torch.
    beyond = torch.tensor([447.0, 448.0, 456.0, 463.9, 464.0, 480.0, 1e9])
    assert reference._encode(beyond).float().tolist() == [MAX] * 7
    assert reference._encode(-beyond).float().tolist() == [-MAX] * 7


# --- scales ----------------------------------------------------------------------------------------------------------


def test_a_scale_is_its_blocks_amax_over_448(values: Any, shape: tuple[int, int]) -> None:
    x = values(*shape)
    q, scale = reference.quantise_activations(x)
    assert (q.shape, q.dtype, scale.dtype) == (x.shape, E4M3, F32)
    assert scale.shape == (len(x), math.ceil(x.shape[1] / 128))
    for row, k in itertools.product({0, len(x) - 1}, range(scale.shape[1])):
        block = x[row, k * 128 : k * 128 + 128]
        amax = max(float(block.abs().max()), 1e-4)
        assert float(scale[row, k]) == pytest.approx(amax / 448, rel=2e-7)
        assert codes(q[row, k * 128 : k * 128 + 128]) == codes((block / scale[row, k]).to(E4M3))


def test_a_weights_scale_is_its_squares(values: Any, shape: tuple[int, int]) -> None:
    w = values(*shape)
    q, scale = reference.quantise_weight(w)
    assert scale.shape == (math.ceil(w.shape[0] / 128), math.ceil(w.shape[1] / 128))
    for n, k in itertools.product(*map(range, scale.shape)):
        square = slice(n * 128, n * 128 + 128), slice(k * 128, k * 128 + 128)
        amax = max(float(w[square].abs().max()), 1e-4)
        assert float(scale[n, k]) == pytest.approx(amax / 448, rel=2e-7)
        assert codes(q[square]) == codes((w[square] / scale[n, k]).to(E4M3))


def test_weights_of_experts_are_quantised_one_by_one(values: Any) -> None:
    w = torch.stack([values(130, 300, seed) for seed in range(3)])
    q, scale = reference.quantise_weight(w)
    for e in range(3):
        one, its_scale = reference.quantise_weight(w[e])
        assert codes(q[e]) == codes(one) and scale[e].equal(its_scale)


def test_power_of_two_scales_are_the_next_power(values: Any, shape: tuple[int, int]) -> None:
    x = values(*shape)
    plain, (q, scale) = reference.quantise_activations(x)[1], reference.quantise_activations(x, ue8m0=True)
    assert scale.frexp().mantissa.eq(0.5).all()
    assert (scale >= plain).all() and (scale < 2 * plain).all()
    assert q.float().abs().max() <= MAX


def test_a_scale_that_is_a_power_of_two_stays() -> None:
    x = torch.tensor([[448.0 * 2.0**n] for n in range(-9, 90, 7)])
    assert reference.quantise_activations(x, ue8m0=True)[1].equal(x / 448)
    above = torch.nextafter(x, x * 2)
    assert reference.quantise_activations(above, ue8m0=True)[1].equal(x / 224)


@UE8M0
def test_zeros_stay_zeros(ue8m0: bool) -> None:
    for q, scale in (
        reference.quantise_activations(torch.zeros(3, 200), ue8m0=ue8m0),
        reference.quantise_weight(torch.zeros(3, 200), ue8m0=ue8m0),
    ):
        assert q.float().eq(0).all() and scale.isfinite().all() and (scale > 0).all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_infinity_and_nan_are_refused(bad: float) -> None:
    x = torch.ones(4, 256)
    x[2, 130] = bad
    for quantise in (reference.quantise_activations, reference.quantise_weight, reference.silu_mul_quantise):
        with pytest.raises(ValueError, match="inf or NaN"):
            quantise(x)


def test_a_scale_that_is_nan_says_so() -> None:
    reference.require_finite(torch.ones(3))
    with pytest.raises(ValueError, match="inf or NaN"):
        reference.require_finite(torch.tensor([1.0, math.nan]))


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [-3, 1, 20])
@UE8M0
def test_powers_of_two_move_into_the_scale(values: Any, ue8m0: bool, power: int) -> None:
    x = values(9, 300).clamp(min=-1e3) + 0.01  # no block so small that its scale is the least
    for quantise in (reference.quantise_activations, reference.quantise_weight):
        (q, scale), (moved, moved_scale) = quantise(x, ue8m0=ue8m0), quantise(x * 2.0**power, ue8m0=ue8m0)
        assert codes(moved) == codes(q) and moved_scale.equal(scale * 2.0**power)


@UE8M0
def test_quantising_what_was_dequantised_changes_nothing(values: Any, shape: tuple[int, int], ue8m0: bool) -> None:
    for quantise, dequantise in (
        (reference.quantise_activations, reference.dequantise_activations),
        (reference.quantise_weight, reference.dequantise_weight),
    ):
        q, scale = quantise(values(*shape), ue8m0=ue8m0)
        x = dequantise(q, scale)
        again, scale_again = quantise(x, ue8m0=ue8m0)
        if ue8m0:  # 448 may have become 2 × 224: other codes, the same values
            assert dequantise(again, scale_again).equal(x)
        else:  # amax/448 loses up to one place
            assert codes(again) == codes(q)
            torch.testing.assert_close(scale_again, scale, rtol=2.0**-23, atol=0)


def test_a_row_depends_on_no_other(values: Any) -> None:
    x, w = values(83, 300), values(130, 300, seed=1)
    q, scale = reference.quantise_activations(x)
    out = reference.scaled_mm(q, scale, *reference.quantise_weight(w), out_dtype=F32)
    for row in (0, 41, 82):
        one, its_scale = reference.quantise_activations(x[row : row + 1])
        assert codes(one) == codes(q[row]) and its_scale.equal(scale[row : row + 1])
        assert reference.scaled_mm(one, its_scale, *reference.quantise_weight(w), out_dtype=F32).equal(out[[row]])


def test_zeros_after_the_last_column_change_nothing(values: Any) -> None:
    x, w = values(33, 300), values(130, 300, seed=1)
    longer = [torch.nn.functional.pad(t, (0, 212)) for t in (x, w)]
    out, padded = (
        reference.scaled_mm(*reference.quantise_activations(a), *reference.quantise_weight(b), out_dtype=F32)
        for a, b in ((x, w), longer)
    )
    assert padded.equal(out)


def test_layout_in_memory_does_not_matter(values: Any) -> None:
    x, w = values(83, 300), values(130, 300, seed=1)
    a, b = reference.quantise_activations(x), reference.quantise_weight(w)
    strided, transposed = values(83, 600), x.T.contiguous().T
    strided[:, ::2] = x
    for other in (transposed, strided[:, ::2]):
        assert not other.is_contiguous()
        q, scale = reference.quantise_activations(other)
        assert codes(q) == codes(a[0]) and scale.equal(a[1])
    out = reference.scaled_mm(*a, *b)
    assert reference.scaled_mm(*(t.T.contiguous().T for t in (*a, *b))).equal(out)
    batched, scale = reference.quantise_activations(x[:80].view(4, 20, 300))
    assert codes(batched) == codes(a[0][:80]) and scale.flatten(0, 1).equal(a[1][:80])


def test_each_block_meets_its_own_scales() -> None:
    """One-hot rows read the weight out, under scales that all differ."""
    K, N = 600, 300
    generator = torch.Generator().manual_seed(0)
    powers = (2.0 ** torch.arange(-8, 9)).tolist()
    qa = torch.eye(K).to(E4M3)
    qb = torch.randint(-7, 8, (N, K), generator=generator).float().to(E4M3)
    sa = torch.tensor([[powers[(3 * m + 5 * k) % 17] for k in range(5)] for m in range(K)])
    sb = torch.tensor([[powers[(7 * n + 2 * k) % 17] for k in range(5)] for n in range(3)])
    out = reference.scaled_mm(qa, sa, qb, sb, out_dtype=F32)
    for k, n in itertools.product(range(0, K, 7), range(0, N, 11)):
        assert float(out[k, n]) == float(qb[n, k]) * float(sa[k, k // 128]) * float(sb[n // 128, k // 128])


# --- errors, DeepSeek-V3's shapes of noise ---------------------------------------------------------------------------


@pytest.mark.parametrize("K", [512, 2048])
@pytest.mark.parametrize("outliers", [False, True])
@UE8M0
def test_errors_are_those_of_eight_bits(gaussian: Any, relative: Any, K: int, outliers: bool, ue8m0: bool) -> None:
    x, w = gaussian(64, K, outliers=outliers), gaussian(256, K, seed=1)
    a, b = reference.quantise_activations(x, ue8m0=ue8m0), reference.quantise_weight(w, ue8m0=ue8m0)
    same_codes = reference.dequantise_activations(*a).double() @ reference.dequantise_weight(*b).double().T
    exact = x.double() @ w.double().T
    assert relative(reference.scaled_mm(*a, *b, out_dtype=F32), same_codes) <= 1e-6
    assert relative(reference.scaled_mm(*a, *b), same_codes) <= 3e-3
    assert 0.02 <= relative(reference.scaled_mm(*a, *b), exact) <= 0.045
    assert 0.02 <= relative(reference.dequantise_weight(*b), w) <= 0.032


# --- others' code ----------------------------------------------------------------------------------------------------


@UE8M0
def test_weights_are_transformers_own(gaussian: Any, ue8m0: bool) -> None:
    w = gaussian(256, 384)
    config = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0" if ue8m0 else "float")
    quantizer = SimpleNamespace(quantization_config=config)
    theirs = Fp8Quantize(quantizer)._quantize_one("x.weight", w)
    q, scale = reference.quantise_weight(w, ue8m0=ue8m0)
    torch.testing.assert_close(theirs["x.weight_scale_inv"].float(), scale, rtol=3e-7, atol=0)
    differ = (theirs["x.weight"].view(torch.uint8).int() - q.view(torch.uint8).int()).abs()
    assert differ.max() <= 1 and differ.count_nonzero() <= 1e-3 * differ.numel()  # they multiply by 1/s
    dequantised = Fp8Dequantize(quantizer)._dequantize_one(q, scale, F32)
    assert dequantised.equal(reference.dequantise_weight(q, scale))


def test_one_block_is_torchs_scaled_product(gaussian: Any, relative: Any) -> None:
    qa, qb = gaussian(16, 128).mul(20).to(E4M3), gaussian(48, 128, seed=1).mul(20).to(E4M3)
    sa, sb = torch.tensor(0.37), torch.tensor(1.9)
    theirs = torch._scaled_mm(qa, qb.T, sa, sb, out_dtype=F32)
    ours = reference.scaled_mm(qa, sa.expand(16, 1), qb, sb.expand(1, 1), out_dtype=F32)
    assert relative(ours, theirs) <= 1e-6


def test_silu_mul_is_torchs(values: Any) -> None:
    gate_up = values(9, 600) / 100
    q, scale = reference.silu_mul_quantise(gate_up)
    gate, up = gate_up.split(300, dim=1)
    theirs, their_scale = reference.quantise_activations(torch.nn.functional.silu(gate) * up)
    assert codes(q) == codes(theirs) and scale.equal(their_scale)


# --- experts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[5, 0, 20, 8], [0, 0, 33, 0], [33, 0, 0, 0], [1, 1, 1, 30]])
def test_experts_are_multiplied_one_by_one(values: Any, counts: list[int]) -> None:
    a = reference.quantise_activations(values(33, 300))
    b = reference.quantise_weight(torch.stack([values(130, 300, seed) for seed in range(4)]))
    out = reference.grouped_scaled_mm(*a, *b, torch.tensor(counts), out_dtype=F32)
    expert = [e for e, count in enumerate(counts) for _ in range(count)]
    for row, e in enumerate(expert):
        one = reference.scaled_mm(a[0][[row]], a[1][[row]], b[0][e], b[1][e], out_dtype=F32)
        assert one.equal(out[[row]])


def test_no_rows_at_all(values: Any) -> None:
    a = reference.quantise_activations(torch.empty(0, 300))
    b = reference.quantise_weight(torch.stack([values(130, 300)] * 2))
    assert reference.grouped_scaled_mm(*a, *b, torch.tensor([0, 0])).shape == (0, 130)
    assert reference.scaled_mm(*a, b[0][0], b[1][0]).shape == (0, 130)


# --- what is refused, and what is needed -----------------------------------------------------------------------------


def test_wrong_shapes_are_named(values: Any) -> None:
    qa, sa = reference.quantise_activations(values(7, 300))
    qb, sb = reference.quantise_weight(values(130, 300))
    with pytest.raises(ValueError, match=r"qa, qb: shapes \(7, 299\) and \(130, 300\)"):
        reference.scaled_mm(qa[:, 1:], sa, qb, sb)
    with pytest.raises(ValueError, match=r"scale: shape \(7, 2\): give \(7, 3\)"):
        reference.scaled_mm(qa, sa[:, 1:], qb, sb)
    with pytest.raises(ValueError, match=r"scale_inv: shape \(1, 3\): give \(2, 3\)"):
        reference.scaled_mm(qa, sa, qb, sb[1:])
    with pytest.raises(ValueError, match=r"dtypes torch\.float32 and torch\.float8_e4m3fn"):
        reference.scaled_mm(qa.float(), sa, qb, sb)
    with pytest.raises(ValueError, match=r"counts_E: shape \(2,\): give \(1,\)"):
        reference.grouped_scaled_mm(qa, sa, qb[None], sb[None], torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="add up to 6, qa has 7 rows"):
        reference.grouped_scaled_mm(qa, sa, qb[None], sb[None], torch.tensor([6]))


def test_the_package_is_the_reference_on_a_cpu_and_needs_no_triton(
    values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("deepseek_v3.fp8")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it fails
    fresh = importlib.import_module("deepseek_v3.fp8")
    x, w = values(7, 300), values(130, 300)
    a, b = fresh.quantise_activations(x), fresh.quantise_weight(w)
    assert fresh.scaled_mm(*a, *b).equal(reference.scaled_mm(*a, *b))
