"""What benchmarks share: contestants that take turns, the workload, the peer at its fastest, and rows for RESULTS.md.

Every contestant lives in a process of its own: vLLM changes threads and patches torch in the process it is in, and
what one leaves in memory pools and caches must not serve another. They never run at the same time.
"""

import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from deepseek_v3 import DeepseekV3ForCausalLM, preset
from runtime.environment import keep_freed_memory

STD = 0.08
"""Of the random weights: at the usual 0.02 every next token is about as likely and faults would hide (parity gates)."""

TRL_AT_ITS_BEST: dict[str, Any] = dict(
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,  # on by default, and a forward pass more
    num_iterations=1,
    beta=0.0,
    loss_type="grpo",
    router_aux_loss_coef=0.0,
    shuffle_dataset=False,
    dataloader_pin_memory=False,
    logging_strategy="no",
    save_strategy="no",
    report_to=[],
    disable_tqdm=True,
)
"""Of TRL's `GRPOConfig`: on-policy GRPO in fp32 on a CPU, and nothing that only costs time."""


class Turns:
    """A contestant's end of the pipe: iterate for requests, answer each."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def __iter__(self) -> Iterator[Any]:
        with contextlib.suppress(EOFError):  # the parent is gone
            while (request := self._pipe.recv()) is not None:
                yield request

    def answer(self, value: Any) -> None:
        self._pipe.send(value)


class Contestant:
    """`main(turns, *args)` in its own process; its first answer, before any request, says that it is ready."""

    def __init__(self, name: str, main: Callable[..., None], *args: Any, threads: int) -> None:
        self.name = name
        os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the child's OpenMP when torch loads it
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads, main, args), name=name)
        self._process.start()
        theirs.close()
        self.ready: dict[str, Any] = self._receive()
        print(f"{name}: {self.ready}", file=sys.stderr, flush=True)

    def turn(self, request: Any) -> Any:
        """Let it work, alone, and wait for its answer."""
        self._pipe.send(request)
        return self._receive()

    def close(self) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join(60)
        self._process.kill()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name} died; its error is above") from None


def _serve(pipe: Any, threads: int, main: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()  # as our recipes do; peers gain by it, too
    main(Turns(pipe), *args)


def make_checkpoint(folder: Path, size: str, **overrides: Any) -> Path:
    """A preset, with config fields overridden, of random weights, and the tiny run's tokenizer."""
    from recipes.tiny import make_tokenizer  # here, so that gpu.py's FP8 part needs no recipes

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = preset(
        size,
        initializer_range=STD,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **overrides,
    )
    model = DeepseekV3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fastest_peer(folder: Path, work: Callable[[Any], object], *, rounds: int = 3) -> tuple[Any, str]:
    """transformers' own DeepSeek-V3 with whichever attention and experts do `work` fastest here, and their names.

    Its other choices lose everywhere they were tried on a CPU: static caches and batched_mm take 1.2 to 2 times as
    long, and continuous batching (`generate_batch`) fails on V3's head sizes.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    best: dict[str, tuple[float, Any]] = {}
    choices = list(itertools.product(("sdpa", "eager"), ("grouped_mm", "eager")))
    for _ in range(rounds):
        for attention, experts in choices:
            model = transformers.DeepseekV3ForCausalLM.from_pretrained(
                folder, attn_implementation=attention, experts_implementation=experts, dtype=torch.float32
            )
            seconds, _ = timed(partial(work, model))
            name = f"{attention} attention, {experts} experts"
            if name not in best or seconds < best[name][0]:
                best[name] = seconds, model
    name = min(best, key=lambda name: best[name][0])
    return best[name][1], name


@contextlib.contextmanager
def open_loop(config: Any) -> Iterator[tuple[Any, Any]]:
    """Our own loop on `config` (a GRPOConfig with a local `model` and a `run_dir`), not yet synced, and its tracker."""
    from rich.console import Console

    from rl.score import Scorer
    from rl.train import Run
    from runtime.distributed import World
    from runtime.interrupt import Interrupt
    from runtime.progress import StepTracker
    from runtime.run_folder import open_run
    from runtime.watchdog import Watchdog

    with (
        Interrupt() as interrupt,
        open_run(Path(config.run_dir), config=dataclasses.asdict(config), resume=False) as folder,
        Scorer(config.rewards) as scorer,
    ):
        watchdog = Watchdog(folder.path, 0)
        model = Path(config.model)
        run = Run(config, World(), folder, scorer, scorer, interrupt, watchdog, model=model, checkpoint=None)
        yield run, StepTracker(config.steps, "benchmark", console=Console(file=io.StringIO()))
        run.close()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of wall clock, and what came of it."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def alternate(contestants: Sequence[Contestant], rounds: int) -> Iterator[tuple[int, Contestant]]:
    """A B C, B C A, C A B, ...: nobody always follows the same neighbour."""
    for r in range(rounds):
        shift = r % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            yield r, contestant


def spread(values: Sequence[float], form: str) -> str:
    """Median (lowest to highest)."""
    low, middle, high = (format(f(values), form) for f in (min, statistics.median, max))
    return f"{middle} ({low} to {high})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """How many times `theirs` takes, round by round: what slows a whole round cancels."""
    return spread([b / a for a, b in zip(ours, theirs, strict=True)], ".2f") + "×"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def setting(threads: int, *libraries: str) -> str:
    """Hardware, load, calibration, commit, command and versions, as RESULTS.md has them."""
    mm, copy, dispatch = calibrate()
    installed = {d.name: d.version for d in metadata.distributions()}
    versions = ", ".join(f"{name} {installed[name]}" for name in libraries if name in installed)
    command = f"python -m {Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    return (
        f"{_cpu()}; {threads} thread{'s' * (threads > 1)}; load {os.getloadavg()[0]:.1f} at the start "
        f"(fp32 matmul {mm:.0f} GFLOP/s, copy {copy:.1f} GB/s, dispatch {dispatch:.1f} µs)  \n"
        f"commit {_commit()}; {versions}; `{command}`"
    )


def calibrate() -> tuple[float, float, float]:
    """This machine now: GFLOP/s of a 1024³ fp32 matmul, GB/s of a 64 MiB copy, µs of a tiny addition."""
    square, long, one = torch.rand(1024, 1024), torch.rand(1 << 24), torch.rand(1)

    def best(work: Callable[[], object], repeats: int) -> float:
        return min(timed(work)[0] for _ in range(repeats))

    def additions() -> None:
        for _ in range(1000):
            one.add(one)

    other = torch.empty_like(long)
    matmul = best(lambda: torch.mm(square, square), 10)
    return 2 * 1024**3 / matmul / 1e9, 2 * 2**26 / best(lambda: other.copy_(long), 5) / 1e9, best(additions, 5) * 1e3


def _cpu() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split(":", 1) for line in info.replace("\t", "").splitlines() if ":" in line)
    has = set(fields.get("flags", "").split())
    matrix = [name for flag, name in (("avx512f", "AVX-512"), ("amx_tile", "AMX")) if flag in has]
    name, units = fields.get("model name", "CPU").strip(), " and ".join(matrix) or "no AVX-512 or AMX"
    return f"{name}, {os.cpu_count()} cores, {units}"


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=False).stdout.strip()

    changed = "+changes" if git("status", "--porcelain") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'}{changed}"
