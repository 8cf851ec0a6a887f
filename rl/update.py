"""A scored rollout -> optimizer steps: minibatches × epochs, micro-batches and processes that add up.

With one optimizer step a rollout, π_old is π_θ itself and its log-probs come free with the forward pass; otherwise
they are computed before the first step. The reference is a pass of its own, and only at β > 0.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deepseek_v3.routing import Flips, replayed
from rl.batch import batches, count_known, count_tokens, make_batch, trainable
from rl.gap import check_gap
from rl.loss import LossInputs, Totals, policy_loss
from rl.policy import Policy
from rl.types import Batch, Family, Group, Sample
from runtime.sharding import load_optimizer_state, norm_of_gradients, whole_optimizer_state


class NonFinite(RuntimeError):
    """Gradients were not finite several updates in a row."""


MAX_SKIPPED = 3
"""Consecutive updates with a non-finite gradient before the run stops."""


class Optimizer:
    """AdamW with linear warm-up, then a constant rate; counts its updates."""

    def __init__(self, policy: Policy) -> None:
        self.model, self.config = policy.trained, policy.config.optim
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        self.updates = 0
        self.skipped = 0
        """Updates left out in a row, up to now."""

    def learning_rate(self) -> float:
        """Of the next update."""
        return self.config.lr * min(1.0, (self.updates + 1) / max(self.config.warmup_steps, 1))

    def step(self) -> float:
        """Clip and apply the gradients; returns their norm. A non-finite gradient changes nothing."""
        norm = norm_of_gradients(self.parameters, self.config.max_grad_norm)
        if math.isfinite(norm):
            for group in self.adamw.param_groups:
                group["lr"] = self.learning_rate()
            self.adamw.step()
            self.updates += 1
            self.skipped = 0
        else:
            self.skipped += 1
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        """AdamW's, for `load`; whole in the first process, whatever the number of them. All must call it."""
        return whole_optimizer_state(self.model, self.adamw)

    def load(self, state: dict[str, Any]) -> None:
        """Put AdamW's state back; only the first process's counts if the policy is sharded."""
        load_optimizer_state(self.model, self.adamw, state)


@dataclass(frozen=True, kw_only=True)
class Minibatch:
    """The groups of one optimizer step."""

    groups: Sequence[Group]
    batches: list[Batch]
    """In as many forward and backward passes as memory wants."""
    padding: int
    """Passes with weight 0 after those: sharded processes must run as many as each other."""
    totals: Totals
    """Over all processes."""
    anything: bool
    """Whether any process has something to train on."""


def update(
    policy: Policy,
    groups: Sequence[Group],
    optimizer: Optimizer,
    *,
    on_skip: Callable[[Sequence[Group], float], None] = lambda groups, norm: None,
    on_old: Callable[[Tensor], None] = lambda old_C: None,
) -> dict[str, float]:
    """Take all of a rollout's optimizer steps and return their metrics, over all processes.

    on_skip is told of groups whose gradient norm was not finite, and which therefore moved nothing; on_old of log π_old
    of every token that `rl.batch.trainable` makes of the groups, in its order, (C,).
    Raises SamplerGap, before any weight changes, when the sampler's log-probs are too far off, and NonFinite when
    MAX_SKIPPED updates in a row could not be taken.
    """
    config, world = policy.config, policy.world
    minibatches = [_minibatch(policy, part) for part in _split(groups, config.optim.minibatches)]
    flips = Flips()
    stored, gap = None, {}
    if len(minibatches) * config.optim.epochs > 1:
        stored = [_old_logprobs(policy, m) for m in minibatches]
        pairs = [pair for m, old in zip(minibatches, stored, strict=True) for pair in zip(m.batches, old, strict=True)]
        gap = check_gap([_inputs(batch, old, old, None) for batch, old in pairs], config, world)

    olds = [] if stored is None else [old for part in stored for old in part]
    sums = torch.zeros(7, dtype=torch.float64)  # loss, entropy, held, kl, tokens, units, grad norm
    for _ in range(config.optim.epochs):
        for i, minibatch in enumerate(minibatches):
            seen = []
            for j, batch in enumerate(minibatch.batches):
                reference = policy.reference_logprobs(batch)
                with _experts(policy, batch, flips):
                    logp, entropy = policy.logprobs(batch)
                    x = _inputs(batch, logp, logp.detach() if stored is None else stored[i][j], reference)
                    parts = policy_loss(x, config=config.loss, totals=minibatch.totals)
                    parts.loss.backward()
                seen.append(_inputs(batch, x.old, x.old, None))
                summed = torch.stack([parts.loss.detach(), entropy.sum(), parts.held, parts.kl]).double().tolist()
                sums[:6] += torch.tensor([*summed, len(logp), parts.units], dtype=torch.float64)
            for _ in range(minibatch.padding):
                _empty_pass(policy)
            if stored is None:
                gap = check_gap(seen, config, world)
                olds += [x.old for x in seen]
            if not minibatch.anything:
                continue  # momentum alone must not move the weights
            policy.trained.sum_gradients()
            norm = optimizer.step()
            sums[6] += norm / world.size
            if not math.isfinite(norm):
                on_skip(minibatch.groups, norm)
                if optimizer.skipped >= MAX_SKIPPED:
                    raise NonFinite(
                        f"gradient norm {norm} in {MAX_SKIPPED} updates in a row: lower optim.lr, or look at what the "
                        "model was trained on: skipped-*.json in the run folder names the completions"
                    )

    on_old(torch.cat(olds) if olds else torch.zeros(0))
    loss, entropy_sum, held, kl, tokens, units, norms = world.sum(sums).tolist()
    steps = len(minibatches) * config.optim.epochs
    metrics = {
        "loss": loss / steps,
        "grad_norm": norms / steps,
        "learning_rate": optimizer.adamw.param_groups[0]["lr"],
        "entropy": entropy_sum / max(tokens, 1),
        "clip_ratio/region_mean": held / max(units, 1),
        "updates/skipped": float(optimizer.skipped),
        **gap,
    }
    if config.loss.beta > 0:
        metrics["kl"] = kl / max(units, 1)
    if config.sampling.experts != "ignore":
        flipped, routed = world.sum(torch.tensor([flips.flipped, flips.total], dtype=torch.float64)).tolist()
        metrics["router/flip_rate"] = flipped / max(routed, 1)
    return metrics


def _split(groups: Sequence[Group], parts: int) -> list[Sequence[Group]]:
    """Neighbours together, in exactly `parts` parts whose sizes differ by at most one."""
    bounds = [len(groups) * i // parts for i in range(parts + 1)]
    return [groups[a:b] for a, b in pairwise(bounds)]


def _minibatch(policy: Policy, groups: Sequence[Group]) -> Minibatch:
    config, world = policy.config, policy.world
    families = trainable(groups, mask_truncated=config.loss.mask_truncated)
    completions, tokens = world.sum(torch.tensor([count_known(groups), count_tokens(families)])).tolist()
    limit, share = config.optim.microbatch_tokens, config.optim.share_prompts
    own = list(batches(families, max_tokens=limit, share=share, device=world.device))
    passes = max(world.gather([len(own)])) if policy.trained.is_sharded else len(own)
    return Minibatch(
        groups=groups,
        batches=own,
        padding=passes - len(own),
        totals=Totals(
            completions=max(completions, 1), tokens=max(tokens, 1), max_tokens=config.sampling.max_tokens
        ),
        anything=tokens > 0,
    )  # fmt: skip


def _inputs(batch: Batch, logp: Tensor, old: Tensor, reference: Tensor | None) -> LossInputs:
    return LossInputs(
        logp=logp,
        old=old,
        sampler=batch.sampler_logprobs_C,
        reference=reference,
        sequence=batch.sequence_C,
        advantages=batch.advantages_N,
        lengths=batch.lengths_N,
    )


@torch.no_grad()
def _old_logprobs(policy: Policy, minibatch: Minibatch) -> list[Tensor]:
    olds = []
    for batch in minibatch.batches:
        with _experts(policy, batch, Flips()):
            olds.append(policy.logprobs(batch)[0])
    for _ in range(minibatch.padding):
        policy.logprobs(_nothing(policy))
    return olds


def _empty_pass(policy: Policy) -> None:
    """Take part in a pass of the others, with a gradient of 0."""
    nothing = _nothing(policy)
    policy.reference_logprobs(nothing)
    (0.0 * policy.logprobs(nothing)[0].sum()).backward()


def _nothing(policy: Policy) -> Batch:
    """The least a model can be asked about."""
    sample = Sample(ids=[0], logprobs=[0.0], advantage=0.0)
    return make_batch([Family(prompt=[0], samples=[sample])], policy.world.device)


def _experts(policy: Policy, batch: Batch, flips: Flips) -> AbstractContextManager[Any]:
    """The sampler's choice of experts in force or compared with (R3), forward and backward; nothing if unrecorded."""
    if batch.experts_LTK is None:
        return nullcontext()
    return replayed(policy.model, batch.experts_LTK, use=policy.config.sampling.experts == "replay", flips=flips)
