"""What tests of several packages share."""

import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    # Started behind a shell's &, whose children would not hear the Ctrl-C that some tests send them.
    signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser, to which evil.example is this machine. Skips where there is none: it is no Python package."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium: install the system's")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags.append("--host-resolver-rules=MAP evil.example 127.0.0.1")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        yield browser
        browser.close()
