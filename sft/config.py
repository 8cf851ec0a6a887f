"""Every setting of an SFT run, with its unit and why its default is what it is.

Defaults are DeepSeek-V3's (arXiv 2412.19437, 5.1): two epochs, cosine from 5e-6 to 1e-6, packed samples that don't see
each other. What V3 leaves unsaid is its pre-training's: AdamW (0.9, 0.95), weight decay 0.1, clipping at 1.
"""

from dataclasses import dataclass, field
from typing import Literal

from runtime.settings import CheckpointConfig, LoraConfig, require
from sft.mix import SourceConfig, check_mix


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its schedule."""

    lr: float = 5e-6
    """Peak learning rate."""
    final_lr: float = 1e-6
    """Learning rate of the last step, on a cosine from the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's β1 and β2."""
    weight_decay: float = 0.1
    """AdamW's decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    muon: bool = False
    """Matrices between embedding and head by Muon instead: far faster on the tiny model from random weights. Not with
    sharded weights: set shard to false."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: the learning rate must be positive")
        require(0 <= self.final_lr <= self.lr, f"optim.final_lr={self.final_lr}: use 0 to optim.lr={self.lr}")
        require(self.warmup_steps >= 0, f"optim.warmup_steps={self.warmup_steps}: use 0 for none")
        require(self.max_grad_norm > 0, f"optim.max_grad_norm={self.max_grad_norm}: must be positive")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss by source, and accuracy by the project's rewards."""

    mix: tuple[SourceConfig | str, ...] = ()
    """Held-out sources, in any form the training mix takes."""
    every: int = 50
    """Steps between evaluations; 0: only before the first step and after the last."""
    rows: int = 50
    """At most this many packed rows of each source."""
    problems: str | None = None
    """Problems with answers to sample completions for and grade: a file, a `datasets` name, or "stories:heldout"."""
    samples: int = 100
    """At most this many problems, one completion each."""
    max_tokens: int = 40
    """Most new tokens of a completion."""

    def __post_init__(self) -> None:
        for name in ("rows", "samples", "max_tokens"):
            require(getattr(self, name) >= 1, f"evaluation.{name}={getattr(self, name)}: must be at least 1")
        require(self.every >= 0, f"evaluation.every={self.every}: steps, 0 for only before and after")

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The held-out mix with every path as a source."""
        return as_sources(self.mix)


@dataclass(frozen=True, kw_only=True)
class SFTConfig:
    """An SFT run: `python -m recipes.sft --help`, or `sft.train.train(SFTConfig(model=..., mix=...))`."""

    model: str = "tiny"
    """Checkpoint folder or hub name of any causal LM; "tiny": the built-in V3 with random weights."""
    mix: tuple[SourceConfig | str, ...] = ("stories",)
    """Where the examples come from: paths, or groups of path and epochs or weight."""
    chat_template: str = "model"
    """"model": its own, or plain lines where it has none. "project": ours (sft/chat.py), for DeepSeek's, which delete
    the reasoning of earlier turns. Or a file. The checkpoint keeps it."""
    epochs: int = 2
    """Passes over the mix."""
    row_length: int = 4096
    """Tokens of a packed row, and most tokens of an example."""
    context: int | None = None
    """Extend a DeepSeek-V3 to samples of so many tokens, by YaRN from the positions it was pre-trained on; unset: as
    config.json says. The checkpoint keeps it."""
    rows_per_step: int = 16
    """Rows of an optimizer step, over all processes."""
    rows_per_pass: int = 1
    """Rows of one forward and backward pass; gradients accumulate. Bounds memory, never changes the result."""
    too_long: Literal["reject", "truncate"] = "reject"
    """Examples longer than a row: "reject" sets them aside and counts them; "truncate" cuts off the answer and its end,
    and so teaches never to finish."""
    unreviewed: Literal["reject", "keep"] = "reject"
    """Rows whose column `reviewed` is false, which wait for people (python -m distill review): "reject" sets them aside
    and counts them; "keep" trains on them all the same."""
    max_bad_fraction: float = 0.1
    """Stop where more than this share of a source's examples can't be used; unreviewed ones don't count."""
    train_turns: Literal["all", "last"] = "all"
    """Of a conversation, train every assistant turn or the last one."""
    seed: int = 0
    """Decides data order, and with "tiny" the first weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16" computes forward and backward in bfloat16; weights and optimizer stay fp32."""
    fp8: bool = False
    """A DeepSeek-V3's linear layers and experts compute in FP8 in the forward pass, as in V3's own training; gradients,
    weights and the rest as `precision` says."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, a fraction of the memory."""
    compile: bool = False
    """`torch.compile` the decoder's layers; the first steps take minutes."""
    shard: bool = True
    """With several processes, spread weights, gradients and optimizer over them (FSDP2)."""
    workers: int | None = None
    """Processes that tokenise; unset: one per CPU."""
    token_cache: str | None = None
    """Folder of tokenised sources, shared by all runs; unset: in the user's cache."""
    preview: int = 0
    """Print so many examples, trained tokens marked, and exit."""
    bias_update_speed: float = 0.0
    """γ of the auxiliary-loss-free balancing: after a step the bias of overloaded experts falls by it, of others it
    rises. Pre-training: 1e-3. 0: off, as is usual after pre-training."""
    balance_loss: float = 0.0
    """α of the sequence-wise balance loss. Pre-training: 1e-4."""
    mtp_loss: float = 0.0
    """λ, the weight of the loss of a V3's MTP layer, which predicts the token after the next. Pre-training: 0.3, then
    0.1. 0: the layer stays as it is."""
    lora: LoraConfig | None = None
    """Set to train adapters only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=200))
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Trackers besides metrics.jsonl."""
    run_dir: str | None = None
    """Run folder; default runs/sft-<date>-<time>."""
    resume: bool = False
    """Go on from the newest good checkpoint in `run_dir`."""

    def __post_init__(self) -> None:
        check_mix(self.sources)
        for name in ("epochs", "rows_per_step", "rows_per_pass"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        require(self.row_length >= 2, f"row_length={self.row_length}: a row must hold a prompt token and a target")
        require(
            self.context is None or self.context >= self.row_length,
            f"context={self.context}: less than row_length={self.row_length}; a sample may be as long as a row",
        )
        require(self.bias_update_speed >= 0, f"bias_update_speed={self.bias_update_speed}: use 0 for off")
        require(self.balance_loss >= 0, f"balance_loss={self.balance_loss}: use 0 for off")
        require(self.mtp_loss >= 0, f"mtp_loss={self.mtp_loss}: use 0 for off")
        require(
            not (self.lora and self.mtp_loss), f"mtp_loss={self.mtp_loss}: no adapters in the MTP layer; set it to 0"
        )
        require(not (self.fp8 and self.compile), "fp8=True with compile: its kernels aren't compiled; turn one off")
        require(not (self.lora and self.optim.muon), "optim.muon: adapters are trained by AdamW; set it to false")
        require(
            not (self.balance_loss and self.gradient_checkpointing),
            f"balance_loss={self.balance_loss}: gradient_checkpointing runs the routers twice; turn one off",
        )

    @property
    def sources(self) -> tuple[SourceConfig, ...]:
        """The mix with every path as a source."""
        return as_sources(self.mix)


def as_sources(mix: tuple[SourceConfig | str, ...]) -> tuple[SourceConfig, ...]:
    """Paths alone as sources seen once an epoch."""
    return tuple(SourceConfig(path=source) if isinstance(source, str) else source for source in mix)
