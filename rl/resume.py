"""A run in progress -> files in a checkpoint folder, and back, bit for bit.

Data order and samples are functions of the seed and a cursor, so besides weights and optimizer there is little to
keep: how far the run is, what its curriculum has seen, the generators' states, and the reference if it has been
replaced. All is saved whole, whatever it was spread over.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rl.curriculum import Curriculum
from rl.policy import REFERENCE, Policy
from rl.update import Optimizer
from runtime.adapters import ADAPTER
from runtime.errors import UserError
from runtime.models import tokenizer_hash
from runtime.state import load_state, rng_state, save_state, set_rng_state
from runtime.weights import checkpoint_tensors, save_pretrained


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Steps done."""
    cursor: int = 0
    """Draws of the data's order that are used up."""


def save_training_state(
    policy: Policy, optimizer: Optimizer, curriculum: Curriculum, progress: Progress
) -> Callable[[Path], None]:
    """Gather what `load_training_state` needs, in all processes; returns what writes it, for the first one.

    With full training the folder also loads as a checkpoint.
    """
    model, moments = policy.trained.whole(), optimizer.state()
    reference = None if policy.reference is None else policy.reference.whole()
    trainer = {"updates": optimizer.updates, "skipped": optimizer.skipped, "rng": rng_state()}
    trainer |= {"tokenizer": tokenizer_hash(policy.tokenizer)}
    trainer |= {"progress": asdict(progress), "curriculum": curriculum.state()}

    def write(folder: Path) -> None:
        assert model is not None
        if policy.config.lora is None:
            save_pretrained(folder, model, policy.tokenizer)
        else:
            model.save_pretrained(folder / ADAPTER)  # type: ignore[operator]
        if reference is not None:
            save_state(folder, REFERENCE, dict(checkpoint_tensors(reference)))
        save_state(folder, "optimizer", moments)
        save_state(folder, "trainer", trainer)

    return write


def checkpoint_bytes(policy: Policy) -> int:
    """About what a checkpoint takes: weights, two moments of each trained one, and the reference if there is one."""
    weights = sum(p.numel() * p.element_size() for p in policy.trained.parameters())
    trained = sum(p.numel() * p.element_size() for p in policy.trained.parameters() if p.requires_grad)
    return weights * (2 if policy.reference is not None else 1) + 2 * trained


def load_training_state(folder: Path, policy: Policy, optimizer: Optimizer, curriculum: Curriculum) -> Progress:
    """Put everything back in place; returns how far the run is.

    The policy must have been made from this folder, or with LoRA from the run's base model and this folder's adapters.
    Raises UserError if that has another tokenizer by now: the same text would be other tokens.
    """
    trainer = load_state(folder, "trainer")
    if trainer["tokenizer"] != tokenizer_hash(policy.tokenizer):
        raise UserError(
            f"model={policy.config.model!r}: its tokenizer or chat template is no longer the one this run was started "
            "with; put it back, or give another --run_dir"
        )
    optimizer.load(load_state(folder, "optimizer"))
    optimizer.updates, optimizer.skipped = trainer["updates"], trainer["skipped"]
    set_rng_state(trainer["rng"])
    curriculum.load(trainer["curriculum"])
    return Progress(**trainer["progress"])
