"""A run in progress -> files in a checkpoint folder, and back, bit for bit.

Data order and samples are functions of the seed and a cursor, so besides weights and optimizer there is little to
keep: how far the run is, what its curriculum has seen, the generators' states, and the reference if it has been
replaced.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rl.curriculum import Curriculum
from rl.policy import Policy
from rl.update import Optimizer
from runtime.errors import UserError
from runtime.models import tokenizer_hash
from runtime.state import load_state, rng_state, save_state, set_rng_state
from runtime.weights import checkpoint_tensors, checkpoint_views


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps done."""
    cursor: int = 0
    """Draws of the data's order that are used up."""


def save_training_state(
    folder: Path, policy: Policy, optimizer: Optimizer, curriculum: Curriculum, progress: Progress
) -> None:
    """Everything `load_training_state` needs. With full training the folder also loads as a checkpoint."""
    if policy.config.lora is None:
        policy.save_pretrained(folder)
    else:
        policy.model.save_pretrained(folder / "adapter")  # type: ignore[operator]
    if policy.reference is not None:
        save_state(folder, "reference", dict(checkpoint_tensors(policy.reference)))
    save_state(folder, "optimizer", optimizer.adamw.state_dict())
    trainer = {"updates": optimizer.updates, "skipped": optimizer.skipped, "rng": rng_state()}
    trainer |= {"tokenizer": tokenizer_hash(policy.tokenizer)}
    save_state(folder, "trainer", trainer | {"progress": asdict(progress), "curriculum": curriculum.state()})


def checkpoint_bytes(policy: Policy) -> int:
    """About what a checkpoint takes: weights, two moments of each trained one, and the reference if there is one."""
    weights = sum(tensor.numel() * tensor.element_size() for _, tensor in checkpoint_tensors(policy.model))
    trained = sum(p.numel() * p.element_size() for p in policy.model.parameters() if p.requires_grad)
    return weights * (2 if policy.reference is not None else 1) + 2 * trained


@torch.no_grad()
def load_training_state(folder: Path, policy: Policy, optimizer: Optimizer, curriculum: Curriculum) -> Progress:
    """Put everything back in place; returns how far the run is.

    The policy must have been loaded from this folder, or with LoRA from the run's base model. Raises UserError if that
    has another tokenizer by now: the same text would be other tokens.
    """
    trainer = load_state(folder, "trainer")
    if trainer["tokenizer"] != tokenizer_hash(policy.tokenizer):
        raise UserError(
            f"model={policy.config.model!r}: its tokenizer or chat template is no longer the one this run was started "
            "with; put it back, or give another --run_dir"
        )
    if policy.config.lora is not None:
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(policy.model, load_peft_weights(str(folder / "adapter")))
    if policy.reference is not None:
        saved = load_state(folder, "reference")
        for name, tensor in checkpoint_views(policy.reference).items():
            tensor.copy_(saved[name])
    optimizer.adamw.load_state_dict(load_state(folder, "optimizer"))
    optimizer.updates, optimizer.skipped = trainer["updates"], trainer["skipped"]
    set_rng_state(trainer["rng"])
    curriculum.load(trainer["curriculum"])
    return Progress(**trainer["progress"])
