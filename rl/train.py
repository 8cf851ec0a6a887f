"""GRPO: prompts -> rollout -> score -> advantage -> update -> sync, step after step (arXiv 2402.03300, algorithm 1).

`train(config)` builds the parts and calls the loop; the loop is `Run.step`. What each word in it means is in the
file of that name. Left out: asynchronous rollouts, and engines on other machines.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.config import GRPOConfig
from rl.evaluate import Evaluation, evaluate
from rl.policy import Policy
from rl.prompts import PromptSource, make_source
from rl.record import evaluation_metrics, rollout_metrics, write_rollout
from rl.resume import load_training_state, save_training_state
from rl.rollout import rollout, score, set_advantages, stop_token_ids
from rl.score import Scorer
from rl.update import Optimizer, update
from runtime.checkpoint import latest_checkpoint, prune_checkpoints, save_checkpoint
from runtime.distributed import World
from runtime.errors import UserError
from runtime.interrupt import Interrupt
from runtime.metrics import MetricsLog
from runtime.models import load_causal_lm
from runtime.progress import StepTracker, track_steps
from runtime.report import write_report
from runtime.rows import load_rows
from runtime.run_folder import RunFolder, open_run
from runtime.weights import checkpoint_tensors
from sampling.attest import SyncReport, make_canary, sync
from sampling.backend import CANARY_TOKENS, make_sampler
from sampling.protocol import Sampler, SamplingParams

log = logging.getLogger(__name__)

RewardFunctions = Mapping[str | Callable[..., Any], float]

EVALUATION_SEED = 0x5EED
"""Held-out samples use their own seed, the same at every evaluation: what changes is the policy."""

MAY_CHANGE_ON_RESUME = ("steps", "report_to", "checkpoint", "evaluation", "reward_time_limit")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    run_dir: Path
    before: Evaluation | None
    """Held-out evaluation of the policy as loaded; None without held-out data, or on a resumed run."""
    after: Evaluation | None
    steps: int
    """Steps done, in all attempts."""
    exit_code: int
    """0, or 128 + signal when the run was told to leave and did so after saving."""


def train(
    config: GRPOConfig,
    *,
    rewards: RewardFunctions | None = None,
    named_models: Mapping[str, Callable[[], Path]] | None = None,
) -> Result:
    """Run GRPO to the end, or to the checkpoint a signal asks for.

    rewards: callables (or names) with their weights, instead of `config.rewards`; for notebooks.
    named_models: makers of checkpoints that `config.model` may name, say {"tiny": recipes.tiny.tiny_checkpoint}. Called
        once the run folder is ours, and not at all when a checkpoint in it is resumed.
    Raises UserError for settings, data or folders that can't be used.
    """
    world = World(precision=config.precision)
    shares = world.size * config.optim.minibatches
    if config.prompts_per_step % shares:
        raise UserError(
            f"prompts_per_step={config.prompts_per_step}: not divisible by {world.size} processes × "
            f"optim.minibatches={config.optim.minibatches}; every process needs as many groups in every minibatch"
        )
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_open_run(config, world))
        paid: Mapping[Any, float] = config.rewards if rewards is None else rewards
        scorer = stack.enter_context(Scorer(paid, time_limit=config.reward_time_limit))
        examiner = stack.enter_context(Scorer({"accuracy": 1.0, "format": 0.0}))
        checkpoint = latest_checkpoint(folder.checkpoints_dir) if folder.resumed else None
        model = _model_path(config, world, checkpoint, named_models or {})
        # Only from here on is there something to save; before, a signal just ends the process.
        interrupt = stack.enter_context(Interrupt())
        run = Run(config, world, folder, scorer, examiner, interrupt, model=model, checkpoint=checkpoint)
        stack.callback(run.close)
        return run.train()


class Run:
    """A GRPO run and everything it holds."""

    def __init__(
        self,
        config: GRPOConfig,
        world: World,
        folder: RunFolder,
        scorer: Scorer,
        examiner: Scorer,
        interrupt: Interrupt,
        *,
        model: Path | str,
        checkpoint: Path | None,
    ) -> None:
        """model: what to load. checkpoint: what to resume from, if anything."""
        self.config, self.world, self.folder, self.interrupt = config, world, folder, interrupt
        self.scorer, self.examiner = scorer, examiner
        self.policy = Policy(config, world, model)
        self.prompts = self._source(config.data, seed=config.seed)
        self.held_out = self._held_out()
        self.optimizer = Optimizer(self.policy.model, config)
        self.done = 0
        """Steps done; also the version of the weights."""
        if checkpoint is not None:
            self.done = load_training_state(checkpoint, self.policy, self.optimizer)
            log.info("resuming from %s", checkpoint)
        self.sampler: Sampler = make_sampler(
            # Samplers know no adapters: they are sent merged weights.
            self.policy.causal_lm if config.lora is None else load_causal_lm(model),
            backend=config.sampling.backend,
            dtype=config.sampling.dtype,
            max_model_len=config.sampling.max_prompt_tokens + config.sampling.max_tokens,
            seed=config.seed,
            processes=world.size,
        )
        self.synced: SyncReport | None = None
        self.canary = make_canary(
            self.policy.causal_lm.config.vocab_size,
            text=[i for prompt in self.prompts.first(16) for i in prompt.ids],
            dtype="bfloat16" if config.precision == "bf16" else self.sampler.dtype,
            length=CANARY_TOKENS,
        )
        self.params = SamplingParams(
            n=config.group_size,
            max_tokens=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            stop_token_ids=stop_token_ids(self.policy.tokenizer, self.policy.causal_lm),
        )
        self.metrics = self._metrics_log() if world.is_main else None

    def train(self) -> Result:
        """The run: evaluate, step after step, evaluate, save."""
        before = after = None
        self.sync()
        if self.done == 0:
            before = self.evaluate(self.config.evaluation.problems)
            self.record(0, {} if before is None else evaluation_metrics(before))
        with self._tracker() as tracker:
            while self.done < self.config.steps and not self.interrupt.requested:
                metrics = self.step(tracker)
                if metrics is None:
                    break
                metrics |= self._quick_evaluation(tracker)
                self.record(self.done, metrics)
                if self.world.is_main:
                    tracker.update(self.done, metrics)
                every = self.config.checkpoint.every
                if every and self.done % every == 0 and self.done < self.config.steps:
                    self.save()
        self.save()  # also at the end: with more --steps, --resume goes on from here
        if not self.interrupt.requested:
            after = self.evaluate(self.config.evaluation.problems)
            self.record(self.done, {} if after is None else evaluation_metrics(after), last=True)
            self.save_final()
        if self.world.is_main:
            write_report(self.folder.path)
        return Result(
            run_dir=self.folder.path,
            before=before,
            after=after,
            steps=self.done,
            exit_code=self.interrupt.exit_code,
        )

    def step(self, tracker: StepTracker) -> dict[str, float] | None:
        """One iteration of algorithm 1. None, with nothing changed, if a signal came before the update."""
        began = time.perf_counter()
        config = self.config
        prompts = self.prompts.step(self.done, config.prompts_per_step)[self.world.rank :: self.world.size]

        with tracker.phase("sampling") as sampling:
            groups = rollout(self.sampler, prompts, self.params, self.policy.tokenizer)
        if self.interrupt.requested:
            return None
        with tracker.phase("scoring") as scoring:
            scores = score(groups, self.scorer, step=self.done)
            set_advantages(groups, scale_by_std=config.loss.scale_by_std)
        for unknown in scores.unknown[:3]:
            tracker.log(f"reward unknown: {unknown.reward}, completion {unknown.row}: {unknown.reason}")
        write_rollout(self.folder.rollouts_dir, groups, step=self.done + 1, world=self.world)
        if self.interrupt.requested:
            return None
        with tracker.phase("updating") as updating:
            metrics = update(self.policy, groups, self.optimizer)
        self.done += 1
        every = config.loss.reference_every
        if config.loss.beta > 0 and every and self.done % every == 0:
            self.policy.replace_reference()
        with tracker.phase("syncing") as syncing:
            report = self.sync()

        metrics |= rollout_metrics(groups, self.world) | scores.metrics
        metrics |= {
            "weights/version": float(report.version),
            "weights/canary_mean": report.canary_mean,
            "weights/canary_max": report.canary_max,
            "time/rollout": sampling.seconds,
            "time/reward": scoring.seconds,
            "time/update": updating.seconds,
            "time/sync": syncing.seconds,
            "step_time": time.perf_counter() - began,
        }
        generated = metrics["completions/mean_length"] * config.prompts_per_step * config.group_size
        metrics["tokens_per_second"] = generated / max(sampling.seconds, 1e-9)
        return metrics

    def sync(self) -> SyncReport:
        """Hand the policy's weights to the sampler and have it prove that it holds them (design: attested weights)."""
        self.synced = sync(
            self.sampler,
            lambda: checkpoint_tensors(self.policy.model),
            version=self.done,
            canary=self.canary,
            score_trainer=self.policy.score,
            previous=self.synced,
        )
        return self.synced

    def evaluate(self, problems: int) -> Evaluation | None:
        """Sampled accuracy on the first held-out problems, one completion each; every process does the same."""
        if self.held_out is None:
            return None
        return evaluate(
            self.sampler,
            self.held_out.first(problems),
            dataclasses.replace(self.params, n=1),
            self.policy.tokenizer,
            self.examiner,
        )

    def record(self, step: int, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Append to metrics.jsonl and the trackers. The closing evaluation is a line of its own."""
        if self.metrics is not None and metrics:
            self.metrics.log(step, {**metrics, "final": True} if last else metrics)

    def save(self) -> None:
        """A checkpoint to resume from."""
        if self.world.is_main:
            save_checkpoint(
                self.folder.checkpoints_dir,
                f"step-{self.done:06d}",
                lambda path: save_training_state(path, self.policy, self.optimizer, step=self.done),
                info={"step": self.done, "updates": self.optimizer.updates},
            )
            prune_checkpoints(self.folder.checkpoints_dir, self.config.checkpoint.keep)
        self.world.wait()

    def save_final(self) -> None:
        """checkpoints/final: what transformers and vLLM load as it is."""
        if self.world.is_main:
            save_checkpoint(
                self.folder.checkpoints_dir,
                "final",
                self.policy.save_pretrained,
                info={"step": self.done, "updates": self.optimizer.updates},
            )
        self.world.wait()

    def close(self) -> None:
        """Free the sampler and the log."""
        self.sampler.close()
        if self.metrics is not None:
            self.metrics.close()

    def _metrics_log(self) -> MetricsLog:
        metrics = MetricsLog(
            self.folder.metrics_path,
            self.config.report_to,
            run_name=self.folder.path.name,
            run_dir=self.folder.path,
            config=dataclasses.asdict(self.config),
        )
        if self.folder.resumed:
            metrics.truncate_after(self.done if self.done else -1)
            for path in self.folder.rollouts_dir.glob("step-*.parquet"):
                if int(path.stem.removeprefix("step-")) > self.done:
                    path.unlink()
        return metrics

    def _quick_evaluation(self, tracker: StepTracker) -> dict[str, float]:
        every = self.config.evaluation.every
        if not every or self.done % every or self.done == self.config.steps:
            return {}
        with tracker.phase("evaluating"):
            evaluation = self.evaluate(self.config.evaluation.quick_problems)
        return {} if evaluation is None else evaluation_metrics(evaluation)

    def _source(self, data: str, *, seed: int) -> PromptSource:
        rows = load_rows(data)
        source = make_source(
            rows,
            self.policy.tokenizer,
            seed=seed,
            max_prompt_tokens=self.config.sampling.max_prompt_tokens,
        )
        if self.world.is_main and (rows.rejects or source.too_long):
            log.warning("%s; %d prompts too long", rows.summary(), source.too_long)
        return source

    def _held_out(self) -> PromptSource | None:
        data = self.config.evaluation.data or ("stories:heldout" if self.config.data == "stories" else None)
        return None if data is None else self._source(data, seed=EVALUATION_SEED)

    @contextlib.contextmanager
    def _tracker(self) -> Iterator[StepTracker]:
        title = f"GRPO {self.folder.path.name}"
        with track_steps(self.config.steps, title, start=self.done, console=_console(self.world.is_main)) as tracker:
            yield tracker


def _open_run(config: GRPOConfig, world: World) -> RunFolder | contextlib.AbstractContextManager[Any]:
    """The main process holds the run folder's lock; the others use the folder it made."""
    name = time.strftime("grpo-%Y%m%d-%H%M%S")
    run_dir = Path(config.run_dir or Path("runs") / world.gather([name])[0])
    if world.is_main:
        folder: Any = open_run(
            run_dir,
            config=dataclasses.asdict(config),
            resume=config.resume,
            may_change=MAY_CHANGE_ON_RESUME,
        )
        resumed = folder.resumed
    else:
        resumed = None
    resumed = world.gather([resumed])[0]
    return folder if world.is_main else contextlib.nullcontext(RunFolder(run_dir, None, resumed=resumed))


def _model_path(
    config: GRPOConfig, world: World, checkpoint: Path | None, named_models: Mapping[str, Callable[[], Path]]
) -> Path | str:
    """Where the policy's weights are: in the checkpoint being resumed (under LoRA it has adapters only), a named
    model, made by the main process alone, or the path itself."""
    if checkpoint is not None and config.lora is None:
        return checkpoint
    if config.model not in named_models:
        return config.model
    made = [str(named_models[config.model]())] if world.is_main else []
    return world.gather(made)[0]


def _console(is_main: bool) -> Any:
    from rich.console import Console

    return Console(stderr=True) if is_main else Console(quiet=True, stderr=True)
