"""GRPO: prompts -> rollout -> score -> advantage -> update -> sync, step after step (arXiv 2402.03300, algorithm 1).

`train(config)` builds the parts and calls the loop; the loop is `Run.step`. What each word in it means is in the
file of that name. A step's rollout is on disk before it is trained on, so a run that is killed takes it from there.
Left out: asynchronous rollouts.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl.config import GRPOConfig
from rl.curriculum import Curriculum
from rl.engine import Engine
from rl.evaluate import Evaluation, evaluate
from rl.policy import Policy
from rl.prompts import PromptSource, make_source
from rl.record import (
    acceptance,
    evaluation_metrics,
    read_rollout,
    rollout_metrics,
    write_rollout,
    write_trainer_logprobs,
)
from rl.resume import Progress, checkpoint_bytes, load_training_state, save_training_state
from rl.rollout import punish_overlong, score, set_advantages, teaches
from rl.score import Scorer
from rl.types import Group, Rollout
from rl.update import Optimizer, update
from runtime.checkpoint import latest_checkpoint, prune_checkpoints, save_checkpoint
from runtime.distributed import World
from runtime.errors import UserError
from runtime.failpoints import failpoint
from runtime.files import write_durably
from runtime.interrupt import Interrupt
from runtime.metrics import MetricsLog
from runtime.progress import StepTracker, track_steps
from runtime.report import write_report
from runtime.rows import load_rows
from runtime.run_folder import RunFolder, check_space, open_run_together
from runtime.watchdog import Watchdog
from runtime.weights import save_pretrained
from sampling.attest import SyncReport

log = logging.getLogger(__name__)

RewardFunctions = Mapping[str | Callable[..., Any], float]

EVALUATION_SEED = 0x5EED
"""Held-out samples use their own seed, the same at every evaluation: what changes is the policy."""

MAY_CHANGE_ON_RESUME = (
    *("steps", "report_to", "checkpoint", "evaluation", "reward_time_limit"),
    *("gradient_checkpointing", "shard"),
    *("sampling.process", "sampling.time_limit", "sampling.max_restarts"),
    *("sampling.server_urls", "sampling.transfer", "sampling.weights_dir"),
)


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


Timer = defaultdict[str, float]
"""Seconds by phase; 0 for one that didn't run."""


def train(
    config: GRPOConfig,
    *,
    rewards: RewardFunctions | None = None,
    named_models: Mapping[str, Callable[[], Path]] | None = None,
) -> Result:
    """Run GRPO to the end, or to the checkpoint a signal asks for.

    rewards: callables (or names) with their weights, instead of `config.rewards`; for notebooks. Gates, if any, name
        rewards of both.
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
        settings = dataclasses.asdict(config)
        opening = open_run_together(
            world, "grpo", config.run_dir, config=settings, resume=config.resume, may_change=MAY_CHANGE_ON_RESUME
        )
        folder = stack.enter_context(opening)
        paid: Mapping[Any, float] = config.rewards if rewards is None else rewards
        scorer = stack.enter_context(_scorer(paid, config))
        examiner = stack.enter_context(Scorer({"accuracy": 1.0, "format": 0.0}))
        found = [latest_checkpoint(folder.checkpoints_dir) if folder.resumed else None] if world.is_main else []
        checkpoint = world.gather(found)[0]
        model = _model_path(config, world, checkpoint, named_models or {})
        # Only from here on is there something to save; before, a signal just ends the process.
        interrupt = stack.enter_context(Interrupt())
        limit = config.checkpoint.watchdog if world.is_main else 0
        watchdog = stack.enter_context(Watchdog(folder.path, limit))
        run = Run(config, world, folder, scorer, examiner, interrupt, watchdog, model=model, checkpoint=checkpoint)
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
        watchdog: Watchdog,
        *,
        model: Path | str,
        checkpoint: Path | None,
    ) -> None:
        """model: what to load. checkpoint: what to resume from, if anything."""
        self.config, self.world, self.folder = config, world, folder
        self.scorer, self.examiner, self.interrupt, self.watchdog = scorer, examiner, interrupt, watchdog
        self.policy = Policy(config, world, model, checkpoint=checkpoint)
        self.prompts = self._source(config.data, seed=config.seed)
        self.held_out = self._held_out()
        self.optimizer = Optimizer(self.policy)
        self.curriculum = Curriculum(config.curriculum, group_size=config.group_size)
        self.progress = Progress()
        if checkpoint is not None:
            self.progress = load_training_state(checkpoint, self.policy, self.optimizer, self.curriculum)
            log.info("resuming from %s", checkpoint)
        elif world.is_main:
            check_space(folder.path, (config.checkpoint.keep + 2) * checkpoint_bytes(self.policy))
        self.saved = -1 if checkpoint is None else self.done
        text = [i for prompt in self.prompts.first(16) for i in prompt.ids]
        self.engine = Engine(config, world, self.policy, model=model, text=text, leaving=lambda: interrupt.requested)
        self.metrics = self._metrics_log() if world.is_main else None

    @property
    def done(self) -> int:
        """Steps done; also the version of the weights."""
        return self.progress.step

    def train(self) -> Result:
        """The run: evaluate, step after step, evaluate, save."""
        before = after = None
        with self._tracker() as tracker:
            if self.sync(tracker) is not None and self.done == 0:
                before = self.evaluate(self.config.evaluation.problems, tracker)
                self.record(0, {} if before is None else evaluation_metrics(before))
            while self.done < self.config.steps and not self.told_to_leave():
                metrics = self.step(tracker)
                if metrics is None:
                    break
                metrics |= self._quick_evaluation(tracker)
                self.record(self.done, metrics)
                failpoint("step/recorded")
                if self.world.is_main:
                    tracker.update(self.done, metrics)
                every = self.config.checkpoint.every
                if every and self.done % every == 0:
                    self.save(tracker)
            if self.saved != self.done:
                self.save(tracker)  # also at the end: with more --steps, --resume goes on from here
            if not self.told_to_leave():
                after = self.evaluate(self.config.evaluation.problems, tracker)
                self.record(self.done, {} if after is None else evaluation_metrics(after), last=True)
                self.save_final(tracker)
        if self.world.is_main:
            write_report(self.folder.path, defaults=GRPOConfig())
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
        config, timer = self.config, Timer(float)
        rollout = read_rollout(self.folder.rollouts_dir, step=self.done + 1, world=self.world)
        if replayed := rollout is not None:
            tracker.log(f"step {self.done + 1}: its rollout is on disk, nothing is sampled anew")
        else:
            rollout = self.rollout(tracker, timer)
        if rollout is None or self.told_to_leave():
            return None

        with self.phase(tracker, "updating", "trainer", timer):
            keep = functools.partial(self._keep_logprobs, rollout.groups)
            metrics = update(self.policy, rollout.groups, self.optimizer, on_skip=self._dump_skipped, on_old=keep)
        self.curriculum.observe([*rollout.groups, *rollout.spare], self.world)
        self.progress = Progress(step=self.done + 1, cursor=rollout.cursor)
        every = config.loss.reference_every
        if config.loss.beta > 0 and every and self.done % every == 0:
            self.policy.replace_reference()
        failpoint("step/updated")
        report = self.sync(tracker, timer)
        failpoint("step/synced")

        metrics |= rollout_metrics([*rollout.groups, *rollout.spare], self.world) | rollout.metrics
        if report is not None:
            metrics |= {
                "weights/version": float(report.version),
                "weights/canary_mean": report.canary_mean,
                "weights/canary_max": report.canary_max,
            }
        metrics |= {
            "time/rollout": timer["sampling"],
            "time/reward": timer["scoring"],
            "time/update": timer["updating"],
            "time/sync": timer["syncing"],
            "step_time": time.perf_counter() - began,
        }
        if not replayed:
            generated = self.world.sum(torch.tensor(_tokens([*rollout.groups, *rollout.spare])))
            metrics["tokens_per_second"] = float(generated) / max(timer["sampling"], 1e-9)
        return metrics

    def rollout(self, tracker: StepTracker, timer: Timer) -> Rollout | None:
        """Sample and score groups for the next step, those that teach nothing again if `dynamic_sampling` says so, and
        put them on disk. None if a signal came."""
        config, cursor = self.config, self.progress.cursor
        wanted = config.prompts_per_step // self.world.size
        groups: list[Group] = []
        drawn = 0
        logged: dict[str, float] = {}
        for attempt in range(1 + config.dynamic_sampling.max_rounds):
            missing = self.world.gather([wanted - sum(map(teaches, groups)) if attempt else wanted])
            if not any(missing):
                break
            prompts, cursor = self.prompts.draw(cursor, sum(missing), self.curriculum)
            drawn += len(prompts)
            own = [prompt for prompt, rank in zip(prompts, deal(missing), strict=True) if rank == self.world.rank]
            with self.phase(tracker, "sampling", self.engine.name, timer):
                new = self.engine.rollout(own)
            failpoint("step/sampled")
            if new is None or self.told_to_leave():
                return None
            with self.phase(tracker, "scoring", "reward workers", timer):
                logged |= self.score(new, tracker) if new else {}
            groups += new
            failpoint("step/scored")
        # Of those that teach nothing, as many as are needed to fill the step.
        order = sorted(groups, key=lambda group: not teaches(group)) if len(groups) > wanted else groups
        rollout = Rollout(groups=order[:wanted], spare=order[wanted:], cursor=cursor, metrics=logged)
        if config.dynamic_sampling.max_rounds:
            rollout.metrics.update(self._accounts(rollout, drawn))
        if config.sampling.speculate:
            rollout.metrics["sampling/acceptance"] = acceptance(groups, self.world)
        if self.engine.restarts:
            rollout.metrics["sampling/restarts"] = float(self.engine.restarts)
        write_rollout(self.folder.rollouts_dir, rollout, step=self.done + 1, world=self.world)
        failpoint("step/rollout-written")
        return rollout

    def score(self, groups: Sequence[Group], tracker: StepTracker) -> dict[str, float]:
        """Rewards and advantages, in place; returns what reward functions logged."""
        config = self.config
        scores = score(groups, self.scorer, step=self.done)
        if config.overlong_buffer:
            punish_overlong(groups, max_tokens=config.sampling.max_tokens, buffer=config.overlong_buffer)
        set_advantages(groups, config.loss.advantage)
        for unknown in scores.unknown[:3]:
            tracker.log(f"reward unknown: {unknown.reward}, completion {unknown.row}: {unknown.reason}")
        return scores.metrics

    def sync(self, tracker: StepTracker, timer: Timer | None = None) -> SyncReport | None:
        """The sampler gets the policy's weights and proves it. None if it is lost and a signal came."""
        with self.phase(tracker, "syncing", self.engine.name, timer):
            return self.engine.sync(self.done)

    def evaluate(self, problems: int, tracker: StepTracker) -> Evaluation | None:
        """Sampled accuracy on the first held-out problems, one completion each; every process does the same."""
        held_out = self.held_out
        if held_out is None:
            return None
        params, tokenizer = dataclasses.replace(self.engine.params, n=1, record_experts=False), self.policy.tokenizer
        with self.phase(tracker, "evaluating", self.engine.name):
            failpoint("run/evaluating")
            return self.engine.use(
                lambda sampler: evaluate(sampler, held_out.first(problems), params, tokenizer, self.examiner)
            )

    def told_to_leave(self) -> bool:
        """Whether a signal reached any of the processes: all leave at the same point."""
        return any(self.world.gather([self.interrupt.requested]))

    @contextlib.contextmanager
    def phase(self, tracker: StepTracker, name: str, component: str, timer: Timer | None = None) -> Iterator[None]:
        """What is going on, for whoever looks, for the watchdog, and for the step's times."""
        with tracker.phase(name) as phase, self.watchdog.phase(name, component=component):
            yield
        if timer is not None:
            timer[name] += phase.seconds

    def record(self, step: int, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Append to metrics.jsonl and the trackers. The closing evaluation is a line of its own."""
        if self.metrics is not None and metrics:
            self.metrics.log(step, {**metrics, "final": True} if last else metrics)

    def save(self, tracker: StepTracker) -> None:
        """A checkpoint to resume from."""
        with self.phase(tracker, "saving", "disk"):
            write = save_training_state(self.policy, self.optimizer, self.curriculum, self.progress)
            if self.world.is_main:
                assert self.metrics is not None
                self.metrics.sync()  # lines of steps that no resume will write again
                self._write(f"step-{self.done:06d}", write)
                prune_checkpoints(self.folder.checkpoints_dir, self.config.checkpoint.keep)
            self.world.wait()
        self.saved = self.done

    def save_final(self, tracker: StepTracker) -> None:
        """checkpoints/final: what transformers and vLLM load as it is."""
        with self.phase(tracker, "saving", "disk"):
            model = self.policy.trained.whole()
            if model is not None and self.world.is_main:
                self._write("final", lambda folder: save_pretrained(folder, model, self.policy.tokenizer))
            self.world.wait()

    def _write(self, name: str, write: Callable[[Path], None]) -> None:
        info = {"step": self.done, "updates": self.optimizer.updates}
        save_checkpoint(self.folder.checkpoints_dir, name, write, info=info)

    def close(self) -> None:
        """Free the sampler and the log."""
        self.engine.close()
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
            # A closing evaluation is repeated, too.
            last = "final" if self.done >= self.config.steps else None
            metrics.truncate_after(self.done if self.done else -1, with_key=last)
        return metrics

    def _quick_evaluation(self, tracker: StepTracker) -> dict[str, float]:
        every = self.config.evaluation.every
        if not every or self.done % every or self.done == self.config.steps:
            return {}
        evaluation = self.evaluate(self.config.evaluation.quick_problems, tracker)
        return {} if evaluation is None else evaluation_metrics(evaluation)

    def _accounts(self, rollout: Rollout, drawn: int) -> dict[str, float]:
        """What dynamic sampling cost: every extra sample is counted here, and is in the step's file."""
        spare, tokens, dull = self.world.sum(
            torch.tensor([len(rollout.spare), _tokens(rollout.spare), sum(not teaches(g) for g in rollout.groups)])
        ).tolist()
        return {
            "dynamic/extra_groups": float(drawn - self.config.prompts_per_step),
            "dynamic/spare_groups": float(spare),
            "dynamic/spare_tokens": float(tokens),
            "dynamic/unfilled_groups": float(dull),
        }

    def _keep_logprobs(self, groups: Sequence[Group], old_C: torch.Tensor) -> None:
        """The trainer's log-probs of a step's tokens, beside the sampler's in its rollout, for the report."""
        write_trainer_logprobs(
            self.folder.path / "trainer",
            groups,
            old_C,
            mask_truncated=self.config.loss.mask_truncated,
            step=self.done + 1,
            world=self.world,
        )

    def _dump_skipped(self, groups: Sequence[Group], norm: float) -> None:
        """Name the completions whose gradient was not finite, in a file of the run folder."""
        completions = [
            {
                "prompt_index": group.prompt.index,
                "seed": group.prompt.seed,
                "tokens": [len(completion.ids) for completion in group.completions],
                "rewards": [repr(reward) for reward in group.rewards],
                "advantages": [repr(advantage) for advantage in group.advantages],
            }
            for group in self.world.gather(list(groups))
        ]
        if self.world.is_main:
            path = self.folder.path / f"skipped-{self.done + 1:06d}.json"
            write_durably(
                path, json.dumps({"step": self.done + 1, "grad_norm": repr(norm), "groups": completions}, indent=1)
            )
            log.warning("gradient norm %s: no update; %s names the completions", norm, path)

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


def deal(missing: Sequence[int]) -> list[int]:
    """Whose each prompt is: ranks in turn, each until it has as many as it misses."""
    turns = [(turn, rank) for rank, count in enumerate(missing) for turn in range(count)]
    return [rank for _, rank in sorted(turns)]


def _tokens(groups: Sequence[Group]) -> int:
    return sum(len(completion.ids) for group in groups for completion in group.completions)


def _scorer(rewards: Mapping[Any, float], config: GRPOConfig) -> Scorer:
    """Its processes are started, so that a reward that can't be loaded is found now and not after the first rollout."""
    with contextlib.ExitStack() as stack:
        try:
            scorer = stack.enter_context(Scorer(rewards, gates=config.gates, time_limit=config.reward_time_limit))
            scorer.start()
        except ValueError as error:
            raise UserError(f"rewards: {error}") from error
        stack.pop_all()
    return scorer


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
