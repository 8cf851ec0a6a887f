"""The line between "you asked for something that can't be", "the disk failed" and "the program failed"."""

import errno
import os
import re

EXIT_DISK = os.EX_IOERR
"""Exit code (74) of a command whose disk was full or failed: what was saved before is whole, --resume goes on."""

DISK_FAULTS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space in the quota",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EIO: "check the disk",
    errno.EROFS: "mount it for writing",
}
"""Errors of the disk rather than of the program, and what to do about each."""


class UserError(ValueError):
    """Bad configuration or input. A command shows it as one line, without a traceback, and exits with 2."""


class CheckpointError(UserError):
    """A checkpoint that is absent or damaged; the message names the file."""


class DiskError(OSError):
    """A disk that is full or fails under a run: one line with file, reason and remedy, and EXIT_DISK."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}; {DISK_FAULTS[self.errno or 0]}"


def disk_fault(error: Exception) -> int | None:
    """The errno of a full or failing disk behind `error`; None for anything else.

    safetensors and tokenizers raise exceptions of their own, with Rust's "(os error 28)" in the text.
    """
    if isinstance(error, OSError):
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else None
    return number if number in DISK_FAULTS else None
