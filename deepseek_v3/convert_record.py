"""A target folder -> which conversion it is of and which of its files are done, on disk in conversion.json.

One conversion at a time writes to a folder: it holds a lock file, whose lock goes with the process, whatever ends it.
"""

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_v3.convert_shards import replacing
from deepseek_v3.convert_tensors import CheckpointFault

RECORD = "conversion.json"
LOCK = ".conversion.lock"


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Make a folder and keep other conversions out of it. Raises CheckpointFault when there is one."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / LOCK
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointFault(
                f"{target}: another conversion is writing there; wait for it, or give another folder"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Record:
    """conversion.json: which conversion a folder is of, and the SHA-256 of each file that is done."""

    def __init__(self, target: Path, what: list[Any]) -> None:
        """Of the conversion `what` that was begun in `target`, or of a new one.

        Raises CheckpointFault when the folder holds another, or anything else.
        """
        self.path = target / RECORD
        self.conversion = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self.sha256: dict[str, str] = {}
        if self.path.exists():
            try:
                begun = json.loads(self.path.read_text(encoding="utf-8"))
                conversion, self.sha256 = begun["conversion"], dict(begun["sha256"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointFault(f"{self.path} is no record of a conversion; give another folder") from error
            if conversion != self.conversion:
                raise CheckpointFault(
                    f"{target} was begun from other files or in another way; give the same, or another folder"
                )
        elif any(file.name not in (LOCK, f".{RECORD}.tmp") for file in target.iterdir()):
            raise CheckpointFault(f"{target} is not empty; give a new folder")
        else:
            self._write()

    def holds(self, name: str) -> bool:
        """Whether a file is there as it was written; reads all of it."""
        digest, file = self.sha256.get(name), self.path.with_name(name)
        return digest is not None and file.is_file() and _sha256(file) == digest

    def add(self, name: str) -> None:
        """A file is done."""
        self.sha256[name] = _sha256(self.path.with_name(name))
        self._write()

    def _write(self) -> None:
        write_json(self.path, {"conversion": self.conversion, "sha256": self.sha256})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Put JSON in the place of a file, whole or not at all."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
