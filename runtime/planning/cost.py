"""A census, a layout and a kind of GPU -> FLOPs and seconds of training and of sampling.

Training is FLOPs over a stated share of the peak (model FLOPs utilisation). Sampling is an estimate: a decode step
reads weights and cache once, at a stated share of the memory's bandwidth. Left out: rewards, weight sync, saving,
evaluation, data loading, and the long tail of a rollout's last completions.
"""

from runtime.planning.census import Census, decode_flops, experts_met, latent_values
from runtime.planning.layout import Gpu, Layout

SFT_MFU = 0.28
"""prime-rl's SFT of a 4B model on 8 H200: 28.4 %."""
GRPO_MFU = 0.19
"""verl's training of DeepSeek-V3 on 96 H20: 0.19."""
FP32_MFU = 0.7
"""SFT of the 20m preset on two cores (benchmarks/RESULTS.md); taken to hold for fp32 on GPUs, too."""
DECODE_EFFICIENCY = 0.45
"""Share of the bandwidth that vLLM reaches on an H200: 8.2 ms a step of Llama-8B against 3.7 for reading it once."""


def reached(kind: Gpu, *, bf16: bool, mfu: float | None, reported: float) -> tuple[float, str]:
    """FLOPs a second that training reaches on a GPU, and why. mfu: share of the peak; None: as reported."""
    peak = kind.flops if bf16 else kind.flops_fp32
    share = mfu or (reported if bf16 and kind.name != "cpu" else FP32_MFU)
    return share * peak, f"at {share:.0%} of {peak / 1e12:g} TFLOP/s, {'bf16' if bf16 else 'fp32'}"


def bubble(layout: Layout, passes: int) -> float:
    """Share of idle time that DualPipe-V adds (arXiv 2412.19437, table 2, and its V form of DeepSeek's DualPipe):
    (stages / 2 − 1)(F&B + B − 3W) of `passes` times two stages' work, at B = 2 F, W = F."""
    return (layout.pipeline - 1) / (3 * max(passes, 1))


def decoding(census: Census, kind: Gpu, *, gpus: int, tensor: int, rows: float, context: float, width: int) -> float:
    """Seconds in which every row gets a token: a GPU reads its weights and cache, or computes, whichever takes longer.

    Of `gpus`, which share the experts, `tensor` share all else and hold the same rows. width: bytes of a weight and of
    a cached value. Experts that no row is sent to aren't read.
    """
    config = census.config
    experts = sum(layer.experts for layer in census.main)
    rest = census.total - census.mtp - census.embedding - experts
    met = experts_met(config, rows * gpus / tensor)
    cache = len(census.main) * latent_values(config) * rows * context
    reading = width * (rest / tensor + experts * met / gpus + cache) / kind.bandwidth
    computing = rows * decode_flops(census, context) / (tensor * (kind.flops if width == 2 else kind.flops_fp32))
    return max(reading, computing) / DECODE_EFFICIENCY
