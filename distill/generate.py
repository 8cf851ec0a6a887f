"""Problems in; a ledger of graded answers, and shards of those worth learning from, out: the generator of expert data.

`generate(config)` opens or goes on with a run (run.py, or ray.py on several machines). What the ledger holds is never
asked for again, so the same command ends with the same shards however often it was killed in between.
"""

import contextlib
import json
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from distill.config import DistillConfig
from distill.contamination import Benchmarks
from distill.ledger import Ledger
from distill.problems import load_problems
from distill.ray import RayRun
from distill.run import Run
from distill.shards import Export, export_run
from distill.teacher import Models
from runtime.errors import UserError
from runtime.interrupt import Interrupt
from runtime.metrics import MetricsLog
from runtime.report import write_report
from runtime.run_folder import open_run

LEDGER = "ledger.sqlite"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run came to."""

    run_dir: Path
    export: Export | None
    """The shards; None if the run was told to leave before all was answered."""
    left: int
    """Problems that are still to be answered."""
    exit_code: int
    """0, or 128 + signal when the run was told to leave and did so after saving."""


def generate(config: DistillConfig, *, named_models: Models | None = None) -> Result:
    """Run a distillation to the end, or to where a signal asks it to leave.

    named_models: makers of checkpoints that `model` may name, say {"tiny": recipes.tiny.tiny_checkpoint}.
    Raises UserError for settings, data, teachers or folders that can't be used.
    """
    run_dir = Path(config.run_dir or f"runs/distill-{datetime.now():%Y%m%d-%H%M%S}")
    settings = json.loads(json.dumps(asdict(config)))
    with contextlib.ExitStack() as stack:
        every = [field.name for field in fields(config)]  # what may change is decided with the ledger, in `begin`
        folder = stack.enter_context(open_run(run_dir, config=settings, resume=config.resume, may_change=every))
        ledger = stack.enter_context(Ledger(run_dir / LEDGER))
        begin(ledger, config)
        metrics = MetricsLog(folder.metrics_path, run_name=run_dir.name, run_dir=run_dir, config=settings)
        stack.enter_context(metrics)
        if not folder.resumed:
            metrics.log(0, {"problems": len(ledger.places()), "set_aside": sum(ledger.aside().values())})
        interrupt = stack.enter_context(Interrupt())
        parts = (config, ledger, metrics, interrupt, named_models or {})
        run = Run(*parts) if config.ray is None else RayRun(*parts)
        stack.callback(run.close)
        run.run()
        if run.left:
            write_report(run_dir, defaults=DistillConfig())
            return Result(run_dir=run_dir, export=None, left=len(run.left), exit_code=interrupt.exit_code)
        exported = export_run(ledger, run_dir, rows_per_shard=config.rows_per_shard)
        write_report(run_dir, defaults=DistillConfig())
        return Result(run_dir=run_dir, export=exported, left=0, exit_code=0)


def begin(ledger: Ledger, config: DistillConfig) -> None:
    """Read the problems into a new ledger; make sure that one with problems is gone on with as it was begun."""
    settings = json.loads(json.dumps(config.fixed()))
    held = ledger.settings()
    if not held:
        benchmarks = Benchmarks(config.benchmarks, n=config.ngram) if config.benchmarks else None
        found = load_problems(config.sources, likeness=config.near_duplicates, benchmarks=benchmarks)
        for domain in sorted({problem.domain for problem in found.kept}):
            if config.expert(domain) is None:
                raise UserError(f"experts: nobody answers domain={domain!r}; name an expert for it, or for all others")
        ledger.begin(settings, found.kept, found.aside)
        return
    if not config.resume:
        raise UserError(f"{ledger.path} holds a run; add --resume to go on with it, or give another --run_dir")
    absent = "(absent)"
    pairs = {
        name: (held.get(name, absent), settings.get(name, absent)) for name in sorted(held.keys() | settings.keys())
    }
    if changed := [f"  {name}: {was} -> {now}" for name, (was, now) in pairs.items() if was != now]:
        raise UserError(
            f"{ledger.path} was begun with other settings; give the old ones to resume, or another --run_dir:\n"
            + "\n".join(changed)
        )
    if config.retry_unknown:
        ledger.forget_unknown()
