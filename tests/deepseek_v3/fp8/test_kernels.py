"""The kernels without a GPU: in Triton's interpreter against the reference, and compiled for Hopper.

The interpreter rounds casts to FP8 and bf16 wrongly, so inputs there have exact codes and outputs are fp32: what is
checked are indices, masks and scales. Rounding, and everything else, is checked on a GPU (test_kernels_gpu.py).
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from deepseek_v3.fp8 import kernels, reference

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs inside test_kernels_compute_the_reference")
compiled = pytest.mark.skipif(INTERPRETING, reason="nothing is compiled in the interpreter")
F32 = torch.float32


@compiled
def test_kernels_compute_the_reference() -> None:
    """Runs the tests marked `interpreted`: the interpreter has to be chosen before Triton is imported."""
    if version("triton") < "3.7" and version("numpy") >= "2.4":
        pytest.skip("Triton 3.6's interpreter takes arrays of one element for numbers, which numpy 2.4 no longer does")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def exact(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Values that are codes under power-of-two scales, which differ from block to block; a block is zero."""
    generator = torch.Generator().manual_seed(seed)
    # −448 to 448, subnormals among them; 127 is NaN.
    codes = torch.randint(0, 127, (rows, columns), generator=generator) + 128 * torch.randint(
        0, 2, (rows, columns), generator=generator
    )
    values = codes.to(torch.uint8).view(reference.E4M3).float()
    values[:, ::128] = 448.0
    values[rows // 2, :128] = 0
    powers = 2.0 ** torch.randint(-6, 7, (-(-rows // 128), -(-columns // 128)), generator=generator)
    return values * powers.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    assert ours[0].shape == theirs[0].shape
    assert ours[0].view(torch.uint8).equal(theirs[0].view(torch.uint8))
    assert ours[1].shape == theirs[1].shape
    assert ours[1].equal(theirs[1])


# --- in the interpreter ----------------------------------------------------------------------------------------------


@interpreted
def test_quantised_rows(shape: tuple[int, int]) -> None:
    assert_same(kernels.quantise_activations(exact(*shape)), reference.quantise_activations(exact(*shape)))


@interpreted
def test_quantised_squares(shape: tuple[int, int]) -> None:
    assert_same(kernels.quantise_weight(exact(*shape)), reference.quantise_weight(exact(*shape)))


@interpreted
@pytest.mark.parametrize("ue8m0", [False, True])
def test_scales_of_any_values(values: Any, ue8m0: bool) -> None:
    for x in (values(83, 300), torch.zeros(3, 200), torch.full((2, 128), 1e-4), torch.full((2, 128), 3e38)):
        for name in ("quantise_activations", "quantise_weight"):
            ours, theirs = (getattr(module, name)(x, ue8m0=ue8m0)[1] for module in (kernels, reference))
            assert ours.equal(theirs)


@interpreted
def test_experts_and_batches() -> None:
    w = torch.stack([exact(130, 300, seed) for seed in range(3)])
    assert_same(kernels.quantise_weight(w), reference.quantise_weight(w))
    assert_same(kernels.quantise_activations(w), reference.quantise_activations(w))
    assert_same(kernels.quantise_activations(w[0, 0]), reference.quantise_activations(w[0, 0]))


@interpreted
def test_strided_inputs() -> None:
    x = exact(128, 384)
    every_second = torch.zeros(128, 768)
    every_second[:, ::2] = x
    for other in (x.T.contiguous().T, x[:, 128:], x[::3], every_second[:, ::2]):
        assert not other.is_contiguous()
        assert_same(kernels.quantise_activations(other), reference.quantise_activations(other))
        assert_same(kernels.quantise_weight(other), reference.quantise_weight(other))


@interpreted
def test_silu_mul() -> None:
    up = exact(33, 300)
    gate_up = torch.cat([torch.full_like(up, 64.0), up / 64], dim=1)  # silu(64) is 64 in fp32
    assert_same(kernels.silu_mul_quantise(gate_up), reference.quantise_activations(up))


@interpreted
@pytest.mark.parametrize("shape", [(1, 127), (130, 300), (33, 576)])
def test_dequantised(shape: tuple[int, int]) -> None:
    a, b = reference.quantise_activations(exact(*shape)), reference.quantise_weight(exact(*shape))
    assert kernels.dequantise_activations(*a).equal(reference.dequantise_activations(*a))
    assert kernels.dequantise_weight(*b).equal(reference.dequantise_weight(*b))
    experts = b[0][None].expand(2, -1, -1), torch.stack([b[1], 2 * b[1]])
    assert kernels.dequantise_weight(*experts).equal(reference.dequantise_weight(*experts))


@interpreted
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_block_with_infinity_or_nan_has_no_scale(bad: float) -> None:
    x = torch.ones(130, 256)
    x[129, 130] = bad
    for quantise, where in ((kernels.quantise_activations, (129, 1)), (kernels.quantise_weight, (1, 1))):
        scale = quantise(x)[1]
        assert scale.isnan().nonzero().tolist() == [list(where)]
        with pytest.raises(ValueError, match="inf or NaN"):
            reference.require_finite(scale)


@pytest.fixture(params=[(64, 32, 32), (64, 128, 64), (128, 256, 128)], ids=lambda tile: "x".join(map(str, tile)))
def tile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "INTERPRETED", kernels._config(*request.param, 4, 1))


def operands(M: int, N: int, K: int, experts: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, and scales no two of which are alike."""
    generator = torch.Generator().manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(50).to(reference.E4M3)

    def scales(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.01

    leading = (experts,) if experts else ()
    blocks = reference.blocks
    return codes(M, K), scales(M, blocks(K)), codes(*leading, N, K), scales(*leading, blocks(N), blocks(K))


@interpreted
@pytest.mark.parametrize("sizes", [(1, 130, 300), (70, 520, 144), (130, 40, 40)])
@pytest.mark.usefixtures("tile")
def test_products(relative: Any, sizes: tuple[int, int, int]) -> None:
    ab = operands(*sizes)
    assert relative(kernels.scaled_mm(*ab, F32), reference.scaled_mm(*ab, F32)) < 1e-6


@interpreted
def test_a_long_sum(relative: Any) -> None:
    ab = operands(7, 40, 3884)  # rows of 3884 bytes: TMA needs a copy
    assert relative(kernels.scaled_mm(*ab, F32), reference.scaled_mm(*ab, F32)) < 1e-6


@interpreted
def test_strided_operands(relative: Any) -> None:
    ab = operands(9, 40, 300)
    strided = [x.T.contiguous().T for x in ab]
    assert relative(kernels.scaled_mm(*strided, F32), reference.scaled_mm(*ab, F32)) < 1e-6
    qa, sa, qb, sb = operands(9, 64, 144, experts=3)
    some = qa, sa, qb[:, :40], sb, torch.tensor([4, 2, 3])  # experts no longer follow each other
    assert relative(kernels.grouped_scaled_mm(*some, F32), reference.grouped_scaled_mm(*some, F32)) < 1e-6


@interpreted
@pytest.mark.parametrize("counts", [[70, 0, 5, 8], [0, 83, 0, 0], [1, 64, 1, 17]])
@pytest.mark.usefixtures("tile")
def test_products_of_experts(relative: Any, counts: list[int]) -> None:
    ab = operands(83, 130, 144, experts=4)
    counts_E = torch.tensor(counts)
    assert (
        relative(kernels.grouped_scaled_mm(*ab, counts_E, F32), reference.grouped_scaled_mm(*ab, counts_E, F32)) < 1e-6
    )


@interpreted
def test_no_expert_writes_to_anothers_rows(relative: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next expert's tiles would hide it here, where tiles come one after the other: nobody owns the last rows."""
    qa, sa, qb, sb = operands(100, 40, 130, experts=3)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    out = kernels.grouped_scaled_mm(qa, sa, qb, sb, torch.tensor([30, 40, 10]), F32)
    exact = reference.grouped_scaled_mm(qa[:80], sa[:80], qb, sb, torch.tensor([30, 40, 10]), F32)
    assert relative(out[:80], exact) < 1e-6
    assert out[80:].count_nonzero() == 0


@interpreted
def test_experts_that_are_no_power_of_two(relative: Any) -> None:
    ab, counts = operands(9, 40, 130, experts=5), torch.tensor([2, 0, 3, 0, 4], dtype=torch.int32)
    assert relative(kernels.grouped_scaled_mm(*ab, counts, F32), reference.grouped_scaled_mm(*ab, counts, F32)) < 1e-6


@interpreted
def test_nothing_to_do() -> None:
    qa, sa, qb, sb = operands(0, 40, 130)
    assert kernels.scaled_mm(qa, sa, qb, sb, F32).shape == (0, 40)
    assert kernels.quantise_activations(torch.empty(0, 130))[1].shape == (0, 2)
    assert kernels.grouped_scaled_mm(qa, sa, qb[None], sb[None], torch.tensor([0]), F32).shape == (0, 40)


# --- compiled for Hopper ---------------------------------------------------------------------------------------------


class Assembly:
    """PTX of a kernel, its registers and what it spills."""

    def __init__(self, kernel: Any, config: Any, types: dict[str, str], **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        constants |= {name: None for name, kind in types.items() if kind == "constexpr" and name not in constants}
        signature |= dict.fromkeys(constants, "constexpr")
        places = [(i,) for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
        sizes = ("N", "K", "x_row", "w_row", "w_expert", "scale_block")
        aligned = [(i,) for i, name in enumerate(kernel.arg_names) if name in sizes]
        source = triton.compiler.ASTSource(
            kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in places + aligned}
        )
        self.compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=config)
        self.ptx: str = self.compiled.asm["ptx"]
        self.shared: int = self.compiled.metadata.shared

    def resources(self, folder: Path) -> dict[str, int]:
        """REG, STACK, SHARED, LOCAL as cuobjdump reports them."""
        from triton import knobs

        cubin = folder / "kernel.cubin"
        cubin.write_bytes(self.compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", printed)}


@pytest.fixture
def assemble(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    from triton import knobs

    try:
        assert knobs.nvidia.ptxas.path
    except RuntimeError as error:
        pytest.skip(f"Triton came without ptxas: {error}")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path / "cache"))
    return Assembly


def multiply(assemble: Any, config: Any, *, grouped: bool) -> Assembly:
    block_m, part = config.kwargs["BLOCK_M"], config.kwargs["PART"]
    types = {
        "a": f"tensordesc<fp8e4nv[{block_m}, 128]>",
        "b": f"tensordesc<fp8e4nv[{part}, 128]>",
        "c": "*bf16",
        "sa": "*fp32",
        "sb": "*fp32",
        "counts": "*i64" if grouped else "constexpr",
    }
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "maxnreg": config.maxnreg}
    # Triton makes constants of arguments that are 1; these are where scales come from our quantisers.
    ones = dict(sa_row=1, sb_block=1) | ({} if grouped else dict(E=1))
    return assemble(kernels._matmul, options, types, **ones, **config.kwargs, E_POWER=8 if grouped else 1)


CONFIGS = kernels.FEW_ROWS + kernels.MANY_ROWS
AT_ONCE = [2, 2, 2, 2, 3, 2, 1, 2, 1]
"""How many programs of each a multiprocessor is meant to hold."""
QUICK = [(1, True), (4, False), (6, True), (8, False)]


@compiled
@pytest.mark.parametrize(
    ("index", "grouped"),
    [
        pytest.param(i, grouped, marks=() if (i, grouped) in QUICK else pytest.mark.slow)
        for i in range(len(CONFIGS))
        for grouped in (False, True)
    ],
)
def test_products_compile_for_hopper(assemble: Any, tmp_path: Path, index: int, grouped: bool) -> None:
    """FP8 tensor-core instructions on operands that TMA brought, as many programs at once as meant, hardly a spill."""
    config = CONFIGS[index]
    tile, part = config.kwargs, config.kwargs["PART"]
    assembly = multiply(assemble, config, grouped=grouped)
    assert "cp.async.bulk.tensor" in assembly.ptx
    # 128 of K are four instructions, of which the first starts from nothing: no sum stays in the 14 bits for longer.
    shape = f"wgmma.mma_async.sync.aligned.m64n{part}k32.f32.e4m3.e4m3"
    adds_to = re.findall(re.escape(shape) + r" \{[^}]*\}, %rd\d+, %rd\d+, (\S+), 1, 1;", assembly.ptx)
    assert [to == "0" for to in adds_to] == [True, False, False, False] * (tile["BLOCK_N"] // part)
    # And leaves them by one multiply-add for each value of the tile.
    assert assembly.ptx.count("fma.rn.f32") == tile["BLOCK_M"] * tile["BLOCK_N"] // (32 * config.num_warps)
    used = assembly.resources(tmp_path)
    # Where parts overlap, ptxas moves some values to and fro; a whole accumulator would be 256 bytes.
    assert used["STACK"] + used["LOCAL"] <= (0 if part == tile["BLOCK_N"] else 192)
    assert used["REG"] * 32 * config.num_warps * AT_ONCE[index] <= 65536
    assert (assembly.shared + 1024) * AT_ONCE[index] <= 228 * 1024


@compiled
@pytest.mark.parametrize("name", ["rows", "silu", "blocks", "dequantise"])
def test_quantisers_compile_for_hopper(assemble: Any, tmp_path: Path, name: str) -> None:
    """16 bytes at a load, and the hardware's own rounding to E4M3."""
    if name == "blocks":
        types = {"w": "*bf16", "q": "*fp8e4nv", "scale": "*fp32"}
        assembly = assemble(kernels._quantise_blocks, {"num_warps": 8}, types, UE8M0=True)
    elif name == "dequantise":
        types = {"q": "*fp8e4nv", "scale": "*fp32", "out": "*fp32"}
        assembly = assemble(kernels._dequantise, {"num_warps": 4}, types, ROWS=32, ROWS_PER_SCALE=128)
    else:
        types = {"x": "*bf16", "q": "*fp8e4nv", "scale": "*fp32"}
        constants = dict(SILU=name == "silu", UE8M0=False, ROWS=kernels._QUANTISE_ROWS)
        assembly = assemble(kernels._quantise_rows, {"num_warps": 4}, types, **constants)
    if name != "dequantise":
        assert "cvt.rn.satfinite.e4m3x2.f32" in assembly.ptx
        assert "ld.global.v4.b32" in assembly.ptx
    used = assembly.resources(tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0
