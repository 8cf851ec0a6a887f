"""Log-probs and advantages -> GRPO's loss (DeepSeekMath, arXiv 2402.03300, equation 3), on packed tokens.

    ρ_t = π_θ(t) / π_old(t)
    l_t = w_t · min(ρ_t A, clip(ρ_t, 1 − ε, 1 + ε) A) − β · k3_t
    loss = − (1/n) Σ_i (1/|o_i|) Σ_t l_t

differs: w_t = min(π_old / π_sampler, cap) corrects for samples that came from an engine whose log-probs are not
quite the trainer's (truncated importance sampling). n, the number of completions, is an argument, so that
micro-batches and processes add up to the gradient of one large batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.config import LossConfig
from rl.types import Batch


@dataclass(frozen=True, kw_only=True)
class LossParts:
    """The loss and what it was made of; sums over trained tokens, so that micro-batches add up."""

    loss: Tensor
    """Scalar; its gradient is this batch's share of the whole."""
    clipped: Tensor
    """Tokens whose ratio the clip held back."""
    kl: Tensor
    """Σ k3 to the reference."""


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """e^d − d − 1 with d = log π_ref − log π: at least 0, and under π its mean is KL(π ‖ π_ref)."""
    d = reference_logprobs - logprobs
    return d.exp() - d - 1


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(π_old / π_sampler, cap) per token, a constant to the gradient; ones when cap is 0 (off)."""
    if cap == 0:
        return torch.ones_like(old_logprobs)
    return (old_logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def grpo_loss(
    batch: Batch,
    logprobs_T: Tensor,
    old_logprobs_T: Tensor,
    reference_logprobs_T: Tensor | None,
    *,
    config: LossConfig,
    num_completions: int,
) -> LossParts:
    """The loss of a packed batch. All log-probs are (T,) at the sampling temperature; num_completions is n above,
    over the whole minibatch and all processes."""
    at = batch.loss_mask_T.nonzero()[:, 0]
    sequence = batch.sequence_T[at]
    A = batch.advantages_N[sequence]
    logp, old = logprobs_T[at], old_logprobs_T[at].detach()

    ratio = (logp - old).exp()
    clipped_ratio = ratio.clamp(1 - config.epsilon, 1 + config.epsilon)
    unclipped, clipped = ratio * A, clipped_ratio * A
    w = importance_weights(old, batch.sampler_logprobs_T[at], cap=config.importance_cap)
    l = w * torch.minimum(unclipped, clipped)  # noqa: E741 (the paper's letter)

    kl = torch.zeros_like(l)
    if reference_logprobs_T is not None:
        kl = k3(logp, reference_logprobs_T[at])
        l = l - config.beta * kl  # noqa: E741

    per_token = l / batch.lengths_N[sequence]
    return LossParts(
        loss=-per_token.sum() / num_completions,
        clipped=(clipped < unclipped).sum(),
        kl=kl.detach().sum(),
    )
