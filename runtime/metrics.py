"""Numbers of a step to one line of `metrics.jsonl`, and to the trackers named in `report_to`.

The file is the record; trackers are copies, and one that fails is left behind with a warning. Names are the
caller's (TRL's, by convention). Only one process of a run (rank 0) makes a log. A line survives a kill at once, a
power cut from `sync` on; a full or failing disk is a DiskError.
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runtime.errors import UserError
from runtime.failpoints import failpoint
from runtime.files import fsync, make_folder, write_all, write_durably, writing
from runtime.run_folder import flatten

logger = logging.getLogger(__name__)

TRACKERS = ("tensorboard", "trackio", "wandb")


class MetricsLog:
    """Appends to `path`; a last line torn by a kill is cut off when the log is opened, which a warning says.

    `run_name` and `config` (plain nested values) are what trackers show; their files go under `run_dir`.
    Raises UserError for a tracker that is unknown or not installed.
    """

    def __init__(
        self,
        path: str | Path,
        report_to: Sequence[str] = (),
        *,
        run_name: str,
        run_dir: str | Path,
        config: Mapping[str, Any],
    ) -> None:
        for name in report_to:
            if name not in TRACKERS:
                raise UserError(f"report_to={name!r}: known trackers are {', '.join(TRACKERS)}")
            if importlib.util.find_spec(name) is None:
                raise UserError(f"report_to={name!r} is not installed; run: pip install -e '.[track]'")
        self.path = Path(path)
        self._waiting = list(dict.fromkeys(report_to))  # started at the first line: only then is its step known
        self._trackers: dict[str, Any] = {}
        self._run_name, self._run_dir, self._config = run_name, Path(run_dir), flatten(config)
        with writing(self.path):
            make_folder(self.path.parent)
            _cut_torn_tail(self.path)
            self._file = self._open()
            fsync(self.path.parent)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append {"step": step, **metrics}; NaN and infinity are written as null. No buffer holds it back."""
        line = {"step": step, **{k: _jsonable(v) for k, v in metrics.items()}}
        with writing(self.path):
            write_all(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
        failpoint("metrics/after-line")
        for name in self._waiting:
            self._try(name, lambda name=name: self._start(name, step))
        self._waiting = []
        for name, tracker in list(self._trackers.items()):
            numbers = {k: v for k, v in line.items() if k != "step" and isinstance(v, (int, float))}
            self._try(name, lambda t=tracker, n=numbers: t.log(n, step=step))

    def sync(self) -> None:
        """Make the lines so far survive a power cut: before a checkpoint after which no resume writes them again."""
        failpoint("metrics/before-fsync")
        with writing(self.path):
            os.fsync(self._file.fileno())

    def truncate_after(self, step: int, *, with_key: str | None = None) -> int:
        """Drop the lines of steps after `step`, which a resumed run will write again; return how many.

        with_key: lines of `step` itself that have this key go too, as they were written after its checkpoint.
        """
        self._file.close()
        kept, dropped = [], 0
        for text, line in _lines(self.path):
            at = -1 if line is None else line.get("step", -1)
            if at > step or (line is not None and at == step and with_key in line):
                dropped += 1
            else:
                kept.append(text)
        if dropped:
            write_durably(self.path, b"".join(kept))
            logger.info("%s: dropped %d lines after step %d, to be written again", self.path, dropped, step)
        self._file = self._open()
        return dropped

    def close(self) -> None:
        """Close the file and finish the trackers."""
        self._file.close()
        for name, tracker in list(self._trackers.items()):
            self._try(name, tracker.finish)
        self._trackers = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _open(self) -> FileIO:
        # Unbuffered: a line the disk refused must not be written again when the file is closed.
        return self.path.open("ab", buffering=0)

    def _start(self, name: str, step: int) -> None:
        tracker = _tracker(name, step, run_name=self._run_name, run_dir=self._run_dir, config=self._config)
        tracker.start()
        self._trackers[name] = tracker

    def _try(self, name: str, call: Any) -> None:
        try:
            call()
        # A tracker is other people's code, disks and networks; the run goes on without it.
        except Exception as error:
            self._trackers.pop(name, None)
            logger.warning("report_to: %s failed and is off for the rest of this run: %s", name, error)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file, in order; damaged ones are named in a warning."""
    return [line for _, line in _lines(Path(path)) if line is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """(bytes with the newline, parsed) per line; parsed is None for a damaged one."""
    with path.open("rb") as f:
        for number, text in enumerate(f, start=1):
            line = _parse(text)
            if line is None:
                logger.warning("%s:%d is damaged; left as it is", path, number)
            yield text, line


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except ValueError:  # not JSON, or not UTF-8
        return None
    return line if isinstance(line, dict) else None


def _cut_torn_tail(path: Path) -> None:
    if not path.exists():
        return
    data = path.read_bytes()
    if not data or data.endswith(b"\n"):
        return
    end = data.rfind(b"\n") + 1
    logger.warning("%s: cut off a torn last line (%d bytes)", path, len(data) - end)
    os.truncate(path, end)


def _jsonable(value: Any) -> Any:
    if hasattr(value, "item"):  # a 0-d tensor or a NumPy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {k: _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    return value


def _tracker(name: str, step: int, *, run_name: str, run_dir: Path, config: dict[str, Any]) -> Any:
    """One of accelerate's trackers, writing under `run_dir`; an earlier attempt got to `step` at most."""
    from accelerate import PartialState, tracking

    PartialState()  # the trackers ask it which process is the main one; a no-op where training has made it
    project = os.environ.get(f"{name.upper()}_PROJECT", "post-training")
    if name == "tensorboard":
        # purge_step hides what an earlier attempt wrote from here on.
        return tracking.TensorBoardTracker(run_name, run_dir / "tensorboard", purge_step=step)
    if name == "trackio":
        # trackio reads it once, when imported: the first run of a process decides.
        os.environ.setdefault("TRACKIO_DIR", str((run_dir / "trackio").absolute()))
        return tracking.TrackioTracker(project, name=run_name, config=config, resume="allow", embed=False)
    (run_dir / "wandb").mkdir(exist_ok=True)
    return tracking.WandBTracker(
        project,
        name=run_name,
        id=_run_id(run_dir),
        resume="allow",
        dir=str(run_dir),
        config=config,
        settings={"console": "off"},  # wandb would otherwise wrap stdout, progress bars included
    )


def _run_id(run_dir: Path) -> str:
    """The id under which every attempt of this run folder continues one wandb run."""
    path = run_dir / "wandb" / "run_id"
    if not path.exists():
        write_durably(path, os.urandom(4).hex())
    return path.read_text(encoding="utf-8")
