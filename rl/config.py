"""Every setting of a GRPO run, with its unit and why its default is what it is.

Defaults are the run that `make grpo` does: the tiny model on two cores, vLLM sampling, about a minute of GRPO.
"""

from dataclasses import dataclass, field
from typing import Literal

from runtime.errors import UserError


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How groups are sampled."""

    backend: Literal["auto", "vllm", "native"] = "auto"
    """"vllm": a vLLM engine in this process. "native": our own decoder. "auto": vllm where it is installed."""
    temperature: float = 1.0
    """Softmax temperature of rollouts; log-probs and ratios are taken at the same one."""
    max_tokens: int = 40
    """Most new tokens per completion; longer ones are cut and count as truncated."""
    max_prompt_tokens: int = 1024
    """Rows with a longer prompt are set aside before the run, and counted."""
    top_p: float = 1.0
    """Must be 1: the trainer's log-probs are over the whole vocabulary; a cut distribution would bias every ratio."""
    top_k: int = 0
    """Must be 0 (off), for the same reason."""
    repetition_penalty: float = 1.0
    """Must be 1: the trainer doesn't know the penalised distribution."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """vLLM's weights and activations. "auto": bfloat16, but float32 on a CPU without AMX, as fast there and exact."""
    gap_limit: float = 0.1
    """The run stops when a rollout's mean |log π_trainer − log π_sampler| exceeds this (nats per token)."""

    def __post_init__(self) -> None:
        cuts = {"top_p": (self.top_p, 1.0), "top_k": (self.top_k, 0)}
        for name, (value, off) in (cuts | {"repetition_penalty": (self.repetition_penalty, 1.0)}).items():
            _require(
                value == off,
                f"sampling.{name}={value}: only {off} (off) can be trained on. The sampler would draw from a changed "
                "distribution whose log-probs the trainer can't reproduce, and every ratio would be biased",
            )
        _require(
            self.temperature > 0,
            f"sampling.temperature={self.temperature}: a rollout needs randomness; use e.g. 1.0",
        )
        for name in ("max_tokens", "max_prompt_tokens"):
            _require(getattr(self, name) > 0, f"sampling.{name}={getattr(self, name)}: allow at least one")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """GRPO's objective: DeepSeekMath (arXiv 2402.03300), equation 3, with a correction for the sampler's log-probs."""

    epsilon: float = 0.2
    """Clip range ε: ratios outside [1 − ε, 1 + ε] stop earning gradient. R1's is 10."""
    beta: float = 0.0
    """Weight β of the k3 KL penalty to the reference policy. 0: no reference is kept."""
    reference_every: int = 0
    """Replace the frozen reference by the current policy every this many steps; 0: never. R1-Zero's is 400."""
    scale_by_std: bool = True
    """Divide a group's centred rewards by their standard deviation."""
    importance_cap: float = 2.0
    """Truncated importance sampling: weight min(π_old / π_sampler, cap) per token. 0: no correction."""
    mask_truncated: bool = False
    """Leave completions cut at max_tokens out of the loss instead of training on them as they are."""

    def __post_init__(self) -> None:
        _require(self.epsilon > 0, f"loss.epsilon={self.epsilon}: the clip range must be positive")
        _require(self.beta >= 0, f"loss.beta={self.beta}: the KL weight can't be negative")
        _require(
            self.reference_every >= 0,
            f"loss.reference_every={self.reference_every}: steps, 0 for never",
        )
        _require(
            self.importance_cap == 0 or self.importance_cap >= 1,
            f"loss.importance_cap={self.importance_cap}: use 0 (off) or a cap of at least 1",
        )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and how a rollout is divided into updates."""

    lr: float = 1e-4
    """Peak learning rate. 1e-6 to 3e-6 for large models; LoRA about 10 times that."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's β1 and β2."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 3
    """Steps of linear warm-up; constant afterwards."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    minibatches: int = 1
    """Optimizer steps per pass over a rollout. R1: 16."""
    epochs: int = 1
    """Passes over a rollout."""
    microbatch_tokens: int = 16384
    """Tokens per packed forward and backward; gradients accumulate. Bounds memory, never changes the result."""

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"optim.lr={self.lr}: the learning rate must be positive")
        for name in ("minibatches", "epochs", "microbatch_tokens"):
            _require(getattr(self, name) >= 1, f"optim.{name}={getattr(self, name)}: must be at least 1")


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

    def __post_init__(self) -> None:
        _require(self.every >= 0, f"checkpoint.every={self.every}: steps, 0 for only the final checkpoint")
        _require(self.keep >= 1, f"checkpoint.keep={self.keep}: at least the newest checkpoint must be kept")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out accuracy during the run: sampled at the rollout's temperature, one completion per problem."""

    data: str | None = None
    """Held-out problems, in any form `data` takes. Unset: stories never trained on, when `data` is "stories"."""
    problems: int = 400
    """At most this many."""
    every: int = 5
    """Steps between evaluations on the first `quick_problems`; 0: only before the first step and after the last."""
    quick_problems: int = 100
    """Problems in the evaluations between."""


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """A GRPO run: `python -m recipes.grpo --help`, or `rl.train.train(GRPOConfig(model=..., data=...))`."""

    model: str = "tiny"
    """Checkpoint folder or hub name of any causal LM; "tiny": the built-in V3, warmed up by a short SFT."""
    data: str = "stories"
    """Problems: a JSONL or Parquet file or a `datasets` name with prompt/answer or GSM8K's columns, or "stories"."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0, "format": 0.0})
    """Reward -> weight: "accuracy", "format", or your own function's dotted name. Weight 0: measured, not paid."""
    reward_time_limit: float = 10.0
    """Seconds a reward function may take for one call before its rows become unknown."""
    steps: int = 25
    """Rollouts, each followed by its updates."""
    prompts_per_step: int = 16
    """Prompts per rollout, over all processes."""
    group_size: int = 8
    """Completions per prompt (G)."""
    seed: int = 0
    """Decides data order, samples and adapters' first values."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": forward and backward under autocast; weights and optimizer stay fp32."""
    run_dir: str | None = None
    """The run's folder. Unset: runs/grpo-<date>-<time>."""
    resume: bool = False
    """Continue the run in `run_dir` from its last good checkpoint."""
    report_to: tuple[str, ...] = ()
    """Also send metrics to any of "tensorboard", "trackio", "wandb"."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How groups are sampled."""
    loss: LossConfig = field(default_factory=LossConfig)
    """The objective."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    lora: LoraConfig | None = None
    """Adapters instead of full training: `--lora.rank 8`."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out accuracy."""

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps={self.steps}: take at least one")
        _require(
            self.group_size >= 2,
            f"group_size={self.group_size}: an advantage compares answers to one prompt, so sample at least 2",
        )
        _require(
            self.prompts_per_step >= 1,
            f"prompts_per_step={self.prompts_per_step}: take at least one prompt",
        )
        _require(
            self.prompts_per_step % self.optim.minibatches == 0,
            f"optim.minibatches={self.optim.minibatches}: must divide prompts_per_step={self.prompts_per_step}, "
            "because a group stays in one minibatch",
        )
        _require(
            any(self.rewards.values()),
            f"rewards={self.rewards}: at least one needs a weight other than 0",
        )
        _require(
            self.lora is None or self.loss.reference_every == 0,
            f"loss.reference_every={self.loss.reference_every}: under LoRA the reference is the model without its "
            "adapters, which can't be replaced; use 0",
        )
        _require(
            not self.resume or self.run_dir is not None,
            "resume=True: name the run to continue with run_dir",
        )
