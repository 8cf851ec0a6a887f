"""CUDA: seconds of the FP8 products and quantisers on DeepSeek-V3's shapes, ours against torch's and transformers'.

Sides: ours; torch's block-scaled `scaled_mm` (cuBLAS, sm90); bf16 products of cuBLAS; ours with the quantiser of
activations before it; transformers' Triton kernel, which it takes from the hub and which quantises inside.
A side that isn't there, or computes something else, is named with the reason, and so is what there was no time for.
gpu.py runs this and prints its tables.

What is timed is a CUDA graph of several calls, each with operands of its own that no L2 cache holds together: neither
Python's overhead nor a cached weight counts. Shares of a roofline are of the published peaks of an H100 or H200 SXM.
On a CPU the reference computes; that is a check that this runs.
"""

import importlib.util
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._common import ratio, spread, timed
from deepseek_v3 import fp8
from deepseek_v3.fp8 import reference

SHAPES = [
    (64, 2112, 7168), (64, 7168, 16384), (128, 4096, 7168), (4096, 2112, 7168), (4096, 24576, 1536),
    (4096, 32768, 512), (4096, 7168, 16384), (4096, 4096, 7168), (4096, 7168, 2048),
]  # fmt: skip
"""M, N, K of DeepSeek-V3's linears: those that DeepGEMM reports."""
GROUPS = [([8192] * 4, 4096, 7168), ([8192] * 4, 7168, 2048), ([0, 8, 16, 64, 1024, 128, 2048, 808] * 4, 4096, 7168)]
"""Rows of each expert, N, K: as DeepGEMM's, and 32 experts under a skewed router."""
ROWS = [(4096, 7168), (16384, 2048)]
"""M and K to quantise."""
TINY = 33, 130, 200
PEAK_FLOPS = {torch.float8_e4m3fn: 1979e12, torch.bfloat16: 989e12}
PEAK_BYTES = {"H200": 4.8e12, "H100": 3.35e12}
TOLERANCE = 3e-3
"""Largest relative difference from the exact product of the same codes: bf16's rounding is 1.7e-3 of it."""
TOLERANCE_UNQUANTISED = 0.045
"""The same of what isn't quantised."""
CODES_TOLERANCE = 1e-3
"""Share of codes that may be one off from the reference's."""
L2_BYTES = 50e6


@dataclass
class Side:
    """A contestant: `calls`, one for each set of operands, and what one call does."""

    name: str
    calls: Sequence[Callable[[], object]]
    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype = torch.float8_e4m3fn


def measure(
    device: torch.device, *, tiny: bool, rounds: int, until: float = math.inf
) -> tuple[list[list[str]], list[str]] | None:
    """Rows for the table and notes on who is missing, or None where ours computes something else.

    until: time.monotonic() from which on no other row is begun.
    """
    if (lacking := _lacking(device)) is not None:
        return [], [lacking]
    M, N, K = TINY
    notes: list[str] = []
    lines: list[list[str]] = []
    work: list[tuple[str, Callable[[], list[list[str]] | None]]] = [
        *(
            (" × ".join(map(str, size)), partial(_products, size, device, rounds, notes))
            for size in ([TINY] if tiny else SHAPES)
        ),
        *(
            (f"{len(counts)} experts × {n} × {k}", partial(_grouped, counts, n, k, device, rounds, notes))
            for counts, n, k in ([([M, 0, 2 * M], N, K)] if tiny else GROUPS)
        ),
        *((f"quantise {m} × {k}", partial(_quantisers, m, k, device, rounds)) for m, k in ([(M, K)] if tiny else ROWS)),
    ]
    for name, rows_of in work:
        if time.monotonic() > until:
            notes.append(f"{name}: out of time")
        elif (rows := rows_of()) is None:
            return None
        else:
            lines += rows
    return lines, list(dict.fromkeys(notes))


def _lacking(device: torch.device) -> str | None:
    """What keeps the kernels from running here."""
    if device.type != "cuda":
        return None
    if importlib.util.find_spec("triton") is None:
        return "FP8: Triton is not installed: pip install triton"
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"FP8: needs Hopper or later (sm90), this GPU is sm{capability[0]}{capability[1]}"
    return None


HEADER = ["what", "side", "µs", "TFLOP/s", "GB/s", "of the roofline", "ours is faster"]


# --- products --------------------------------------------------------------------------------------------------------


def _products(
    size: tuple[int, int, int], device: torch.device, rounds: int, notes: list[str]
) -> list[list[str]] | None:
    M, N, K = size
    work = dict(flops=2.0 * M * N * K)
    scales = 4 * (M + -(-N // 128)) * -(-K // 128)
    sets = [_operands(M, N, K, device, seed) for seed in range(_copies((M + N) * K, device))]
    x, _, a, b = sets[0]
    exact = reference.dequantise_activations(*a) @ reference.dequantise_weight(*b).T
    if not _agrees("ours", fp8.scaled_mm(*a, *b), exact):
        return None
    eight = dict(bytes=float((M + N) * K + scales + 2 * M * N), **work)
    sides = [Side("ours", [lambda a=a, b=b: fp8.scaled_mm(*a, *b) for _, _, a, b in sets], **eight)]
    if _available("torch block-wise", lambda: _torch_scaled_mm(*a, *_torch_layout(b)), exact, TOLERANCE, notes):
        layouts = [(a, _torch_layout(b)) for _, _, a, b in sets]
        calls = [lambda a=a, b=b: _torch_scaled_mm(*a, *b) for a, b in layouts]
        sides.append(Side("torch block-wise", calls, **eight))
    two = dict(bytes=float(2 * (M + N) * K + 2 * M * N), dtype=torch.bfloat16, **work)
    sides.append(Side("bf16", [lambda x=x, w=w: x @ w.T for x, w, _, _ in sets], **two))
    inside = dict(bytes=float((2 * M + N) * K + scales + 2 * M * N), **work)
    quantising = [lambda x=x, b=b: fp8.scaled_mm(*fp8.quantise_activations(x), *b) for x, _, _, b in sets]
    sides.append(Side("ours, quantising", quantising, **inside))
    if _available("transformers", lambda: _transformers(x, *b), exact, 1e-2, notes):
        calls = [lambda x=x, b=b: _transformers(x, *b) for x, _, _, b in sets]
        sides.append(Side("transformers, quantising", calls, **inside))
    return _rows(f"{M} × {N} × {K}", sides, rounds, device)


def _operands(
    M: int, N: int, K: int, device: torch.device, seed: int
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """bf16 activations and weight, and both quantised."""
    generator = torch.Generator(device).manual_seed(seed)
    x, w = (torch.randn(n, K, generator=generator, device=device, dtype=torch.bfloat16) for n in (M, N))
    return x, w, fp8.quantise_activations(x), fp8.quantise_weight(w)


def _torch_layout(b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The weight as cuBLAS reads it: its scales' rows filled up to four."""
    qb, sb = b
    return qb.T, F.pad(sb, (0, -sb.shape[1] % 4)).T


def _torch_scaled_mm(qa: Tensor, sa: Tensor, qb: Tensor, sb: Tensor) -> Tensor:
    recipe = F.ScalingType
    return F.scaled_mm(qa, qb, sa, recipe.BlockWise1x128, sb, recipe.BlockWise128x128, output_dtype=torch.bfloat16)


def _transformers(x: Tensor, qb: Tensor, sb: Tensor) -> Tensor:
    from transformers.integrations.finegrained_fp8 import finegrained_fp8_linear

    return finegrained_fp8_linear(x, qb, sb, [128, 128])


# --- experts ---------------------------------------------------------------------------------------------------------


def _grouped(
    counts: list[int], N: int, K: int, device: torch.device, rounds: int, notes: list[str]
) -> list[list[str]] | None:
    M, E = sum(counts), len(counts)
    x, w, a, b = _operands(M, E * N, K, device, 0)
    w_ENK = w.view(E, N, K)
    b = fp8.quantise_weight(w_ENK)
    counts_E = torch.tensor(counts, device=device)
    out = fp8.grouped_scaled_mm(*a, *b, counts_E)
    parts = zip(*(t.split(counts) for t in a), *b, strict=True)
    exact = torch.cat(
        [reference.dequantise_activations(q, s) @ reference.dequantise_weight(v, t).T for q, s, v, t in parts]
    )
    if not _agrees("ours, grouped", out, exact):
        return None
    used = sum(count > 0 for count in counts)
    work = dict(flops=2.0 * M * N * K)
    eight = float((M + used * N) * K + 4 * (M + used * -(-N // 128)) * -(-K // 128) + 2 * M * N)
    sides = [Side("ours", [lambda: fp8.grouped_scaled_mm(*a, *b, counts_E)], bytes=eight, **work)]
    offsets = counts_E.cumsum(0).to(torch.int32)

    def bf16() -> Tensor:
        return F.grouped_mm(x, w_ENK.transpose(1, 2), offs=offsets)

    if _available("bf16 grouped_mm", bf16, exact, TOLERANCE_UNQUANTISED, notes):
        two = float(2 * (M + used * N) * K + 2 * M * N)
        sides.append(Side("bf16 grouped_mm", [bf16], bytes=two, dtype=torch.bfloat16, **work))

    def quantising() -> Tensor:
        return fp8.grouped_scaled_mm(*fp8.quantise_activations(x), *b, counts_E)

    def theirs() -> Tensor:
        from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

        multiply = load_finegrained_fp8_kernel().grouped_matmul
        return multiply(x, *b, offsets=offsets, tokens_per_expert=counts_E.int(), block_size=[128, 128])

    sides.append(Side("ours, quantising", [quantising], bytes=eight + M * K, **work))
    if _available("transformers, grouped", theirs, exact, 1e-2, notes):
        sides.append(Side("transformers, quantising", [theirs], bytes=eight + M * K, **work))
    most = max(counts)
    what = f"{E} experts, {M} rows" + (f", {most} the most" if most * E != M else "")
    return _rows(f"{what} × {N} × {K}", sides, rounds, device)


# --- quantisers ------------------------------------------------------------------------------------------------------


def _quantisers(M: int, K: int, device: torch.device, rounds: int) -> list[list[str]] | None:
    generator = torch.Generator(device).manual_seed(0)
    sets = range(_copies(3 * M * K, device))
    x = [torch.randn(M, K, generator=generator, device=device, dtype=torch.bfloat16) for _ in sets]
    gate_up = [torch.randn(M, 2 * K, generator=generator, device=device, dtype=torch.bfloat16) for _ in sets]
    for ours, theirs in (
        (fp8.quantise_activations(x[0]), reference.quantise_activations(x[0])),
        (fp8.silu_mul_quantise(gate_up[0]), reference.silu_mul_quantise(gate_up[0])),
        (fp8.quantise_weight(x[0]), reference.quantise_weight(x[0])),
    ):
        differ = (ours[0].view(torch.uint8).int() - theirs[0].view(torch.uint8).int()).abs()
        share = float(differ.count_nonzero() / differ.numel())
        print(f"quantised {M} × {K}: {share:.1e} of codes differ (≤ {CODES_TOLERANCE:g})", file=sys.stderr)
        if not (share <= CODES_TOLERANCE and int(differ.max()) <= 1):
            print(f"parity: {share:.1e} of codes differ, by up to {int(differ.max())}")
            return None

    values, scales = float(M * K), 4.0 * M * -(-K // 128)
    out = [torch.empty_like(t) for t in x]
    plain, plain_silu = (
        torch.compile(work, dynamic=False) if device.type == "cuda" else work
        for work in (_quantise, _silu_mul_quantise)
    )
    lines = _rows(
        f"quantise {M} × {K}",
        [
            Side("ours", [lambda t=t: fp8.quantise_activations(t) for t in x], bytes=3 * values + scales),
            Side("torch.compile", [lambda t=t: plain(t) for t in x], bytes=3 * values + scales),
            Side("copy (bf16)", [lambda t=t, o=o: o.copy_(t) for t, o in zip(x, out, strict=True)], bytes=4 * values),
        ],
        rounds,
        device,
    )
    lines += _rows(
        f"silu·mul, quantise {M} × {K}",
        [
            Side("ours", [lambda t=t: fp8.silu_mul_quantise(t) for t in gate_up], bytes=5 * values + scales),
            Side("torch.compile", [lambda t=t: plain_silu(t) for t in gate_up], bytes=5 * values + scales),
        ],
        rounds,
        device,
    )
    weight = Side("ours", [lambda t=t: fp8.quantise_weight(t) for t in x], bytes=3 * values)
    return lines + _rows(f"quantise weight {M} × {K}", [weight], rounds, device)


def _quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes for torch.compile to fuse; K a multiple of 128, or one block."""
    blocks = x.float().unflatten(-1, (-1, 128 if x.shape[-1] % 128 == 0 else x.shape[-1]))
    scale = blocks.abs().amax(-1).clamp(min=1e-4) / 448
    return (blocks / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(-2), scale


def _silu_mul_quantise(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return _quantise(F.silu(gate) * up)


# --- timing ----------------------------------------------------------------------------------------------------------


def _rows(what: str, sides: Sequence[Side], rounds: int, device: torch.device) -> list[list[str]]:
    """Lines of the table; the first side is ours, "ours, quantising" is compared with what follows it."""
    seconds = _seconds(sides, rounds, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    memory = next((peak for card, peak in PEAK_BYTES.items() if card in name), None)
    lines = []
    ours = seconds[0]
    for side, times in zip(sides, seconds, strict=True):
        if side.name.startswith("ours"):
            ours = times
        median = statistics.median(times)
        least = max(side.flops / PEAK_FLOPS[side.dtype], side.bytes / memory) if memory else None
        lines.append(
            [
                *(what, side.name, spread([1e6 * s for s in times], ",.1f")),
                f"{side.flops / median / 1e12:,.0f}" if side.flops else "",
                f"{side.bytes / median / 1e9:,.0f}",
                f"{least / median:.0%}" if least else "",
                "1" if times is ours else ratio(ours, times),
            ]
        )
    return lines


def _seconds(sides: Sequence[Side], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of a call, by turns in an order that rotates, after a round that isn't counted."""
    runs = [_graph(side.calls) if device.type == "cuda" else _plain(side.calls) for side in sides]
    results: list[list[float]] = [[] for _ in sides]
    for r in range(rounds + 1):
        for i in [*range(r % len(sides), len(sides)), *range(r % len(sides))]:
            seconds = runs[i]()
            if r:
                results[i].append(seconds)
    return results


def _plain(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    def once() -> float:
        return timed(lambda: [call() for call in calls])[0] / len(calls)

    return once


def _graph(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    """Capture the calls, again and again for a few milliseconds; returns what times one replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, tunes, allocates
            call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for call in calls:
            call()
        end.record()
        torch.cuda.synchronize()
    repeats = max(1, int(5 / max(start.elapsed_time(end), 1e-3)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()

    def once() -> float:
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats / len(calls)

    return once


def _copies(bytes_: float, device: torch.device) -> int:
    """Sets of operands that together are four times the L2 cache, 16 at most."""
    return min(16, max(1, -(-int(4 * L2_BYTES) // int(bytes_)))) if device.type == "cuda" else 1


def _agrees(name: str, out: Tensor, exact: Tensor) -> bool:
    off = _difference(out, exact)
    print(f"{name}, {tuple(out.shape)}: differs by {off:.1e} (≤ {TOLERANCE:g})", file=sys.stderr)
    if not off <= TOLERANCE:
        print(f"parity: {name} differs by {off:.1e} from the exact product, more than {TOLERANCE:g}")
    return off <= TOLERANCE


def _difference(out: Tensor, exact: Tensor) -> float:
    return float((out.float() - exact).norm() / exact.norm())


def _available(name: str, call: Callable[[], Tensor], exact: Tensor, tolerance: float, notes: list[str]) -> bool:
    """Whether it runs, and computes the product; if not, a note says why."""
    try:
        out = call()
        if out.is_cuda:
            _graph([call])  # as it will be timed
    except Exception as error:  # others' code: a kernel, a download, a version that knows other names
        notes.append(f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}")
        return False
    if not (off := _difference(out, exact)) <= tolerance:
        notes.append(f"{name}: differs by {off:.1e} from the exact product, not timed")
        return False
    return True
