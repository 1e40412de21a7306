"""Folders that several parts of the project use."""

import os
from pathlib import Path

from utils.errors import UserError

REPO_ROOT = Path(__file__).resolve().parent.parent


def expand_user(path: str, name: str) -> str:
    """Replaces a leading `~` or `~user` of `path` by that user's home folder. Other texts, such as URLs, are unchanged.

    Args:
        name: the key or flag that gave the path, for the message.

    Raises:
        UserError: there is no such user, or the present one has no home folder.
    """
    if not path.startswith("~"):
        return path
    user = path[1:].split("/", 1)[0]
    try:
        expanded = os.path.expanduser(path)
    except ValueError:  # the name holds a character that no user name can
        expanded = path
    if expanded.startswith("~"):
        reason = f"there is no user {user!r}" if user else "the present user has no home folder, and HOME is not set"
        raise UserError(f"{name} {path}: {reason}. Give the path in full, or ./{path} for a name that begins with ~.")
    return expanded


def user_cache_dir() -> Path | None:
    """The project's folder in the user's cache: $XDG_CACHE_HOME/swin, or ~/.cache/swin.

    None for a user without a home folder, as in a container that runs under any user id: nothing is cached then.
    """
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if folder.startswith("~") else Path(folder) / "swin"
