"""What tests of several packages share."""

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def mounts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where a process may not mount a disk of its own (no user namespaces: some containers, not Linux)."""
    folder: Path = tmp_path_factory.mktemp("mount")
    try:
        subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(folder)], check=True, capture_output=True
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user namespaces here to mount a disk in")
