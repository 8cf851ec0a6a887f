"""Content to a file that is either the old one or the new one, whatever happens in between."""

import os
from pathlib import Path

from runtime.failpoints import failpoint


def fsync(path: Path) -> None:
    """Make a file's bytes, or a directory's entries, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, content: str | bytes) -> None:
    """Replace what `path` holds (text as UTF-8) in one step: write aside, fsync, rename, fsync the folder."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    fsync(aside)
    failpoint("file/before-rename")
    aside.replace(path)
    fsync(path.parent)
