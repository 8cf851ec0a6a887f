"""A run in progress -> files in a checkpoint folder, and back, bit for bit.

Data order and samples are functions of (seed, step), so besides weights and optimizer there is nothing to keep but
the step, the generators' states, and the reference if it has been replaced.
"""

from pathlib import Path

import torch

from rl.policy import Policy
from rl.update import Optimizer
from runtime.state import load_state, rng_state, save_state, set_rng_state
from runtime.weights import checkpoint_tensors, checkpoint_views


def save_training_state(folder: Path, policy: Policy, optimizer: Optimizer, *, step: int) -> None:
    """Everything `load_training_state` needs. With full training the folder also loads as a checkpoint."""
    if policy.config.lora is None:
        policy.save_pretrained(folder)
    else:
        policy.model.save_pretrained(folder / "adapter")  # type: ignore[operator]
    if policy.reference is not None:
        save_state(folder, "reference", dict(checkpoint_tensors(policy.reference)))
    save_state(folder, "optimizer", optimizer.adamw.state_dict())
    save_state(
        folder,
        "trainer",
        {"step": step, "updates": optimizer.updates, "skipped": optimizer.skipped, "rng": rng_state()},
    )


@torch.no_grad()
def load_training_state(folder: Path, policy: Policy, optimizer: Optimizer) -> int:
    """Put everything back in place; returns the number of steps done.

    The policy must have been loaded from this folder, or with LoRA from the run's base model.
    """
    if policy.config.lora is not None:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_peft_weights(str(folder / "adapter")))
    if policy.reference is not None:
        saved = load_state(folder, "reference")
        for name, tensor in checkpoint_views(policy.reference).items():
            tensor.copy_(saved[name])
    optimizer.adamw.load_state_dict(load_state(folder, "optimizer"))
    trainer = load_state(folder, "trainer")
    optimizer.updates, optimizer.skipped = trainer["updates"], trainer["skipped"]
    set_rng_state(trainer["rng"])
    return int(trainer["step"])
