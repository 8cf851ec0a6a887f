"""What `python -m recipes.plan` says of memory against torch's allocator, on a CPU, phase by phase.

    python -m benchmarks.plan

Steps of SFT (`sft.train.Run.step`) and updates of GRPO (`rl.update.update`) on random weights, each case in a process
of its own. The second step is looked at, when the optimizer has its state. Weights, optimizer and gradients are counted
on the tensors themselves; what comes and goes in a step is every allocation of torch's CPU allocator, inside of kernels
too, as its profiler tells them. Of several ranks the first one is there alone, in torch's fake process group: its
collectives allocate as real ones do, and send nothing. The exit code is 1 where a phase is off by more than 10 %.
Left out: what libraries allocate past torch (oneDNN's, OpenMP's buffers), and CUDA.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile, record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks import sft, update
from benchmarks._common import Contestant, Turns, make_checkpoint, setting, table
from deepseek_v3 import preset
from rl.update import Optimizer as Updates
from runtime.distributed import World
from runtime.interrupt import Interrupt
from runtime.models import load_causal_lm, load_tokenizer
from runtime.packed import plain_model
from runtime.planning.activations import Kernels
from runtime.planning.census import count
from runtime.planning.layout import Layout
from runtime.planning.memory import TRAINING, Line, Work, total, training
from runtime.progress import StepTracker
from runtime.run_folder import open_run
from runtime.watchdog import Watchdog
from sft.batch import load_batch
from sft.config import SFTConfig
from sft.optimizer import Optimizer
from sft.train import Run
from sft.trainee import Trainee

TOLERANCE = 0.1
MARK = "plan: "
HEADER = ("case", "phase", "planned, MiB", "measured, MiB", "planned / measured")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step."""

    recipe: str
    preset: str
    bf16: bool = False
    checkpointing: bool = False
    passes: int = 1
    mtp: bool = False
    """With the MTP layer, trained."""
    ranks: int = 1
    """Processes that the model is sharded over."""
    tokens: int = 4096
    """Of a pass."""
    document: int = 256
    """Tokens of an SFT's documents, of whose first quarter none is trained."""
    prompt: int = 64
    """Tokens of a GRPO's prompts; its groups are of 8 completions as long as it takes to fill a pass."""

    def __str__(self) -> str:
        settings = ["bf16" if self.bf16 else "fp32", *["checkpointing"] * self.checkpointing, *["MTP"] * self.mtp]
        ranks = f" on each of {self.ranks} ranks" if self.ranks > 1 else ""
        return f"{self.recipe} of {self.preset}, {', '.join(settings)}, {self.passes} × {self.tokens} tokens{ranks}"


CASES = (
    *(Case(recipe="sft", preset=name) for name in ("tiny", "5m", "20m")),
    Case(recipe="sft", preset="tiny", passes=3),
    Case(recipe="sft", preset="20m", passes=2),
    Case(recipe="sft", preset="20m", bf16=True),
    Case(recipe="sft", preset="5m", checkpointing=True),
    Case(recipe="sft", preset="20m", checkpointing=True, bf16=True, passes=2),
    Case(recipe="sft", preset="5m", mtp=True),
    Case(recipe="sft", preset="20m", ranks=8),
    Case(recipe="sft", preset="20m", ranks=8, bf16=True, checkpointing=True),
    *(Case(recipe="grpo", preset=name) for name in ("tiny", "5m", "20m")),
    Case(recipe="grpo", preset="5m", passes=2, bf16=True),
)


# --- measured ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes of a step."""

    phases: dict[str, int]
    """Most at any moment of each."""
    states: dict[str, int]
    """Of weights (with buffers), optimizer and gradients."""


def measure(
    model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer], work: Callable[[], object]
) -> Measured:
    """Of `work`, a step of training, when everything that outlives a step is there."""
    gradients = 0
    states = {
        "weights": sum(map(_size, [*model.parameters(), *model.buffers()])),
        "optimizer": sum(_size(t) for o in optimizers for state in o.state.values() for t in state.values()),
    }

    def mark(phase: str) -> None:
        with record_function(MARK + phase):
            pass

    def stepping(*_: Any) -> None:
        nonlocal gradients
        gradients = sum(_size(p.grad) for p in model.parameters() if p.grad is not None)
        mark("step")

    def backward(*args: Any, **kwargs: Any) -> None:
        mark("backward")
        whole_backward(*args, **kwargs)

    whole_backward = torch.autograd.backward
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.autograd, "backward", backward))
        base: Any = plain_model(model).base_model
        stack.callback(base.register_forward_pre_hook(lambda *_: mark("forward")).remove)
        stack.callback(optimizers[0].register_step_pre_hook(stepping).remove)
        events = allocations(work)
    live, phase = sum(states.values()), ""
    phases: dict[str, int] = {}
    for begun, change in events:
        live, phase = live + change, begun or phase
        phases[phase] = max(phases.get(phase, 0), live)
    return Measured(phases=phases, states=states | {"gradients": gradients})


def allocations(work: Callable[[], object]) -> list[tuple[str, int]]:
    """Bytes that torch's allocator gives (or, negative, takes back) while it works, in order; and in between marks of
    phases that begin, with 0 bytes."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = list(profiled.profiler.kineto_results.events())  # type: ignore[union-attr]
    marks = [(e.start_ns(), e.name().removeprefix(MARK), 0) for e in events if e.name().startswith(MARK)]
    changes = [(e.start_ns(), "", e.nbytes()) for e in events if e.name() == "[memory]"]
    return [(mark, change) for _, mark, change in sorted(marks + changes)]


def _size(tensor: torch.Tensor) -> int:
    local: Any = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


def of_sft(folder: Path, case: Case) -> Measured:
    """The second step of an SFT run."""
    config = SFTConfig(
        model=str(folder),
        row_length=case.tokens,
        rows_per_step=case.passes,
        precision="bf16" if case.bf16 else "fp32",
        gradient_checkpointing=case.checkpointing,
        mtp_loss=0.1 * case.mtp,
    )
    documents = sft.Documents(_documents(case).documents)
    world = World(precision=config.precision)
    if case.ranks > 1:
        return _of_rank(config, documents, world, case.ranks)
    with (
        tempfile.TemporaryDirectory() as name,
        Interrupt() as interrupt,
        open_run(Path(name) / "run", config={}, resume=False) as run_folder,
    ):
        trainee, watchdog = _trainee(config, world), Watchdog(run_folder.path, 0)
        data: Any = documents
        run = Run(config, world, run_folder, trainee, data, interrupt, watchdog, checkpoint=None)
        tracker = StepTracker(2, "benchmark", console=Console(file=io.StringIO()))
        run.step(tracker)
        measured = measure(trainee.model, run.optimizer.optimizers, partial(run.step, tracker))
        run.close()
    return measured


def _of_rank(config: SFTConfig, documents: sft.Documents, world: World, ranks: int) -> Measured:
    """The same of one of several ranks. What it gathers from the others is whatever lay in memory."""
    torch.distributed.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    world.size = ranks
    trainee = _trainee(config, world)
    optimizer = Optimizer(trainee, config.optim, steps=2)
    batch = load_batch(documents, range(len(documents)))

    def step() -> None:
        with world.autocast():
            logp_C, _ = trainee.logprobs(batch.packed, batch.targets)
        (-logp_C.nan_to_num().sum() / len(logp_C)).backward()
        optimizer.step(0)

    with mock.patch("sft.optimizer.norm_of_gradients", return_value=0.0):  # else it would see no finite one
        step()
        return measure(trainee.model, optimizer.optimizers, step)


def _trainee(config: SFTConfig, world: World) -> Trainee:
    return Trainee(load_causal_lm(config.model), load_tokenizer(config.model), config, world)


def _documents(case: Case) -> sft.Case:
    return sft.Case(preset=case.preset, rows=case.passes, row_length=case.tokens, mean=case.document, equal=True)


def of_grpo(folder: Path, case: Case) -> Measured:
    """The second update on a rollout whose groups fill a pass each."""
    policy = update.make_policy(folder, case.tokens)
    policy.config = replace(policy.config, precision="bf16" if case.bf16 else "fp32")
    policy.world.precision = policy.config.precision
    optimizer = Updates(policy)
    groups = update.make_groups(policy, _rollout(case))
    work = partial(update.update, policy, groups, optimizer)
    work()
    return measure(policy.model, [optimizer.adamw], work)


def _rollout(case: Case) -> update.Case:
    """A completion's last token is not fed to the model."""
    length = (case.tokens - case.prompt) // update.G + 1
    return update.Case(preset=case.preset, groups=case.passes, prompt=case.prompt, mean=length, longest=length)


# --- planned ----------------------------------------------------------------------------------------------------------


def planned(case: Case) -> list[Line]:
    """The plan's lines of that step."""
    if case.recipe == "sft":
        predicted = case.tokens - case.tokens // case.document * (case.document // 4)
    else:
        predicted = update.G * _rollout(case).mean
    work = Work(
        tokens=case.tokens,
        predicted=predicted,
        passes=case.passes,
        summed=case.recipe == "sft",
        kernels=Kernels(bf16=case.bf16, cuda=False),
        checkpointing=case.checkpointing,
        mtp=case.mtp,
    )
    return training(
        count(preset(case.preset, num_nextn_predict_layers=int(case.mtp))),
        work,
        Layout(gpus=case.ranks, sharded=case.ranks > 1, launched=True),
    )


def compare(case: Case, measured: Measured) -> Iterator[tuple[str, float, float]]:
    """(what, planned, measured): each state, each phase."""
    lines = planned(case)
    states = {line.name: line.bytes["step"] for line in lines if line.name in measured.states}
    yield from ((name, states[name], measured.states[name]) for name in states)
    yield from ((phase, total(lines, phase), measured.phases[phase]) for phase in TRAINING)


def serve(turns: Turns, folder: Path, case: Case) -> None:
    """Measures once."""
    turns.answer({"case": str(case)})
    for _ in turns:
        turns.answer((of_sft if case.recipe == "sft" else of_grpo)(folder, case))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(setting(1, "torch"), end="\n\n", flush=True)
    rows, wrong = [], False
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = make_checkpoint(Path(folder) / "model", case.preset, num_nextn_predict_layers=int(case.mtp))
            contestant = Contestant(str(case), serve, checkpoint, case, threads=1)
            for what, plan, truth in compare(case, contestant.turn("measure")):
                wrong |= abs(plan / truth - 1) > TOLERANCE
                rows.append([str(case), what, f"{plan / 2**20:.1f}", f"{truth / 2**20:.1f}", f"{plan / truth:.3f}"])
            contestant.close()
    print(table(HEADER, rows))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
