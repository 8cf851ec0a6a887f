"""Trained tokens a second of an SFT step, forward to optimizer step: ours against TRL's `SFTTrainer`.

The same random V3 weights, documents and masks in fp32, at 5M and 20M parameters; the same AdamW, clip and constant
rate. A step takes the documents of a few rows of 4096 tokens; the first quarter of each is its prompt, and not trained.
Ours is `sft.train.Run.step` with all that it does: reading the packed examples, metrics, clip, AdamW. The peers are
`SFTTrainer` inside its own `train()`, on transformers' V3 with the attention and experts that are fastest, gradient
checkpointing off, and its loss in chunks, which is its only one by now (`chunked_nll` is an alias of it):

  packed  rows as best-fit packing makes them (`packing=True`, `bfd`), the very rows that ours has
  padded  documents one by one, filled up to the longest of their micro-batch, as many together as is fastest
  sorted  the same, and documents of alike lengths share a micro-batch, as its `group_by_length` would try to

Before a case is timed, the loss of a step must agree with ours, and so must its whole gradient with every token's
experts fixed; otherwise the exit code is 1. That is also the proof that TRL's packed documents don't see each other:
it says by positions where each begins, and transformers makes a mask of tokens × tokens from them. Lengths are skewed
(quantiles of a log-normal, mean 256) or all equal, where padding costs nothing and our only advantage is the code.
On a CPU TRL's head also scores prompts and padding, which on a GPU it leaves out. As in update.py, it is made to leave
them out here, too: `--peer_head installed` times TRL as it comes. Left out: reading and preparing data (sft_data.py),
logging, checkpoints; and of TRL's time what it spends between steps on collating.
"""

import argparse
import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._common import (
    Contestant,
    Turns,
    alternate,
    fastest_peer,
    make_checkpoint,
    ratio,
    setting,
    spread,
    table,
    timed,
)
from runtime.distributed import World
from runtime.models import load_causal_lm, load_tokenizer
from sft.config import OptimConfig, SFTConfig
from sft.optimizer import Optimizer
from sft.pack import Ints, plan_rows
from sft.train import Run
from sft.trainee import Trainee

LR = 1e-6
"""Small: every round then has nearly the same weights."""
EPOCHS = 500
"""Steps of a run: each takes all documents."""
SIGMA = 0.75
"""Of the log-normal."""
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Largest relative differences between us and TRL: a token more or less to divide by would be seen."""
PEERS = {"packed": "TRL, packed", "padded": "TRL, padded", "sorted": "TRL, padded, sorted"}
ROWS_PER_PASS = (1, 2, 4)
MICRO_BATCHES = (4, 8, 16, 32)
"""Documents."""
HEADER = (
    *("case", "peer", "ours, s", "peer, s", "ours, trained tokens/s", "peer, trained tokens/s", "times faster"),
    *("loss, ours and peer's", "gradient differs by", "peer with", "ours with"),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """The documents of a step."""

    preset: str
    rows: int
    """Packed rows of a step."""
    row_length: int
    mean: int
    """Tokens of a document, on average."""
    equal: bool
    """All of one length."""

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: as many as their packing has room for."""
        n = self.rows * self.row_length // self.mean
        if self.equal:
            return np.full(n, self.mean)
        normal, middle = statistics.NormalDist(), math.log(self.mean) - SIGMA**2 / 2
        quantiles = [math.exp(middle + SIGMA * normal.inv_cdf((i + 0.5) / n)) for i in range(n)]
        lengths = np.random.default_rng(0).permutation(np.clip(np.round(quantiles), 4, self.row_length).astype(int))
        while len(plan_rows(lengths, self.row_length)) > self.rows:
            lengths = lengths[:-1]
        return lengths

    @cached_property
    def documents(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Random ids of each, and which of them are trained."""
        chance = np.random.default_rng(1)
        vocab_size = 512 if self.preset == "tiny" else 8192
        return [(chance.integers(5, vocab_size, n).astype(np.int32), np.arange(n) >= n // 4) for n in self.lengths]

    @property
    def trained(self) -> int:
        """Trained tokens."""
        return sum(int(mask.sum()) for _, mask in self.documents)

    def __str__(self) -> str:
        tokens = str(self.mean) if self.equal else f"{self.lengths.min()} to {self.lengths.max()}"
        return f"{self.preset}, {self.rows} × {self.row_length}, {len(self.lengths)} documents of {tokens}"


# --- ours -------------------------------------------------------------------------------------------------------------


class Documents(list[tuple[np.ndarray, np.ndarray]]):
    """In the place of sft/data.py's `Data` and of the store in it: every epoch has each document once."""

    held_out: dict[str, Any] = {}  # noqa: RUF012

    @property
    def train(self) -> "Documents":
        return self

    @property
    def lengths(self) -> Ints:
        return np.array([len(ids) for ids, _ in self])

    def epoch_examples(self, _: int) -> Ints:
        return np.arange(len(self))


@contextlib.contextmanager
def open_run(folder: Path, case: Case) -> Iterator[tuple[Run, Any]]:
    """A run on the case's documents, one step an epoch, and its tracker."""
    from rich.console import Console

    from runtime.interrupt import Interrupt
    from runtime.progress import StepTracker
    from runtime.run_folder import open_run as open_folder
    from runtime.watchdog import Watchdog

    config = SFTConfig(
        model=str(folder),
        epochs=EPOCHS,
        row_length=case.row_length,
        rows_per_step=case.rows,
        optim=OptimConfig(lr=LR, final_lr=LR),
    )
    with (
        tempfile.TemporaryDirectory() as name,
        Interrupt() as interrupt,
        open_folder(Path(name) / "run", config={}, resume=False) as run_folder,
    ):
        data: Any = Documents(case.documents)
        watchdog, world = Watchdog(run_folder.path, 0), World()
        trainee = Trainee(load_causal_lm(folder), load_tokenizer(folder), config, world)
        run = Run(config, world, run_folder, trainee, data, interrupt, watchdog, checkpoint=None)
        yield run, StepTracker(EPOCHS, "benchmark", console=Console(file=io.StringIO()))
        run.close()


def ours(turns: Turns, folder: Path, case: Case) -> None:
    """Steps; answers with the seconds of each."""
    with open_run(folder, case) as (run, tracker):
        work = partial(run.step, tracker)
        best: dict[int, float] = {}
        for _ in range(2):  # the first time round also warms up
            for rows in (n for n in ROWS_PER_PASS if n <= case.rows):
                run.config = replace(run.config, rows_per_pass=rows)
                best[rows] = min(timed(work)[0], best.get(rows, math.inf))
        fastest = min(best, key=lambda rows: best[rows])
        run.config = replace(run.config, rows_per_pass=fastest)
        turns.answer({"threads": torch.get_num_threads(), "settings": f"rows_per_pass {fastest}"})
        for _ in turns:
            turns.answer(timed(work)[0])


class Recorder(Optimizer):
    """Keeps the gradient instead of following it."""

    def step(self, _: int) -> float:
        named = self.trainee.named_parameters()
        self.gradient = {name.removeprefix("model."): p.grad for name, p in named if p.grad is not None}
        return 0.0


def our_gradient(folder: Path, case: Case, *, fixed: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradient of our first step. fixed: see `fix_routes`."""
    with open_run(folder, case) as (run, tracker), fix_routes(run.trainee) if fixed else contextlib.nullcontext():
        run.optimizer = recorder = Recorder(run.trainee, run.config.optim, steps=1)
        return run.step(tracker)["loss"], recorder.gradient


@contextlib.contextmanager
def fix_routes(model: torch.nn.Module) -> Iterator[None]:
    """Every token takes the same experts, by biases that no score outweighs. Else, of so many choices, a few are near
    ties that fall one way in one order of summation and another way in another, and gradients differ by those."""
    biases = [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for bias in biases:
        bias.copy_(torch.arange(len(bias)))
    yield
    for bias in biases:
        bias.zero_()


# --- TRL --------------------------------------------------------------------------------------------------------------


def make_rows(case: Case, peer: str) -> list[dict[str, list[int]]]:
    """Rows of TRL's dataset, in the order of a step."""
    documents = [
        {"input_ids": ids.tolist(), "labels": np.where(trained, ids, -100).tolist()} for ids, trained in case.documents
    ]
    if peer == "sorted":
        return sorted(documents, key=lambda row: len(row["input_ids"]))
    if peer == "padded":
        return documents
    plan = plan_rows(case.lengths, case.row_length)
    packed = [[documents[i] for i in plan.row(row)] for row in range(len(plan))]
    return [
        {name: [x for document in row for x in document[name]] for name in ("input_ids", "labels")}
        | {"seq_lengths": [len(document["input_ids"]) for document in row]}
        for row in packed
    ]


def make_trainer(model: Any, folder: Path, rows: Sequence[dict[str, list[int]]], case: Case, size: int) -> Any:
    """TRL's trainer, `size` of the rows a micro-batch and all of them a step."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        output_dir=str(folder.parent / "trl"),
        max_steps=10**6,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=math.ceil(len(rows) / size),
        packing="seq_lengths" in rows[0],
        max_length=case.row_length,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        learning_rate=LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,  # on by default, and a forward pass more
        router_aux_loss_coef=0.0,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    dataset = Dataset.from_list(list(rows))
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=load_tokenizer(folder))
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl(turns: Turns, folder: Path, case: Case, peer: str, peer_head: str) -> None:
    """TRL's steps; answers with the seconds of each."""
    from transformers import TrainerCallback

    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # it uses none here
    if peer_head == "trained":
        import trl.trainer.utils as utils

        utils._use_triton = lambda device: True  # there it only decides which positions are scored

    class TakeTurns(TrainerCallback):
        """Waits in front of a step until it is TRL's turn, and times it."""

        requests = iter(turns)

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if next(self.requests, None) is None:
                sys.exit(0)
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.answer(time.perf_counter() - self.began)

    rows = make_rows(case, peer)
    # Several packed rows in a micro-batch would be one long row to TRL, and its mask grows with the square.
    sizes = [1] if peer == "packed" else [n for n in MICRO_BATCHES if n <= len(rows)]
    model, settings = fastest_peer(folder, partial(_peer_work, rows=rows[: sizes[-1] // 2 or 1]), rounds=2)
    # Before any step moves the weights.
    differs = parity(make_trainer(model, folder, rows, case, sizes[0]), folder, case)
    seconds: dict[int, float] = {}
    for size in sizes:
        trainer = make_trainer(model, folder, rows, case, size)
        seconds[size] = timed(partial(whole_step, trainer))[0] if len(sizes) > 1 else 0.0
        model.zero_grad()
    fastest = min(seconds, key=lambda size: seconds[size])
    settings = f"{settings}, {fastest} {'row' if peer == 'packed' else 'documents'} a micro-batch"
    turns.answer({"threads": torch.get_num_threads(), "settings": settings, **differs})
    trainer = make_trainer(model, folder, rows, case, fastest)
    trainer.add_callback(TakeTurns())
    trainer.train()


def _peer_work(model: Any, rows: Sequence[dict[str, list[int]]]) -> None:
    """Forward and backward of a micro-batch."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free="seq_lengths" in rows[0])(rows)
    del batch["labels"]
    model.train()
    model.base_model(**batch, use_cache=False).last_hidden_state.square().mean().backward()
    model.zero_grad()


def whole_step(trainer: Any) -> float:
    """All micro-batches of a step, outside TRL's `train()` and without its optimizer; returns the loss."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    micro_batches = iter(trainer.get_train_dataloader())
    batches, count = trainer.get_batch_samples(
        micro_batches, trainer.args.gradient_accumulation_steps, torch.device("cpu")
    )
    return sum(float(trainer.training_step(trainer.model, batch, count)) for batch in batches)


def parity(trainer: Any, folder: Path, case: Case) -> dict[str, Any]:
    """Both losses and their relative difference, and that of the gradients, whose routes are fixed."""
    losses = our_gradient(folder, case, fixed=False)[0], whole_step(trainer)
    trainer.model.zero_grad()
    _, gradient = our_gradient(folder, case, fixed=True)
    with fix_routes(trainer.model):
        whole_step(trainer)
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    if set(gradients) != set(gradient):
        raise RuntimeError(f"parameters differ: {sorted(set(gradients) ^ set(gradient))}")
    off = math.sqrt(sum(float((g - gradients[name]).square().sum()) for name, g in gradient.items()))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    trainer.model.zero_grad()
    return {"losses": losses, "loss differs by": abs(losses[0] / losses[1] - 1), "gradient differs by": off / norm}


# --- both -------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sft", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", nargs="+", default=["5m", "20m"], help="model sizes")
    parser.add_argument("--lengths", nargs="+", choices=["skewed", "equal"], default=["skewed", "equal"])
    parser.add_argument("--peer", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rows", type=int, default=4, help="packed rows a step")
    parser.add_argument("--row_length", type=int, default=4096, help="tokens")
    parser.add_argument("--mean", type=int, default=256, help="mean tokens of a document")
    parser.add_argument("--peer_head", choices=["trained", "installed"], default="trained", help="see above")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(setting(args.threads, "torch", "transformers", "trl"), flush=True)
    print(f"\n{table(HEADER, [])}", flush=True)
    for preset in args.preset:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_checkpoint(Path(temporary) / "model", preset)
            for lengths in args.lengths:
                case = Case(
                    preset=preset,
                    rows=args.rows,
                    row_length=args.row_length,
                    mean=args.mean,
                    equal=lengths == "equal",
                )
                if not compare(args, folder, case):
                    return 1
    return 0


def compare(args: argparse.Namespace, folder: Path, case: Case) -> bool:
    """Time a case and print its rows; False when the sides don't compute the same."""
    # Equal documents are sorted already.
    peers = [peer for peer in args.peer if not (case.equal and peer == "sorted")]
    contestants: list[Contestant] = []
    try:
        for peer in peers:
            contestant = Contestant(PEERS[peer], trl, folder, case, peer, args.peer_head, threads=args.threads)
            contestants.append(contestant)
            loss, gradient = (contestant.ready[f"{what} differs by"] for what in ("loss", "gradient"))
            if not (loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE):
                print(f"parity: from {PEERS[peer]} the loss differs by {loss:.1e}, the gradient by {gradient:.1e}")
                return False
        contestants.append(Contestant("ours", ours, folder, case, threads=args.threads))
        seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
        for r, turns in groupby(alternate(contestants, args.rounds + 1), key=lambda turn: turn[0]):
            for _, contestant in turns:
                seconds[contestant.name].append(contestant.turn("step"))
            print(f"round {r}: { ({k: round(v[-1], 3) for k, v in seconds.items()}) }", file=sys.stderr)
    finally:
        for contestant in contestants:
            contestant.close()
    *theirs, us = contestants
    for peer in theirs:
        sides = [seconds["ours"][1:], seconds[peer.name][1:]]  # round 0 was to warm up
        row = [
            *(str(case), peer.name, *(spread(side, ".2f") for side in sides)),
            *(spread([case.trained / s for s in side], ",.0f") for side in sides),
            ratio(*sides),
            " and ".join(f"{loss:.5f}" for loss in peer.ready["losses"]),
            f"{peer.ready['gradient differs by']:.0e}",
            *(peer.ready["settings"], us.ready["settings"]),
        ]
        print(f"| {' | '.join(row)} |", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
