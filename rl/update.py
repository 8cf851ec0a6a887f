"""A scored rollout -> optimizer steps: minibatches × epochs, micro-batches and processes that add up."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rl.batch import batches, count_known, trainable
from rl.config import GRPOConfig
from rl.loss import grpo_loss
from rl.policy import Policy
from rl.types import Batch, Group


class SamplerGap(RuntimeError):
    """The sampler's log-probs are too far from the trainer's to learn from its samples."""


class NonFinite(RuntimeError):
    """Gradients were not finite several updates in a row."""


MAX_SKIPPED = 3
"""Consecutive updates with a non-finite gradient before the run stops."""


class Optimizer:
    """AdamW with linear warm-up, then a constant rate; counts its updates."""

    def __init__(self, model: nn.Module, config: GRPOConfig) -> None:
        self.model, self.config = model, config.optim
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            parameters,
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            foreach=True,
        )
        self.updates = 0
        self.skipped = 0

    def learning_rate(self) -> float:
        """Of the next update."""
        return self.config.lr * min(1.0, (self.updates + 1) / max(self.config.warmup_steps, 1))

    def step(self) -> float:
        """Clip and apply the gradients; returns their norm. A non-finite gradient changes nothing."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate()
            self.adamw.step()
            self.updates += 1
            self.skipped = 0
        else:
            self.skipped += 1
            if self.skipped >= MAX_SKIPPED:
                raise NonFinite(f"gradient norm {norm} in {MAX_SKIPPED} updates in a row: lower optim.lr, or look at "
                                "the newest rollouts file for what the model was trained on")  # fmt: skip
        self.adamw.zero_grad(set_to_none=True)
        return norm


def update(policy: Policy, groups: Sequence[Group], optimizer: Optimizer) -> dict[str, float]:
    """Take all of a rollout's optimizer steps and return their metrics, over all processes.

    Raises SamplerGap, before any weight changes, when the sampler's log-probs are too far off.
    """
    config, world = policy.config, policy.world
    size = len(groups) // config.optim.minibatches
    minibatches = [groups[i : i + size] for i in range(0, len(groups), size)]
    prepared = [_batches(policy, minibatch) for minibatch in minibatches]
    known = [int(world.sum(torch.tensor([count_known(m)]))) for m in minibatches]

    # With one optimizer step per rollout π_old is π_θ itself: its log-probs come free with the forward pass.
    on_policy = len(minibatches) * config.optim.epochs == 1
    stored = None if on_policy else [[_logprobs(policy, b) for b in m] for m in prepared]
    if stored is not None:
        _check_gap(policy, [b for m in prepared for b in m], [old for m in stored for old in m])

    sums = torch.zeros(6, dtype=torch.float64)  # loss, tokens, entropy, clipped, kl, grad norm
    gap = torch.zeros(0)
    for _ in range(config.optim.epochs):
        for m, (minibatch, n) in enumerate(zip(prepared, known, strict=True)):
            olds: list[Tensor] = []
            for i, batch in enumerate(minibatch):
                logprobs_T, entropy_T = policy.logprobs(batch.packed, only_T=batch.loss_mask_T)
                olds.append(logprobs_T.detach() if stored is None else stored[m][i])
                reference_T = policy.reference_logprobs(batch.packed, only_T=batch.loss_mask_T)
                parts = grpo_loss(
                    batch, logprobs_T, olds[-1], reference_T, config=config.loss, num_completions=max(n, 1)
                )
                parts.loss.backward()
                tokens = batch.loss_mask_T.sum()
                sums[:5] += torch.stack(
                    [parts.loss.detach(), tokens, entropy_T.sum(), parts.clipped, parts.kl]
                ).double().cpu()  # fmt: skip
            if stored is None:
                gap = _check_gap(policy, minibatch, olds)
            if int(world.sum(torch.tensor([len(minibatch)]))) == 0:
                continue  # nothing to learn from: momentum alone must not move the weights
            world.sum_gradients(policy.model)
            sums[5] += optimizer.step() / world.size
    if stored is not None:
        gap = _gaps([b for m in prepared for b in m], [old for m in stored for old in m])

    loss, tokens, entropy, clipped, kl, norm = world.sum(sums).tolist()
    steps = len(minibatches) * config.optim.epochs
    metrics = {
        "loss": loss / steps,
        "grad_norm": norm / steps,
        "learning_rate": optimizer.adamw.param_groups[0]["lr"],
        "entropy": entropy / max(tokens, 1),
        "clip_ratio/region_mean": clipped / max(tokens, 1),
        "updates/skipped": float(optimizer.skipped),
        **_gap_metrics(policy, gap),
    }
    if config.loss.beta > 0:
        metrics["kl"] = kl / max(tokens, 1)
    return metrics


def _batches(policy: Policy, groups: Sequence[Group]) -> list[Batch]:
    samples = trainable(groups, mask_truncated=policy.config.loss.mask_truncated)
    limit = policy.config.optim.microbatch_tokens
    return list(batches(samples, max_tokens=limit, device=policy.world.device))


@torch.no_grad()
def _logprobs(policy: Policy, batch: Batch) -> Tensor:
    return policy.logprobs(batch.packed, only_T=batch.loss_mask_T)[0]


def _gaps(minibatch: Sequence[Batch], olds: Sequence[Tensor]) -> Tensor:
    """log π_trainer − log π_sampler of every trained token, on the CPU."""
    gaps = [(old - b.sampler_logprobs_T)[b.loss_mask_T].cpu() for b, old in zip(minibatch, olds, strict=True)]
    return torch.cat(gaps) if gaps else torch.zeros(0)


def _check_gap(policy: Policy, minibatch: Sequence[Batch], olds: Sequence[Tensor]) -> Tensor:
    gap = _gaps(minibatch, olds)
    metrics = _gap_metrics(policy, gap)
    mean, limit = metrics["sampling/logp_gap/mean"], policy.config.sampling.gap_limit
    if not mean <= limit:  # a NaN fails too
        raise SamplerGap(
            f"sampling.gap_limit={limit}: mean |log π_trainer − log π_sampler| of this rollout is {mean:.3g} nats per "
            f"token (max {metrics['sampling/logp_gap/max']:.3g}). The sampler and the trainer disagree about the same "
            "weights: compare sampling.dtype with precision, or use sampling.backend=native; raise the limit only if "
            "you know why"
        )
    return gap


def _gap_metrics(policy: Policy, gap: Tensor) -> dict[str, float]:
    """Mean and max |Δ log-prob|, and the effective share of samples under the importance weights π_old / π_sampler."""
    world = policy.world
    weights = gap.double().exp()
    sums = torch.tensor(
        [len(gap), float(gap.abs().sum()), float(weights.sum()), float(weights.square().sum())],
        dtype=torch.float64,
    )
    n, total, w, w2 = world.sum(sums).tolist()
    largest = max(world.gather([float(gap.abs().max()) if len(gap) else 0.0]))
    return {
        "sampling/logp_gap/mean": total / max(n, 1),
        "sampling/logp_gap/max": largest,
        "sampling/effective_sample_size": w * w / (n * w2) if n and w2 else 1.0,
    }
