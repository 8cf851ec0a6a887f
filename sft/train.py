"""Demonstrations -> a model that imitates them: one pass of steps over packed rows.

Loss: token-mean cross-entropy on completions only. Matrices learn by Muon, everything else by AdamW: on the tiny V3
that reached in 600 steps what AdamW alone did not come near. Left out for now: mixes of sources, checkpoints,
several processes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from runtime.packed import pack, packed_logprobs

Example = tuple[list[int], list[bool]]
"""Token ids and loss mask (True = trained) of one demonstration."""


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """A short supervised run."""

    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 32
    """Demonstrations per step."""
    lr: float = 4e-3
    """Peak learning rate, for Muon and AdamW alike; large because the model is tiny."""
    final_lr_ratio: float = 0.1
    """The cosine ends at this share of the peak."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    seed: int = 0
    """Decides the order of the demonstrations."""


def cosine_lr(step: int, config: SFTConfig) -> float:
    """Learning rate of a step, from 0: linear warm-up, then cosine from lr to lr · final_lr_ratio."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    low = config.lr * config.final_lr_ratio
    return float(low + (config.lr - low) * 0.5 * (1 + np.cos(np.pi * progress)))


def make_optimizers(model: nn.Module, config: SFTConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between embedding and head; AdamW for experts, embedding, head, router and norms."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        is_matrix = p.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "mlp.gate.weight"))
        (matrices if is_matrix else others).append(p)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    ]
    if matrices:
        optimizers.append(
            torch.optim.Muon(matrices, lr=config.lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def fine_tune(
    model: nn.Module,
    examples: Sequence[Example],
    config: SFTConfig,
    *,
    on_step: Callable[[int, dict[str, float]], None] = lambda step, metrics: None,
) -> None:
    """Train `model` in place. `on_step(step, metrics)` is called after each step, counted from 1."""
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, config)
    order = np.random.default_rng(config.seed)
    queue: list[int] = []
    model.train()
    for step in range(config.steps):
        while len(queue) < config.batch_size:
            queue += order.permutation(len(examples)).tolist()
        rows, queue = [examples[i] for i in queue[: config.batch_size]], queue[config.batch_size :]
        packed = pack([ids for ids, _ in rows], device)
        trained_T = torch.tensor([t for _, mask in rows for t in mask], device=device)

        logprobs_T, _ = packed_logprobs(model, packed, only_T=trained_T)
        loss = -logprobs_T.sum() / trained_T.sum()
        loss.backward()

        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        lr = cosine_lr(step, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        on_step(step + 1, {"loss": loss.item(), "grad_norm": float(grad_norm), "learning_rate": lr})
    model.eval()
