"""SFT: examples -> packed rows -> loss -> step, epoch after epoch.

`train(config)` builds the parts and calls the loop; the loop is `Run.step`. The loss is the mean over all trained
tokens of a step, whatever the rows, passes and processes they are spread over. Left out: streaming corpora.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.adapters import ADAPTER
from runtime.checkpoint import latest_checkpoint, prune_checkpoints, save_checkpoint
from runtime.distributed import World
from runtime.errors import UserError
from runtime.failpoints import failpoint
from runtime.files import write_durably
from runtime.held_out import write_held_out
from runtime.interrupt import Interrupt
from runtime.metrics import MetricsLog
from runtime.models import end_token_ids, load_causal_lm, load_tokenizer
from runtime.progress import StepTracker, track_steps
from runtime.report import write_report
from runtime.run_folder import RunFolder, check_space, open_run_together
from runtime.watchdog import Watchdog
from runtime.weights import save_pretrained
from sft.balance import Balance
from sft.batch import Batch, Sizes, load_batch
from sft.card import model_card
from sft.config import SFTConfig
from sft.data import Data, load_data, set_template
from sft.epochs import Epochs
from sft.evaluate import Accuracy, held_out_rows, sampled_accuracy, source_losses
from sft.optimizer import MAX_SKIPPED, Optimizer
from sft.pack import Ints, plan_rows
from sft.resume import checkpoint_bytes, load_training_state, save_training_state
from sft.store import Store
from sft.trainee import Trainee

log = logging.getLogger(__name__)

MAY_CHANGE_ON_RESUME = ("report_to", "checkpoint", "evaluation", "rows_per_pass", "workers", "token_cache", "shard")


class NonFinite(RuntimeError):
    """Gradients were not finite several steps in a row."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    run_dir: Path
    steps: int
    """Steps done, in all attempts."""
    before: Accuracy | None
    """Sampled accuracy of the model as loaded; None without problems, or on a resumed run."""
    after: Accuracy | None
    exit_code: int
    """0, or 128 + signal when the run was told to leave and did so after saving."""


def train(config: SFTConfig, *, named_models: Mapping[str, Callable[[], Path]] | None = None) -> Result:
    """Run SFT to the end, or to the checkpoint a signal asks for.

    named_models: makers of checkpoints that `config.model` may name, say {"tiny": recipes.tiny.random_checkpoint}.
    Raises UserError for settings, data or folders that can't be used.
    """
    world = World(precision=config.precision)
    with contextlib.ExitStack() as stack:
        settings = dataclasses.asdict(config)
        opening = open_run_together(
            world, "sft", config.run_dir, config=settings, resume=config.resume, may_change=MAY_CHANGE_ON_RESUME
        )
        folder = stack.enter_context(opening)
        found = [latest_checkpoint(folder.checkpoints_dir) if folder.resumed else None] if world.is_main else []
        checkpoint = world.gather(found)[0]
        model = _model_path(config, world, checkpoint, named_models or {})
        tokenizer = load_tokenizer(model)
        set_template(tokenizer, config.chat_template)
        data = load_data(config, tokenizer, world, end_ids=end_token_ids(model, tokenizer))
        interrupt = stack.enter_context(Interrupt())
        watchdog = stack.enter_context(Watchdog(folder.path, config.checkpoint.watchdog if world.is_main else 0))
        adapters = checkpoint / ADAPTER if checkpoint is not None and config.lora is not None else None
        trainee = Trainee(load_causal_lm(model, context=config.context), tokenizer, config, world, adapters=adapters)
        run = Run(config, world, folder, trainee, data, interrupt, watchdog, checkpoint=checkpoint)
        stack.callback(run.close)
        return run.train()


class Run:
    """An SFT run and everything it holds."""

    def __init__(
        self,
        config: SFTConfig,
        world: World,
        folder: RunFolder,
        trainee: Trainee,
        data: Data,
        interrupt: Interrupt,
        watchdog: Watchdog,
        *,
        checkpoint: Path | None,
    ) -> None:
        """checkpoint: what to resume from, if anything."""
        self.config, self.world, self.folder, self.data = config, world, folder, data
        self.trainee, self.interrupt, self.watchdog = trainee, interrupt, watchdog
        self.epochs = Epochs(
            data.train.lengths,
            epoch_examples=data.epoch_examples,
            epochs=config.epochs,
            row_length=config.row_length,
            seed=config.seed,
        )
        self.steps = math.ceil(len(self.epochs) / config.rows_per_step)
        self.optimizer = Optimizer(trainee, config.optim, steps=self.steps)
        self.balance = Balance(trainee)
        if self.watches and not self.balance.routers:
            raise UserError(
                f"model={config.model!r} has no DeepSeek-V3 routers: set bias_update_speed and balance_loss to 0"
            )
        made_for = getattr(trainee.model.config, "max_position_embeddings", None) or math.inf
        if (longest := int(data.train.lengths.max())) > made_for and world.is_main:
            log.warning("an example of %s tokens: the model was made for %s positions", f"{longest:,}", f"{made_for:,}")
        self.done = 0
        self.best = math.inf
        """Lowest held-out loss so far."""
        if checkpoint is not None:
            self.done, self.best = load_training_state(checkpoint, trainee, self.optimizer)
            log.info("resuming from %s", checkpoint)
        elif world.is_main:
            check_space(folder.path, (config.checkpoint.keep + 3) * checkpoint_bytes(trainee))
        self.saved = -1 if checkpoint is None else self.done
        self.metrics = self._metrics_log() if world.is_main else None

    def train(self) -> Result:
        """The run: evaluate, step after step, evaluate, save."""
        before = after = None
        with self._tracker() as tracker:
            if self.done == 0:
                metrics, before = self.evaluate(tracker)
                self.record(0, metrics | self._data_metrics())
            while self.done < self.steps and not self.told_to_leave():
                metrics = self.step(tracker)
                every = self.config.evaluation.every
                if every and self.done % every == 0 and self.done < self.steps:
                    metrics |= self.evaluate(tracker)[0]
                self.record(self.done, metrics)
                failpoint("sft/recorded")
                if self.world.is_main:
                    tracker.update(self.done, metrics)
                if self.config.checkpoint.every and self.done % self.config.checkpoint.every == 0:
                    self.save(tracker)
            if self.saved != self.done:
                self.save(tracker)
            if not self.told_to_leave():
                metrics, after = self.evaluate(tracker)
                self.record(self.done, metrics, last=True)
                self.save_whole("final", tracker)
        if self.world.is_main:
            write_report(self.folder.path, defaults=SFTConfig())
        return Result(
            run_dir=self.folder.path, steps=self.done, before=before, after=after, exit_code=self.interrupt.exit_code
        )

    def step(self, tracker: StepTracker) -> dict[str, float]:
        """One optimizer step: the next rows, in as many passes as memory wants, one gradient over all processes."""
        began = time.perf_counter()
        first = self.done * self.config.rows_per_step
        rows = range(first, min(first + self.config.rows_per_step, len(self.epochs)))
        with self.phase(tracker, "training", "trainer"):
            batches = list(self.passes([self.epochs.row(row) for row in rows]))
            sizes = [weight * batch.sizes for batch, weight in batches]
            counts = Sizes(*self.world.sum(torch.stack(sizes).sum(0)).tolist())
            losses = torch.stack([self.backward(batch, weight, counts) for batch, weight in batches]).sum(0)
            self.trainee.sum_gradients()
            norm = self.optimizer.step(self.done)
        speed = self.config.bias_update_speed
        if not math.isfinite(norm):
            self._dump_skipped(rows, norm)
            speed = 0.0
        loads = self.balance.update(speed, self.world) if self.watches else {}
        self.done += 1
        failpoint("sft/stepped")
        seconds = time.perf_counter() - began
        loss, mtp_loss = self.world.sum(losses).tolist()
        return {
            "loss": loss,
            **({"mtp_loss": mtp_loss} if self.config.mtp_loss else {}),
            "grad_norm": norm,
            "learning_rate": self.optimizer.optimizers[0].param_groups[0]["lr"],
            "epoch": self.epochs.epoch_at(rows.stop),
            "num_tokens": counts.tokens,
            "trained_tokens": counts.targets,
            "tokens_per_second": counts.tokens / seconds,
            "step_time": seconds,
            **loads,
        }

    def backward(self, batch: Batch, weight: float, counts: Sizes) -> Tensor:
        """One pass; its share of the step's loss and of the MTP layer's, means over all processes' targets; (2,)."""
        config = self.config
        with self.balance.watching(counted=weight > 0) if self.watches else contextlib.nullcontext():
            logp_C, further_M = self.logprobs(batch, further=bool(config.mtp_loss))
            loss = -logp_C.sum() / counts.targets * weight
            mtp_loss = torch.zeros(()) if further_M is None else -further_M.sum() / max(counts.further, 1) * weight
            whole = loss + config.mtp_loss * mtp_loss
            if config.balance_loss:
                balance = self.balance.loss(batch.packed.layout) / counts.sequences
                whole = whole + config.balance_loss * weight * balance
            whole.backward()
        return torch.tensor([float(loss.detach()), float(mtp_loss.detach())], dtype=torch.float64)

    def logprobs(self, batch: Batch, *, further: bool = False) -> tuple[Tensor, Tensor | None]:
        """log π of the targets, (C,) fp32; and, asked for, the MTP layer's of those two tokens on, (M,)."""
        with self.world.autocast():
            return self.trainee.logprobs(batch.packed, batch.targets, batch.further if further else None)

    def passes(self, rows: Sequence[Ints], examples: Any = None) -> Iterator[tuple[Batch, float]]:
        """This process's share of the rows, in passes, each with weight 1.

        Sharded processes must run as many passes as each other: one that has fewer repeats a row with weight 0.
        """
        examples = self.data.train if examples is None else examples
        size, rank, together = self.world.size, self.world.rank, self.config.rows_per_pass
        own = list(rows[rank::size])
        for start in range(0, math.ceil(math.ceil(len(rows) / size) / together) * together, together):
            part, weight = own[start : start + together], 1.0
            if not part:
                part, weight = [rows[0]], 0.0
            numbers = [int(number) for row in part for number in row]
            yield load_batch(examples, numbers, self.world.device), weight

    @property
    def watches(self) -> bool:
        """Whether routers are watched."""
        return bool(self.config.bias_update_speed or self.config.balance_loss)

    def evaluate(self, tracker: StepTracker) -> tuple[dict[str, float], Accuracy | None]:
        """Held-out loss by source, and accuracy, with every sample in held_out/; also keeps the checkpoint with the
        lowest loss."""
        config, accuracy = self.config.evaluation, None
        with self.phase(tracker, "evaluating", "trainer"):
            failpoint("sft/evaluating")
            metrics = {}
            if self.data.held_out:
                held_out = self.data.held_out.items()
                passes = {name: self.passes(self._held_out_rows(store), store) for name, store in held_out}
                metrics = source_losses(passes, lambda batch: self.logprobs(batch)[0], self.world.sum)
            if config.problems:
                model = self.trainee.whole()
                if model is not None and self.world.is_main:
                    accuracy = sampled_accuracy(
                        model,
                        self.trainee.tokenizer,
                        config.problems,
                        samples=config.samples,
                        max_tokens=config.max_tokens,
                    )
                    write_held_out(self.folder.path, held_out_rows(accuracy.samples), step=self.done)
                    metrics |= {
                        "eval/accuracy": accuracy.mean,
                        "eval/accuracy_low": accuracy.low,
                        "eval/accuracy_high": accuracy.high,
                        "eval/format": accuracy.format,
                        "eval/problems": float(accuracy.problems),
                    }
                self.world.wait()
        if (loss := metrics.get("eval/loss", math.nan)) < self.best:
            self.best = loss
            if self.done:
                self.save_whole("best", tracker)
        return metrics, accuracy

    def _held_out_rows(self, store: Store) -> list[Ints]:
        plan = plan_rows(store.lengths, self.config.row_length)
        return [plan.row(row) for row in range(min(len(plan), self.config.evaluation.rows))]

    def told_to_leave(self) -> bool:
        """Whether a signal reached any of the processes: all leave at the same point."""
        return any(self.world.gather([self.interrupt.requested]))

    @contextlib.contextmanager
    def phase(self, tracker: StepTracker, name: str, component: str) -> Iterator[None]:
        """What is going on, for whoever looks and for the watchdog."""
        with tracker.phase(name), self.watchdog.phase(name, component=component):
            yield

    def record(self, step: int, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """Append to metrics.jsonl and the trackers. The closing evaluation is a line of its own."""
        if self.metrics is not None and metrics:
            self.metrics.log(step, {**metrics, "final": True} if last else metrics)

    def save(self, tracker: StepTracker) -> None:
        """A checkpoint to resume from."""
        with self.phase(tracker, "saving", "disk"):
            write = save_training_state(self.trainee, self.optimizer, step=self.done, best=self.best)
            if self.world.is_main:
                assert self.metrics is not None
                self.metrics.sync()  # lines of steps that no resume will write again
                save_checkpoint(self.folder.checkpoints_dir, f"step-{self.done:06d}", write, info={"step": self.done})
                prune_checkpoints(self.folder.checkpoints_dir, self.config.checkpoint.keep)
            self.world.wait()
        self.saved = self.done

    def save_whole(self, name: str, tracker: StepTracker) -> None:
        """checkpoints/<name>: what transformers, vLLM and peft load as it is, with a model card."""
        with self.phase(tracker, "saving", "disk"):
            model = self.trainee.whole()
            if self.world.is_main:
                assert model is not None

                def write(folder: Path) -> None:
                    save_pretrained(folder, model, self.trainee.tokenizer)
                    if self.config.lora is not None:
                        model.save_pretrained(folder / ADAPTER)  # type: ignore[operator]
                    write_durably(folder / "README.md", model_card(self.config, self.data, self.epochs, step=self.done))

                save_checkpoint(self.folder.checkpoints_dir, name, write, info={"step": self.done})
            self.world.wait()

    def close(self) -> None:
        """Free the log."""
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
            last = "final" if self.done >= self.steps else None
            metrics.truncate_after(self.done if self.done else -1, with_key=last)
        return metrics

    def _data_metrics(self) -> dict[str, float]:
        """What the sources came to: examples, tokens, and rows set aside by reason."""
        sources = self.data.train.sources
        rejects: Counter[str] = sum((Counter(source.rejects) for source in sources), Counter())
        return {
            "data/examples": float(sum(source.samples for source in sources)),
            "data/tokens": float(sum(source.tokens for source in sources)),
            **{f"data/rejected/{reason}": float(count) for reason, count in sorted(rejects.items())},
        }

    def _dump_skipped(self, rows: range, norm: float) -> None:
        """Name the examples whose gradient was not finite, in a file of the run folder; stop after several in a row."""
        path = self.folder.path / f"skipped-{self.done + 1:06d}.json"
        if self.world.is_main:
            examples = [number for row in rows for number in self.epochs.row(row).tolist()]
            where = [self.data.train.where(number) for number in examples]
            write_durably(
                path, json.dumps({"step": self.done + 1, "grad_norm": repr(norm), "examples": where}, indent=1)
            )
            log.warning("gradient norm %s: no step; %s names the examples", norm, path)
        if self.optimizer.skipped >= MAX_SKIPPED:
            raise NonFinite(
                f"gradient norm {norm} in {MAX_SKIPPED} steps in a row: lower optim.lr, or look at what the model was "
                "trained on: skipped-*.json in the run folder names the examples"
            )

    @contextlib.contextmanager
    def _tracker(self) -> Iterator[StepTracker]:
        from rich.console import Console

        console = Console(stderr=True) if self.world.is_main else Console(quiet=True)
        title = f"SFT {self.folder.path.name}"
        with track_steps(self.steps, title, start=self.done, console=console) as tracker:
            yield tracker


def _model_path(
    config: SFTConfig, world: World, checkpoint: Path | None, named_models: Mapping[str, Callable[[], Path]]
) -> Path | str:
    """Where the weights are: in the checkpoint being resumed (under LoRA it has adapters only), a named model, made by
    the main process alone, or the path itself."""
    if checkpoint is not None and config.lora is None:
        return checkpoint
    if config.model not in named_models:
        return config.model
    made = [str(named_models[config.model]())] if world.is_main else []
    return world.gather(made)[0]


__all__ = ["NonFinite", "Result", "Run", "UserError", "train"]
