"""Folders that several parts of the project use."""

import os
from pathlib import Path

REPO_ROOT = Path(__file__).resolve().parent.parent


def user_cache_dir() -> Path:
    """The project's folder in the user's cache: $XDG_CACHE_HOME/swin, or ~/.cache/swin."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "swin"
