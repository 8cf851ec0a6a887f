"""Checked stages -> a folder each, and what they came to: run, killed, told to leave, gone on with.

Each stage is its recipe's own command in a process of its own, which dies with the chain's; its model is then measured
by python -m recipes.evaluate. `chain.json` holds what is finished: a stage's settings, the hashes of what it made and
of what it was made from. A stage that is left half-way goes on by its recipe's own --resume.
"""

import ctypes
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recipes.chain.config import ChainConfig, Stage, built_in_path
from recipes.chain.tiny import MAKERS
from recipes.cli import to_dict
from recipes.evaluate import EvaluateConfig
from runtime.checkpoint import verify_checkpoint
from runtime.errors import CheckpointError, UserError
from runtime.files import make_folder, write_durably
from runtime.interrupt import Interrupt
from runtime.run_folder import flatten

log = logging.getLogger(__name__)

RECORD = "chain.json"
FREE = ("run_dir", "output", "resume", "report_to", "token_cache", "workers", "checkpoint")
"""Settings of a finished stage that may change: none of them changes what it made."""
_PR_SET_PDEATHSIG = 1


class Chain:
    """A chain in its folder."""

    def __init__(self, config: ChainConfig, run_dir: Path, stages: Sequence[Stage]) -> None:
        """Takes the folder; `close` gives it back. Raises UserError where another chain has it."""
        self.config, self.run_dir, self.stages = config, run_dir, stages
        self.by_name = {stage.name: stage for stage in stages}
        make_folder(run_dir)
        self._lock = _lock(run_dir)
        self.record: dict[str, dict[str, Any]] = self._read()
        self.checked: set[str] = set()
        """Finished stages whose outputs were read in this process."""

    def close(self) -> None:
        """Let the next process in."""
        os.close(self._lock)

    def run(self) -> int:
        """Run what is to be run; the exit code: 0, that of the stage that failed, or 128 + signal."""
        wanted = self._wanted()
        # All that is kept is checked before anything is set aside or started.
        for stage in self.stages:
            if stage not in wanted and (self.config.only is None or self._is_needed(stage, wanted)):
                self.require_finished(stage)
        if self.config.from_stage or (self.config.only and not self.config.resume):
            for stage in wanted:
                self.set_aside(stage)
        for stage in wanted:
            if self.finished(stage):
                self.require_finished(stage)
        with Interrupt() as interrupt:
            for stage in wanted:
                if code := self.complete(stage, interrupt):
                    return code
        return 0

    def complete(self, stage: Stage, interrupt: Interrupt) -> int:
        """Bring a stage to its end, if it isn't there, and measure its model; the exit code."""
        number = f"stage {self.stages.index(stage) + 1} of {len(self.stages)}, {stage.name}"
        entry = self.record.setdefault(stage.name, {"recipe": stage.recipe, "seconds": 0.0})
        if not self.finished(stage):
            log.info("%s: python -m recipes.%s, in %s", number, stage.recipe, stage.folder)
            for name in stage.built_in:
                if not (path := built_in_path(self.run_dir, name)).exists():
                    MAKERS[name](path, self.config.seed)
            entry["inputs"] = self._hashes(stage.needs)
            code = self._command(stage, f"{stage.folder.name}", stage.config, entry, interrupt)
            if code:
                log.info("%s: left with exit code %d; the same command with --resume alone goes on", number, code)
                return code
            self._require_reviewed(stage)
            entry |= {"settings": settings(stage), "outputs": output_hashes(stage), "steps": _steps(stage)}
            self._write()
            self.checked.add(stage.name)
        if stage.makes_policy and self.config.evaluation is not None:
            how = to_dict(self.config.evaluation) | {"model": str(stage.outputs["model"])}
            how["output"] = str(stage.folder / "evaluation")
            if entry.get("evaluated") != how:
                log.info("%s: measuring its model", number)
                evaluation = dataclasses.replace(self.config.evaluation, model=how["model"], output=how["output"])
                if code := self._command(stage, f"{stage.folder.name}-evaluation", evaluation, None, interrupt):
                    return code
                entry["evaluation"] = json.loads((Path(how["output"]) / "evaluation.json").read_text())
                entry["evaluated"] = how
                self._write()
        return 0

    def finished(self, stage: Stage) -> bool:
        """Whether the record says so."""
        return "outputs" in self.record.get(stage.name, {})

    def require_finished(self, stage: Stage) -> None:
        """UserError unless a stage is finished, by these settings, from what its inputs are now, and whole."""
        again = f"run it again by --from {stage.name}"
        if not self.finished(stage):
            raise UserError(
                f"stage {stage.name} is not finished in {self.run_dir}; run it first: --resume alone goes on"
            )
        entry = self.record[stage.name]
        was, now = flatten(entry["settings"]), flatten(settings(stage))
        if changed := [
            f"  {name}: {was.get(name, '(absent)')} -> {now.get(name, '(absent)')}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]:
            raise UserError(
                f"stage {stage.name} was finished with other settings; give the old ones, or {again}:\n"
                + "\n".join(changed)
            )
        if entry["inputs"] != self._hashes(stage.needs):
            changed = [
                name for name, hashes in self._hashes(stage.needs).items() if entry["inputs"].get(name) != hashes
            ]
            raise UserError(f"stage {stage.name} was made from another {' and '.join(changed)}; {again}")
        if stage.name in self.checked:
            return
        try:
            found = output_hashes(stage)
        except CheckpointError as error:
            raise UserError(f"stage {stage.name}: {error}; put it back, or {again}") from error
        if found != entry["outputs"]:
            raise UserError(f"stage {stage.name}: what it made in {stage.folder} has changed; put it back, or {again}")
        self.checked.add(stage.name)

    def set_aside(self, stage: Stage) -> None:
        """Rename a stage's folder to a free NAME~N, and forget that it was run."""
        self.record.pop(stage.name, None)
        self._write()
        if stage.folder.exists():
            aside = next(path for n in range(1, 10_000) if not (path := Path(f"{stage.folder}~{n}")).exists())
            stage.folder.rename(aside)
            log.info("stage %s: what it had made is now in %s", stage.name, aside)

    def _wanted(self) -> list[Stage]:
        """Stages to bring to their end."""
        config = self.config
        exists = (self.run_dir / RECORD).exists()
        going_on = config.resume or config.from_stage is not None or config.only is not None
        if exists and not going_on:
            raise UserError(
                f"{self.run_dir} already holds a chain; add --resume to go on, --from STAGE to begin anew there, or "
                "give another --run_dir"
            )
        if config.only is not None:
            return [self.by_name[config.only]]
        if config.from_stage is not None:
            names = [stage.name for stage in self.stages]
            return list(self.stages[names.index(config.from_stage) :])
        return list(self.stages)

    @staticmethod
    def _is_needed(stage: Stage, wanted: Sequence[Stage]) -> bool:
        return any(stage.name in other.needs for other in wanted)

    def _hashes(self, names: Sequence[str]) -> dict[str, Any]:
        """What stages made, by the record."""
        return {name: self.record.get(name, {}).get("outputs") for name in names}

    def _require_reviewed(self, stage: Stage) -> None:
        """UserError where rows of a distillation wait for people: a chain doesn't train past them."""
        if stage.recipe != "distill":
            return
        manifest = json.loads((stage.folder / "shards/manifest.json").read_text())
        if waiting := sum(part["waiting"] for part in manifest["answers"]):
            raise UserError(
                f"stage {stage.name}: {waiting:,} rows wait for people: python -m distill review {stage.folder}, then "
                "the same command with --resume alone"
            )

    def _command(self, stage: Stage, name: str, config: Any, entry: dict[str, Any] | None, interrupt: Interrupt) -> int:
        """Run a stage's recipe, or evaluate its model, by NAME.yaml; the exit code. entry: counts its seconds."""
        recipe = "evaluate" if isinstance(config, EvaluateConfig) else stage.recipe
        if "resume" in {field.name for field in dataclasses.fields(config)}:
            config = dataclasses.replace(config, resume=True)  # which starts afresh where there is nothing
        elif entry is not None and stage.folder.exists():
            self.set_aside(stage)  # it can't be gone on with
            self.record[stage.name] = entry
        file = self.run_dir / f"{name}.yaml"
        write_durably(file, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
        self._write()
        began = time.monotonic()
        launch = stage.launch if entry is not None else (sys.executable,)
        code = _run([*launch, "-m", f"recipes.{recipe}", "--config", str(file)], interrupt)
        if entry is not None:
            entry["seconds"] += time.monotonic() - began
            self._write()
        return code

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.run_dir / RECORD
        if not path.exists():
            return {}
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["stages"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} can't be read ({error}); put it back, or give another --run_dir") from error

    def _write(self) -> None:
        order = {stage.name: self.record[stage.name] for stage in self.stages if stage.name in self.record}
        content = {"format": 1, "seed": self.config.seed, "stages": order}
        write_durably(self.run_dir / RECORD, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def settings(stage: Stage) -> dict[str, Any]:
    """A stage's settings that decide what it makes, as JSON holds them."""
    plain = {name: value for name, value in to_dict(stage.config).items() if name not in FREE}
    return dict(json.loads(json.dumps(plain)))


def output_hashes(stage: Stage) -> dict[str, str]:
    """Output -> SHA-256 of its manifest, or of itself, after every file was compared with the manifest.

    Raises CheckpointError naming a file that is missing or has changed.
    """
    hashes = {}
    for name, path in stage.outputs.items():
        if name == "model":
            verify_checkpoint(path)
            path = path / "manifest.json"
        elif name == "shards":
            path = path / "manifest.json"
            for file, digest in json.loads(_bytes(path))["files"].items():
                if hashlib.sha256(_bytes(path.parent / file)).hexdigest() != digest:
                    raise CheckpointError(f"{path.parent / file} has changed since it was written (SHA-256 differs)")
        hashes[name] = hashlib.sha256(_bytes(path)).hexdigest()
    return hashes


def _steps(stage: Stage) -> int | None:
    """Steps of training, by the checkpoint."""
    return verify_checkpoint(stage.outputs["model"]).get("step") if "model" in stage.outputs else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror})") from error


def _run(command: Sequence[str], interrupt: Interrupt) -> int:
    """A command to its end; a signal to leave is passed on once. The exit code, 128 + signal where one ended it."""
    if interrupt.requested:
        return interrupt.exit_code
    libc = ctypes.CDLL(None)  # loaded before the fork, after which a lock may be held for good

    def die_with_parent() -> None:
        """A stage whose chain is gone would go on unseen, and hold its folder. Only Linux can be told so."""
        if sys.platform == "linux":
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    child = subprocess.Popen(command, preexec_fn=die_with_parent)
    passed_on = False
    try:
        while (code := child.poll()) is None:
            if interrupt.signum is not None and not passed_on:
                child.send_signal(interrupt.signum)
                passed_on = True
            time.sleep(0.05)
    except BaseException:
        child.kill()
        raise
    return 128 - code if code < 0 else code


def _lock(run_dir: Path) -> int:
    """The chain's lock, held until it is closed or the process ends."""
    lock = os.open(run_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"{run_dir} is in use by another chain; wait for it, or give another --run_dir") from error
    return lock
