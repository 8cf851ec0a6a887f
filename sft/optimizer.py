"""Gradients -> a step: AdamW (or Muon beside it) on a cosine."""

import math
from typing import Any

import torch
from torch import nn

from runtime.errors import UserError
from runtime.sharding import load_optimizer_state, norm_of_gradients, whole_optimizer_state
from sft.config import OptimConfig
from sft.trainee import Trainee

MAX_SKIPPED = 3
"""Consecutive steps with a non-finite gradient before the run stops."""


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Of a step, from 0: linear warm-up, then a cosine from lr to final_lr, which the last step has."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(steps - 1 - config.warmup_steps, 1)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


class Optimizer:
    """Steps a trainee's weights; a non-finite gradient changes nothing."""

    def __init__(self, trainee: Trainee, config: OptimConfig, *, steps: int) -> None:
        """steps: of the whole run, for the cosine."""
        self.trainee, self.config, self.steps = trainee, config, steps
        self.skipped = 0
        """Steps left out in a row, up to now."""
        if config.muon and trainee.is_sharded:
            raise UserError("optim.muon: it takes whole matrices; set shard to false, or muon to false")
        matrices, decayed, others = _groups(trainee, muon=config.muon)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=config.betas, fused=True)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(
                    matrices, lr=config.lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
                )
            )

    def step(self, step: int) -> float:
        """Clip and apply the gradients of a step, counted from 0; returns their norm."""
        norm = norm_of_gradients(self.trainee.trained, self.config.max_grad_norm)
        finite = math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, self.steps, self.config)
            if finite:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Any]:
        """For `load`; whole in the first process, whatever the number of them. All must call it."""
        return {str(i): whole_optimizer_state(self.trainee, o) for i, o in enumerate(self.optimizers)}

    def load(self, state: dict[str, Any]) -> None:
        """Put a state back; only the first process's counts if the trainee is sharded."""
        for i, optimizer in enumerate(self.optimizers):
            load_optimizer_state(self.trainee, optimizer, state.get(str(i), {}))


def _groups(trainee: Trainee, *, muon: bool) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Muon's matrices, AdamW's decayed parameters, and the others (norms, biases, adapters' none)."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in trainee.named_parameters():
        if not p.requires_grad:
            continue
        inner = p.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.weight"))
        (matrices if muon and inner else decayed if p.ndim > 1 else others).append(p)
    return matrices, decayed, others
