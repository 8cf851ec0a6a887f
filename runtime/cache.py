"""Where made things are kept between runs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME or ~/.cache, in a folder of our own."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "r1-post-training"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
