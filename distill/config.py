"""Every setting of a distillation run, with its unit and why its default is what it is.

The defaults are the tiny run: stories answered by the built-in V3. DeepSeek-V3 answers each domain's problems by an
expert of its own, and takes two samples of each: <problem, original response> and <system prompt, problem, R1 response>
(arXiv 2412.19437, 5.1); R1's data keeps several right and readable answers of a problem (arXiv 2501.12948, B.3).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from distill.choose import Policy
from distill.problems import ProblemsConfig
from distill.readability import ReadabilityConfig
from distill.types import Kind
from rewards.model_based.backends import Endpoint
from runtime.settings import require

SYSTEM = (
    "Reason before you answer. Write your reasoning between <think> and </think>, step by step. Doubt each step: check "
    "it against the question, try the result in another way, and when something does not fit, say so, go back and take "
    "another path. After </think> give the answer alone, complete and without the detours; if it is a single result, "
    "put it in \\boxed{}."
)
"""Asks for reflection and verification."""

FREE = ("run_dir", "resume", "retry_unknown", "workers", "rows_per_shard", "ray")
FREE_OF_EXPERTS = ("endpoint", "key_env", "concurrency", "timeout", "retries", "time_limit")
"""What a resumed run may change: who is asked and how patiently, not what."""


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """Who answers a domain's problems, how, and who grades the answers."""

    domain: str | None = None
    """The problems it answers; unset: all that no other expert does."""
    model: str = "tiny"
    """Checkpoint folder or hub name; "tiny": the built-in V3 after its warm-up. With `endpoint`: its name there."""
    backend: Literal["auto", "vllm", "native"] = "auto"
    """Sampler in this process; "auto" is vLLM where it is installed."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What vLLM computes in; the native sampler does in bfloat16 if that is asked for, else float32."""
    fp8: bool = False
    """A DeepSeek-V3 in the native sampler: its linear layers and experts compute in FP8."""
    endpoint: str | None = None
    """Base URL of an OpenAI-compatible server instead, such as http://127.0.0.1:8000/v1. HTTPS, unless it is this
    machine."""
    key_env: str | None = None
    """Environment variable that holds its key, which is never stored."""
    concurrency: int = 16
    """Requests under way at once."""
    timeout: float = 600.0
    """Seconds for one attempt."""
    retries: int = 3
    """More attempts after a fault that may pass; then the answer is unknown, with the reason."""
    system: str = SYSTEM
    """System prompt of the reasoning answers; "": none."""
    reasoning: bool = True
    """Sample answers with the system prompt: V3's second kind."""
    original: Literal["source", "sample", "none"] = "source"
    """V3's first kind, answers without the system prompt. "source": what came with the problem, where something did;
    "sample": sampled, too."""
    samples: int = 4
    """Answers to sample for each problem, of each kind that is sampled."""
    temperature: float = 1.0
    """Softmax temperature. R1-Zero's cold-start data: 1.0."""
    max_tokens: int = 2048
    """Most tokens of an answer; one that doesn't end in them is cut off and never kept."""
    max_prompt_tokens: int = 1024
    """Longest prompt, with the system prompt; a longer one's answers are unknown. An endpoint knows its own limit."""
    grader: str = "math"
    """"math" (the gold in `answer`), "code" (the column `tests`), "none" (people read the answers), or a reward
    function's name, whose answer is right at 1 or more, wrong below and unknown at None."""
    time_limit: float = 60.0
    """Seconds for a reward function's call."""
    review: bool = False
    """Rows wait for people: they are written as not reviewed until somebody accepts them."""

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "max_prompt_tokens", "concurrency"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        require(self.temperature >= 0, f"temperature={self.temperature}: use 0 (greedy) or a positive number")
        require(self.time_limit > 0, f"time_limit={self.time_limit}: give a positive number of seconds")
        require(bool(self.grader), 'grader: give "math", "code", "none" or a reward function\'s name')
        require(
            not self.fp8 or (self.backend == "native" and self.endpoint is None),
            f"fp8=True: only our own sampler computes so, not {self.endpoint or self.backend}; set backend to native",
        )
        require(self.reasoning or self.original != "none", "reasoning=False, original='none': nothing is asked for")
        if self.endpoint is not None:
            self.client()  # its own checks

    @property
    def name(self) -> str:
        """For people."""
        return self.domain or "others"

    def client(self) -> Endpoint:
        """How its server is asked."""
        assert self.endpoint is not None
        return Endpoint(
            url=self.endpoint,
            model=self.model,
            key_env=self.key_env,
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            guided="off",
            concurrency=1,  # of one call, which asks one thing
            timeout=self.timeout,
            retries=self.retries,
            time_limit=(self.retries + 1) * (self.timeout + 60),
        )

    def wanted(self, *, answered: bool) -> Iterator[tuple[Kind, int]]:
        """Kind and index of every answer a problem is to have. answered: whether it came with one."""
        originals = {"source": int(answered), "sample": self.samples, "none": 0}[self.original]
        yield from (("original", index) for index in range(originals))
        yield from (("reasoning", index) for index in range(self.samples if self.reasoning else 0))


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Teachers and graders in processes of a Ray cluster. The run folder stays with the process that was started."""

    workers: int = 2
    """Teachers, each with the expert's model, and as many graders."""
    gpus: float = 0.0
    """GPUs of a teacher."""
    address: str | None = None
    """Of a running cluster, or "auto"; unset: one of its own on this machine."""
    max_restarts: int = 3
    """Times a process that was lost is started again and given its work anew."""

    def __post_init__(self) -> None:
        require(self.workers >= 1, f"ray.workers={self.workers}: must be at least 1")
        for name in ("gpus", "max_restarts"):
            require(getattr(self, name) >= 0, f"ray.{name}={getattr(self, name)}: can't be negative")


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """A distillation run: `python -m recipes.distill --help`, or `distill.generate.generate(DistillConfig(...))`."""

    problems: tuple[ProblemsConfig | str, ...] = (
        ProblemsConfig(path="stories", domain="math", response="direct", max_rows=256),
    )
    """Where the problems come from: paths, or groups of path, domain, response and max_rows."""
    experts: tuple[ExpertConfig, ...] = (ExpertConfig(domain="math", system="", max_tokens=40),)
    """Who answers which domain."""
    near_duplicates: float | None = 0.8
    """Jaccard similarity from which a problem repeats an earlier one and is set aside; null: only the same words do."""
    benchmarks: tuple[str, ...] = ()
    """Files or `datasets` names whose problems must not be trained on."""
    ngram: int = 10
    """Words in a row that a problem may not share with one of them. R1: 10."""
    readability: ReadabilityConfig = field(default_factory=ReadabilityConfig)
    policy: Policy = "first"
    """Which of a problem's right and readable answers are kept: "first" is an unbiased draw, "shortest", "diverse", or
    "best" by `scorer`."""
    keep: int = 1
    """At most so many answers of a problem and kind."""
    scorer: str | None = None
    """Reward function for "best", say rewards.model_based.scalar:reward(source=CHECKPOINT)."""
    batch: int = 64
    """Problems asked together; graded while the next are asked."""
    seed: int = 0
    """Decides the samples."""
    workers: int = 2
    """Processes that grade maths and code."""
    ray: RayConfig | None = None
    """Set to spread the work over many machines, or over processes of this one."""
    rows_per_shard: int = 50_000
    """Most rows of a Parquet file."""
    run_dir: str | None = None
    """Run folder; default runs/distill-<date>-<time>."""
    resume: bool = False
    """Go on with what the ledger in `run_dir` lacks."""
    retry_unknown: bool = False
    """When resuming, ask again where a teacher gave no answer, and grade again what no grader could."""

    def __post_init__(self) -> None:
        for name in ("keep", "batch", "workers", "rows_per_shard", "ngram"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}: must be at least 1")
        require(bool(self.problems), "problems: name a source at least")
        names = [expert.name for expert in self.experts]
        require(len(names) == len(set(names)) > 0, f"experts: one for each domain, not {', '.join(names) or 'none'}")
        likeness = self.near_duplicates
        require(likeness is None or 0 < likeness <= 1, f"near_duplicates={likeness}: give a likeness, above 0 to 1")
        require(
            (self.policy == "best") == (self.scorer is not None),
            f"policy={self.policy!r}, scorer={self.scorer!r}: a scorer is for policy=best, which needs one",
        )

    @property
    def sources(self) -> tuple[ProblemsConfig, ...]:
        """The sources with every path as a group."""
        return tuple(ProblemsConfig(path=s) if isinstance(s, str) else s for s in self.problems)

    def expert(self, domain: str) -> ExpertConfig | None:
        """Who answers a domain."""
        by_domain = {expert.domain: expert for expert in self.experts}
        return by_domain.get(domain, by_domain.get(None))

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first start, by dotted name."""
        settings = {name: value for name, value in asdict(self).items() if name not in FREE}
        del settings["experts"]
        for expert in self.experts:
            for name, value in asdict(expert).items():
                if name not in FREE_OF_EXPERTS:
                    settings[f"experts.{expert.name}.{name}"] = value
        return settings
