"""A folder of files to a checkpoint that is whole or absent, and back to the newest whole one.

A checkpoint is written aside, fsynced, described by `manifest.json` (size and SHA-256 of every file, plus the
caller's `info`), renamed into place, and its parent fsynced. SIGKILL, a full disk or a power cut at any point leaves
the old one or the new one; the file `latest` says what must be there. Leaves out what goes into a checkpoint;
runtime/state.py writes tensors and random state without pickle.
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
from runtime.files import fsync, make_folder, write_durably, writing
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
LATEST = "latest"  # name of the newest step ever saved: without it, lost checkpoints would look like none yet
# What a save that died leaves behind: <name>.tmp-<pid> (half-written), <name>.old-<pid> (being replaced).
LEFTOVER = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-(?P<pid>\d+)")
STEP = re.compile(r"step-(\d+)")

_writing: set[Path] = set()  # folders this process is writing now; a restarted container reuses its old pid


def save_checkpoint(
    checkpoints_dir: str | Path, name: str, write: Callable[[Path], None], *, info: Mapping[str, Any]
) -> Path:
    """Call `write` on a folder aside, then make it `<checkpoints_dir>/<name>` in one step; return that path.

    `info` (JSON values: step, seeds, hashes, versions) comes back from `verify_checkpoint`. An existing
    checkpoint of that name is replaced once the new one is on disk; an error in `write` leaves it as it was, and a
    full or failing disk is a DiskError.
    """
    parent = Path(checkpoints_dir)
    final, aside, old = (parent / f"{name}{end}" for end in ("", f".tmp-{os.getpid()}", f".old-{os.getpid()}"))
    ours = {aside.resolve(), old.resolve()}
    try:
        with writing(final):
            make_folder(parent)
            _clear_leftovers(parent)
            _writing.update(ours)
            aside.mkdir()
            failpoint("checkpoint/before-write")
            write(aside)
            _make_durable(aside, info)
            if final.exists():
                failpoint("checkpoint/before-set-aside")
                final.rename(old)  # a full folder can't be renamed over; _clear_leftovers puts it back if we die here
            failpoint("checkpoint/before-rename")
            aside.rename(final)
            failpoint("checkpoint/before-fsync-parent")
            fsync(parent)
            failpoint("checkpoint/before-remove-old")
            shutil.rmtree(old, ignore_errors=True)
            if STEP.fullmatch(name):
                write_durably(parent / LATEST, f"{name}\n")
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        _writing.difference_update(ours)
    return final


def verify_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read every byte of a checkpoint, compare with its manifest, and return its `info`.

    Raises CheckpointError naming the first file that is missing, short, changed or unreadable. Files that are not
    in the manifest are not looked at.
    """
    try:
        return _verify(Path(path))
    except OSError as error:  # a bad sector is damage like any other
        raise CheckpointError(f"{path} can't be read ({error})") from error


def _verify(path: Path) -> dict[str, Any]:
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
    """The newest `step-*` that verifies; damaged or lost newer ones are named in a warning. None if none was saved yet.

    Call it with the run folder's lock held, in one process: it removes what saves that died left behind. When
    checkpoints were saved but every one is damaged or gone it raises CheckpointError: starting afresh is for a person
    to decide.
    """
    parent = Path(checkpoints_dir)
    if not parent.is_dir():
        return None
    _clear_leftovers(parent, locked=True)
    steps = _steps(parent)
    saved = (parent / LATEST).read_text(errors="replace").strip() if (parent / LATEST).exists() else None
    newest = int(match[1]) if (match := STEP.fullmatch(saved or "")) else -1
    if saved and steps and newest > _step(steps[-1]):
        logger.warning("%s was saved and is gone; falling back to the checkpoint before it", parent / saved)
    for path in reversed(steps):
        if _is_whole(path, "falling back to the checkpoint before it"):
            if _step(path) > newest:  # the save that made it died before it could say so
                write_durably(parent / LATEST, f"{path.name}\n")
            return path
    if steps:
        names = ", ".join(p.name for p in steps)
        raise CheckpointError(f"{parent}: every checkpoint is damaged ({names}); to start afresh, give another run_dir")
    if saved is not None:
        raise CheckpointError(f"{parent}: {saved} is gone; put it back, or give another run_dir to start afresh")
    logger.info("%s: no checkpoint was saved yet; starting at the beginning", parent)
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
        failpoint("prune/before-rename")
        path.rename(gone)
        failpoint("prune/before-remove")
        shutil.rmtree(gone)
    return deleted


def _steps(parent: Path) -> list[Path]:
    """`step-*` folders, oldest first."""
    return sorted((p for p in parent.iterdir() if STEP.fullmatch(p.name) and p.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_whole(path: Path, otherwise: str) -> bool:
    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        logger.warning("damaged checkpoint: %s; %s", error, otherwise)
        return False
    return True


def _make_durable(folder: Path, info: Mapping[str, Any]) -> None:
    """Files, then the manifest, then every folder from the inside out: once renamed, nothing can be missing."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in files:
        failpoint("checkpoint/before-fsync-file")
        fsync(path)
    _write_manifest(folder, files, info)
    for path in [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]:
        failpoint("checkpoint/before-fsync-folder")
        fsync(path)


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
    failpoint("checkpoint/before-manifest")
    path.write_text(json.dumps({**content, "sha256": _seal(content)}, indent=1), encoding="utf-8")
    failpoint("checkpoint/before-fsync-manifest")
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


def _clear_leftovers(parent: Path, *, locked: bool = False) -> None:
    """Undo what saves that died left behind; touches nothing of a process that lives.

    locked: no other process can be saving here, so a live process of that number is another one: in the next
    container, or since a reboot.
    """
    for path in parent.iterdir():
        if not (match := LEFTOVER.fullmatch(path.name)) or not path.is_dir() or path.resolve() in _writing:
            continue
        pid = int(match["pid"])
        if not locked and pid != os.getpid() and _alive(pid):
            continue
        final = parent / match["name"]
        if match["kind"] == "old" and not final.exists():
            logger.warning("%s: put back; a save died while replacing it", final)
            failpoint("checkpoint/before-put-back")
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
