"""A disk of a few hundred kilobytes, for what happens when it is full or can't be written."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path, mounts: None) -> Callable[..., list[str]]:
    """Run Python code with such a disk's folder as its argument; the lines it prints. `options` are mount's."""

    def run(code: str, options: str = "size=256k") -> list[str]:
        folder = tmp_path / "disk"
        folder.mkdir()
        mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o "$1" none "$2" && shift 2 && exec "$@"', "sh"]
        command = [*mount, options, str(folder), sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run
