"""A folder of files to a checkpoint that is whole or absent, and back to the newest whole one.

A checkpoint is written aside, fsynced, described by `manifest.json` (size and SHA-256 of every file, plus the
caller's `info`), renamed into place, and its parent fsynced. SIGKILL at any point leaves the old one or the
new one. Leaves out what goes into it; runtime/state.py writes tensors and random state without pickle.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError
from runtime.failpoints import failpoint
from runtime.files import fsync
from runtime.state import load_state, rng_state, save_state, set_rng_state

__all__ = [
    "CheckpointError",
    "latest_checkpoint",
    "load_state",
    "prune_checkpoints",
    "rng_state",
    "save_checkpoint",
    "save_state",
    "set_rng_state",
    "verify_checkpoint",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# What a save that died leaves behind: <name>.tmp-<pid> (half-written), <name>.old-<pid> (being replaced).
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
STEP = re.compile(r"step-(\d+)")

_writing: set[Path] = set()  # folders this process is writing now; a restarted container reuses its old pid


def save_checkpoint(
    checkpoints_dir: str | Path, name: str, write: Callable[[Path], None], *, info: Mapping[str, Any]
) -> Path:
    """Call `write` on a folder aside, then make it `<checkpoints_dir>/<name>` in one step; return that path.

    `info` (JSON values: step, seeds, hashes, versions) comes back from `verify_checkpoint`. An existing
    checkpoint of that name is replaced once the new one is on disk; an error in `write` leaves it as it was.
    """
    parent = Path(checkpoints_dir)
    parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(parent)
    final, aside, old = (parent / f"{name}{end}" for end in ("", f".tmp-{os.getpid()}", f".old-{os.getpid()}"))
    ours = {aside.resolve(), old.resolve()}
    _writing.update(ours)
    try:
        aside.mkdir()
        write(aside)
        failpoint("checkpoint/after-write")
        files = _files(aside)
        for path in files:
            fsync(path)
        failpoint("checkpoint/after-fsync")
        _write_manifest(aside, files, info)
        failpoint("checkpoint/after-manifest")
        for folder in sorted({aside, *(p.parent for p in files)}, reverse=True):
            fsync(folder)
        if final.exists():
            final.rename(old)  # a full folder can't be renamed over; _clear_leftovers puts it back if we die here
            failpoint("checkpoint/between-renames")
        aside.rename(final)
        failpoint("checkpoint/after-rename")
        fsync(parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    finally:
        _writing.difference_update(ours)
    return final


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read every byte of a checkpoint, compare with its manifest, and return its `info`.

    Raises CheckpointError naming the first file that is missing, short or changed. Files that are not in the
    manifest are not looked at.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    manifest = _read_manifest(path)
    files: dict[str, dict[str, Any]] = manifest["files"]
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, though {MANIFEST} lists it")
        if (size := file.stat().st_size) != expected["size"]:
            raise CheckpointError(f"{file} has {size} bytes, its manifest says {expected['size']}")
    for name, digest in zip(files, _digests([path / name for name in files]), strict=True):
        if digest != files[name]["sha256"]:
            raise CheckpointError(f"{path / name} has changed since it was saved (SHA-256 differs)")
    info: dict[str, Any] = manifest["info"]
    return info


def latest_checkpoint(checkpoints_dir: str | Path) -> Path | None:
    """The newest `step-*` that verifies; damaged newer ones are named in a warning. None if there is none.

    Call it with the run folder's lock held: it removes what saves that died left behind. When there are
    checkpoints but every one is damaged it raises CheckpointError: starting afresh is for a person to decide.
    """
    parent = Path(checkpoints_dir)
    if not parent.is_dir():
        return None
    _clear_leftovers(parent)
    steps = _steps(parent)
    for path in reversed(steps):
        if _is_whole(path, "falling back to the checkpoint before it"):
            return path
    if steps:
        names = ", ".join(p.name for p in steps)
        raise CheckpointError(f"{parent}: every checkpoint is damaged ({names}); move them away to start afresh")
    return None


def prune_checkpoints(checkpoints_dir: str | Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` `step-*` folders and return what was deleted.

    The newest one that verifies is never deleted; when none does, nothing is.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: keep at least one checkpoint")
    steps = _steps(Path(checkpoints_dir))
    surplus = steps[:-keep]
    if not surplus:
        return []
    whole = next((p for p in reversed(steps) if _is_whole(p, "keeping an older one")), None)
    if whole is None:
        return []
    deleted = [p for p in surplus if p != whole]
    for path in deleted:
        # Renamed first: half a deletion must not look like a damaged checkpoint.
        gone = path.with_name(f"{path.name}.tmp-{os.getpid()}")
        path.rename(gone)
        shutil.rmtree(gone)
    return deleted


def _steps(parent: Path) -> list[Path]:
    """`step-*` folders, oldest first."""
    found = [(int(m[1]), p) for p in parent.iterdir() if (m := STEP.fullmatch(p.name)) and p.is_dir()]
    return [p for _, p in sorted(found)]


def _is_whole(path: Path, otherwise: str) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        logger.warning("damaged checkpoint: %s; %s", error, otherwise)
        return False
    return True


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _digests(files: list[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(8) as pool:  # hashing releases the GIL, and big checkpoints have many shards
        return list(pool.map(digest, files))


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of the manifest itself, so that a flipped digit in `info` is found too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_manifest(folder: Path, files: list[Path], info: Mapping[str, Any]) -> None:
    content = {
        "files": {
            p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "sha256": digest}
            for p, digest in zip(files, _digests(files), strict=True)
        },
        "info": json.loads(json.dumps(info)),  # as it will be read: tuples become lists before the seal
    }
    path = folder / MANIFEST
    path.write_text(json.dumps({**content, "sha256": _seal(content)}, indent=1), encoding="utf-8")
    fsync(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: not a checkpoint, or not one saved here") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise CheckpointError(f"{file} is damaged ({error})") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _seal(manifest):
        raise CheckpointError(f"{file} has changed since it was saved (SHA-256 differs)")
    return manifest


def _clear_leftovers(parent: Path) -> None:
    """Undo what saves that died left behind; touches nothing of a process that lives."""
    for path in parent.iterdir():
        if not (match := LEFTOVER.fullmatch(path.name)) or not path.is_dir() or path.resolve() in _writing:
            continue
        pid = int(match["pid"])
        if pid != os.getpid() and _alive(pid):
            continue
        final = parent / match["name"]
        if match["kind"] == "old" and not final.exists():
            logger.warning("%s: put back; a save died while replacing it", final)
            path.rename(final)
        else:
            logger.info("%s: removed; left by a save that died", path)
            shutil.rmtree(path)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # someone else's process
        return True
    return True
