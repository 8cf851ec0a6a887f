"""Every setting of a GRPO run, with its unit and why its default is what it is.

Defaults are the run that `make grpo` does: the tiny model on two cores, vLLM sampling, about a minute of GRPO.
"""

from dataclasses import dataclass, field
from typing import Literal

from rewards.compose import check_gates
from runtime.errors import UserError
from runtime.settings import CheckpointConfig, LoraConfig, require


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How groups are sampled."""

    backend: Literal["auto", "vllm", "native", "server"] = "auto"
    """"vllm": a vLLM engine in this process. "native": our own decoder. "auto": vllm where it is installed. "server":
    the servers of `server_urls`, started by `python -m sampling.serve`."""
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
    experts: Literal["ignore", "compare", "replay"] = "ignore"
    """Mixture-of-experts models. "compare": the sampler records which experts it chose, and the share of tokens for
    which the trainer would choose others is a metric. "replay": the update also uses the recorded ones (R3)."""
    speculate: bool = False
    """A DeepSeek-V3 with an MTP layer, backend "native": that layer drafts every other token. Samples keep their
    distribution and log-probs; the share of drafts accepted is a metric."""
    process: bool = False
    """Run the engine in a process of its own, which can be killed and started again when it dies or hangs."""
    time_limit: float = 1800.0
    """Seconds one call of an engine in its own process may take before it counts as hung."""
    max_restarts: int = 3
    """Times in a run that such an engine is started again, or a lost server waited for: weights reloaded and attested,
    the group sampled anew."""
    server_urls: tuple[str, ...] = ()
    """Backend "server": http(s)://host:port of each; prompts are shared out among them. Their key, if they have one, is
    in the environment: SAMPLING_API_KEY."""
    transfer: Literal["auto", "files", "nccl"] = "auto"
    """How servers get weights. "files": through `weights_dir`. "nccl": vLLM's weight transfer, between CUDA devices.
    "auto": nccl where both sides have CUDA."""
    weights_dir: str | None = None
    """Folder on a disk that trainer and servers see, of this run alone, for weights on their way. Unset: a temporary
    one, for servers of this machine."""

    def __post_init__(self) -> None:
        cuts = {"top_p": (self.top_p, 1.0), "top_k": (self.top_k, 0)}
        for name, (value, off) in (cuts | {"repetition_penalty": (self.repetition_penalty, 1.0)}).items():
            require(
                value == off,
                f"sampling.{name}={value}: only {off} (off) can be trained on. The sampler would draw from a changed "
                "distribution whose log-probs the trainer can't reproduce, and every ratio would be biased",
            )
        require(
            self.temperature > 0,
            f"sampling.temperature={self.temperature}: a rollout needs randomness; use e.g. 1.0",
        )
        for name in ("max_tokens", "max_prompt_tokens", "time_limit"):
            require(getattr(self, name) > 0, f"sampling.{name}={getattr(self, name)}: must be positive")
        require(
            not self.speculate or self.backend == "native",
            f"sampling.speculate=True: only our own sampler drafts, not sampling.backend={self.backend}; use native",
        )
        require(self.max_restarts >= 0, f"sampling.max_restarts={self.max_restarts}: use 0 for none")
        serves = self.backend == "server"
        require(
            serves == bool(self.server_urls),
            f"sampling.backend={self.backend}, sampling.server_urls={list(self.server_urls)}: the backend is server if "
            "and only if there are addresses; start servers by: python -m sampling.serve",
        )
        require(
            len(set(self.server_urls)) == len(self.server_urls),
            f"sampling.server_urls={list(self.server_urls)}: a server is named twice; name each once",
        )
        require(
            not (serves and self.process),
            "sampling.process=True: a server is a process of its own already; use false with sampling.backend=server",
        )
        require(
            not serves or self.experts == "ignore",
            f"sampling.experts={self.experts}: servers don't say which experts they chose; use ignore",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective. How far each choice is from the true gradient is measured in docs/gradients.md."""

    advantage: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    """How completions of a group are compared: by their z-score, less their mean, or less the mean of the others."""
    objective: Literal["grpo", "dapo", "dr_grpo", "gspo", "sequence", "cispo"] = "grpo"
    """"grpo": mean over completions. "dapo": mean over tokens. "dr_grpo": sum over max_tokens. "gspo": one ratio a
    completion, its tokens' geometric mean. "sequence": the literal ratio of whole answers. "cispo": clipped weights."""
    epsilon: float = 0.2
    """Clip range ε: ratios outside [1 − ε, 1 + ε] stop earning gradient. R1's is 10; for "gspo" use 3e-4."""
    epsilon_high: float | None = None
    """Upper clip range, if it is to differ (DAPO: 0.28; "gspo": 4e-4; "cispo": 4, the only one it uses)."""
    beta: float = 0.0
    """Weight β of the KL penalty to the reference policy. 0: no reference is kept."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL."""
    kl_gradient: Literal["unbiased", "direct"] = "unbiased"
    """"unbiased": the KL's own gradient where tokens count alike, whatever estimates its value. "direct": the estimator
    differentiated as DeepSeekMath and R1 do, which for k3 is the gradient of another divergence."""
    reference_every: int = 0
    """Replace the frozen reference by the current policy every this many steps (rollouts); 0: never. R1-Zero's is 25
    rollouts of 16 updates: its 400 steps."""
    importance: Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = "token_truncate"
    """Correction by π_old / π_sampler, per token or per completion: truncated at the cap, or left out above it."""
    importance_cap: float = 2.0
    """Largest weight of that correction."""
    importance_floor: float = 0.2
    """The run stops when the correction leaves less than this of a rollout, or of any tenth of it by length that
    holds 20 completions: the share of tokens below the cap, or the effective share of samples (Kish). 0: never."""
    mask_truncated: bool = False
    """Leave completions cut at max_tokens out of the loss instead of training on them as they are."""

    @property
    def clip_high(self) -> float:
        """ε of the upper clip."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def __post_init__(self) -> None:
        require(self.epsilon > 0, f"loss.epsilon={self.epsilon}: the clip range must be positive")
        require(self.clip_high > 0, f"loss.epsilon_high={self.epsilon_high}: the clip range must be positive")
        require(self.beta >= 0, f"loss.beta={self.beta}: the KL weight can't be negative")
        require(
            self.beta == 0 or self.kl != "k1" or self.kl_gradient == "unbiased",
            "loss.kl=k1 with loss.kl_gradient=direct: that gradient is not the KL's, but noise on policy, and a pull "
            "towards long answers where the loss divides by length; use unbiased",
        )
        require(
            self.reference_every >= 0,
            f"loss.reference_every={self.reference_every}: steps, 0 for never",
        )
        require(
            self.importance_cap >= 1,
            f"loss.importance_cap={self.importance_cap}: at least 1; loss.importance=none turns the correction off",
        )
        require(0 <= self.importance_floor < 1, f"loss.importance_floor={self.importance_floor}: a share below 1")


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingConfig:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): groups that teach nothing are sampled for again."""

    max_rounds: int = 0
    """Extra rollouts a step may take to replace groups of equal or unknown rewards; 0: off. What they bring is all
    recorded, and a step whose rounds run out trains on the groups it has."""

    def __post_init__(self) -> None:
        require(self.max_rounds >= 0, f"dynamic_sampling.max_rounds={self.max_rounds}: use 0 for off")


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Prompts chosen by how likely their group is to teach something: 1 − p^G − (1 − p)^G at pass rate p."""

    reward: str | None = None
    """Reward part in [0, 1] whose mean is the pass rate, say "accuracy"; unset: no curriculum."""
    column: str = "pass_rate"
    """Column of the data with a pass rate from elsewhere (the distillation ledger writes one); rows may lack it."""
    column_weight: float = 8.0
    """Completions that column's value counts for, beside those of this run."""
    floor: float = 0.1
    """Least chance of a prompt to be taken when its turn comes, so that none is given up for good."""

    def __post_init__(self) -> None:
        require(0 < self.floor <= 1, f"curriculum.floor={self.floor}: a chance in (0, 1]")
        require(self.column_weight >= 0, f"curriculum.column_weight={self.column_weight}: can't be negative")


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
    """Updates of linear warm-up; constant afterwards."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this."""
    minibatches: int = 1
    """Optimizer steps per pass over a rollout. R1: 16."""
    epochs: int = 1
    """Passes over a rollout."""
    microbatch_tokens: int = 16384
    """Tokens per packed forward and backward; gradients accumulate. Bounds memory, never changes the result."""
    share_prompts: bool = True
    """Compute a group's prompt once for all its completions. Changes the cost, never the result."""

    def __post_init__(self) -> None:
        require(self.lr > 0, f"optim.lr={self.lr}: the learning rate must be positive")
        for name in ("minibatches", "epochs", "microbatch_tokens"):
            require(getattr(self, name) >= 1, f"optim.{name}={getattr(self, name)}: must be at least 1")


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
    """Reward -> weight: "accuracy", "format", "language(language=zh)", or your own function's dotted name. Weight 0:
    measured, not paid."""
    gates: dict[str, str] = field(default_factory=dict)
    """Reward -> the reward that must be 1 for it to be paid: {"format": "accuracy"} pays for format where the answer is
    right. Metrics show every reward as it is."""
    overlong_buffer: int = 0
    """DAPO's soft overlong punishment (eq. 13): in the last so many tokens before max_tokens the reward falls in a
    line from 0 to −1, and a completion that is cut gets −1; 0: off. It is added to the reward with weight 1."""
    reward_time_limit: float = 10.0
    """Seconds a reward function may take for one call before its rows become unknown."""
    steps: int = 40
    """Rollouts, each followed by its updates."""
    prompts_per_step: int = 16
    """Prompts per rollout, over all processes."""
    group_size: int = 8
    """Completions per prompt (G)."""
    seed: int = 0
    """Decides data order, samples and adapters' first values."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """"bf16": forward and backward under autocast; weights and optimizer stay fp32."""
    fp8: Literal["off", "forward", "train"] = "off"
    """A DeepSeek-V3's linear layers in FP8, with codes made of the same weights; embedding, head, router, norms and
    attention itself never. "forward": where no gradient is wanted, in the sampler, which must be our own, and in the
    reference (LoRA's is the policy itself). "train": in the policy's forward pass too; backward passes stay in
    `precision`."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: a third slower, a fraction of the memory."""
    shard: bool = True
    """With several processes, spread weights, gradients and optimizer over them (FSDP2). false: whole in each, faster
    where there is room."""
    run_dir: str | None = None
    """The run's folder. Unset: runs/grpo-<date>-<time>."""
    resume: bool = False
    """Continue the run in `run_dir` from its last good checkpoint."""
    report_to: tuple[str, ...] = ()
    """Also send metrics to any of "tensorboard", "trackio", "wandb"."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How groups are sampled."""
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    """Replacement of groups that teach nothing."""
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    """Choice of prompts by difficulty."""
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
        require(self.steps >= 1, f"steps={self.steps}: take at least one")
        require(
            self.group_size >= 2,
            f"group_size={self.group_size}: an advantage compares answers to one prompt, so sample at least 2",
        )
        require(
            self.prompts_per_step >= 1,
            f"prompts_per_step={self.prompts_per_step}: take at least one prompt",
        )
        require(
            self.prompts_per_step % self.optim.minibatches == 0,
            f"optim.minibatches={self.optim.minibatches}: must divide prompts_per_step={self.prompts_per_step}, "
            "because a group stays in one minibatch",
        )
        require(
            0 <= self.overlong_buffer < self.sampling.max_tokens,
            f"overlong_buffer={self.overlong_buffer}: must be below sampling.max_tokens={self.sampling.max_tokens}",
        )
        require(
            any(self.rewards.values()),
            f"rewards={self.rewards}: at least one needs a weight other than 0",
        )
        try:
            check_gates(self.gates, self.rewards)
        except ValueError as error:
            raise UserError(str(error)) from error
        require(
            self.lora is None or self.loss.reference_every == 0,
            f"loss.reference_every={self.loss.reference_every}: under LoRA the reference is the model without its "
            "adapters, which can't be replaced; use 0",
        )
        require(
            self.fp8 == "off" or self.sampling.backend == "native",
            f"fp8={self.fp8}: only our own sampler computes so, not sampling.backend={self.sampling.backend}; "
            "use native",
        )
        require(
            not self.resume or self.run_dir is not None,
            "resume=True: name the run to continue with run_dir",
        )
