"""Settings that every training command has, and how a wrong one is refused."""

from dataclasses import dataclass
from typing import Literal

from runtime.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise UserError with the message, which names the setting, its value and what to do, unless it holds."""
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train low-rank adapters (arXiv 2106.09685) instead of all weights."""

    rank: int = 8
    """Rank r of each adapter."""
    alpha: float = 16.0
    """Scale: adapters are added times alpha / rank."""
    target_modules: tuple[str, ...] | Literal["attention"] = "attention"
    """Module names to adapt; "attention": every attention projection of the model."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save."""

    every: int = 25
    """Steps between checkpoints; 0: only the final one (and on SIGTERM)."""
    keep: int = 2
    """How many to keep, besides the final one."""
    watchdog: float = 900.0
    """Seconds without progress after which the log names the phase that hangs, and all stacks go to the run folder;
    0: off."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every={self.every}: steps, 0 for only the final checkpoint")
        require(self.keep >= 1, f"checkpoint.keep={self.keep}: at least the newest checkpoint must be kept")
