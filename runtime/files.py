"""Content to a file that is either the old one or the new one, whatever happens in between.

A full or failing disk becomes a DiskError that names the file. Leaves out folders of files: runtime/checkpoint.py.
"""

import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from runtime.errors import DiskError, disk_fault
from runtime.failpoints import failpoint


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, if they aren't there, so that they survive a power cut."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync(made.parent)


def write_all(file: FileIO, content: bytes) -> None:
    """Write every byte to an unbuffered file: one write() may take fewer."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace what `path` holds (text as UTF-8) in one step."""
    with replacing(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The path of a file beside `path` for the block to write: then fsynced, renamed over it, the folder fsynced.

    An error in the block leaves `path` as it was and nothing beside it.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with writing(path):
            yield aside
            failpoint("file/before-fsync")
            fsync(aside)
            failpoint("file/before-rename")
            aside.replace(path)
            failpoint("file/before-fsync-folder")
            fsync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a full or failing disk raises in the block, from Python, Rust or Arrow, into a DiskError for `path`."""
    try:
        yield
    except DiskError:
        raise  # an inner block knew better which file
    except Exception as error:
        if (number := disk_fault(error)) is None:
            raise
        raise DiskError(number, os.strerror(number), str(path)) from error
