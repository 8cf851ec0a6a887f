"""A run in progress -> files in a checkpoint folder, and back, bit for bit.

Data order is a function of the seed and the step, so besides weights and optimizer there is little to keep. Everything
is saved whole, so that a run may go on with another number of processes.
"""

from collections.abc import Callable
from pathlib import Path

from runtime.adapters import ADAPTER
from runtime.errors import UserError
from runtime.models import tokenizer_hash
from runtime.state import load_state, rng_state, save_state, set_rng_state
from runtime.weights import save_pretrained
from sft.optimizer import Optimizer
from sft.trainee import Trainee


def save_training_state(trainee: Trainee, optimizer: Optimizer, *, step: int, best: float) -> Callable[[Path], None]:
    """Gather what `load_training_state` needs, in all processes; returns what writes it, for the first one.

    With full training the folder also loads as a checkpoint.
    """
    model, moments = trainee.whole(), optimizer.state()
    trainer = {"step": step, "best": best, "skipped": optimizer.skipped, "rng": rng_state()}
    trainer |= {"tokenizer": tokenizer_hash(trainee.tokenizer)}

    def write(folder: Path) -> None:
        assert model is not None
        if trainee.config.lora is None:
            save_pretrained(folder, model, trainee.tokenizer)
        else:
            model.save_pretrained(folder / ADAPTER)  # type: ignore[operator]
        save_state(folder, "optimizer", moments)
        save_state(folder, "trainer", trainer)

    return write


def checkpoint_bytes(trainee: Trainee) -> int:
    """About what a checkpoint takes: weights, and two moments of each trained one."""
    weights = sum(p.numel() * p.element_size() for p in trainee.parameters())
    return weights + 2 * sum(p.numel() * p.element_size() for p in trainee.trained)


def load_training_state(folder: Path, trainee: Trainee, optimizer: Optimizer) -> tuple[int, float]:
    """Put everything back in place; returns the steps done and the lowest held-out loss.

    The trainee must have been loaded from this folder, with LoRA its adapters from there and the rest from the run's
    base model. Raises UserError if that has another tokenizer by now: the same text would be other tokens.
    """
    trainer = load_state(folder, "trainer")
    if trainer["tokenizer"] != tokenizer_hash(trainee.tokenizer):
        raise UserError(
            f"model={trainee.config.model!r}: its tokenizer or chat template is no longer the one this run was started "
            "with; put it back, or give another --run_dir"
        )
    optimizer.load(load_state(folder, "optimizer"))
    optimizer.skipped = trainer["skipped"]
    set_rng_state(trainer["rng"])
    return trainer["step"], trainer["best"]
