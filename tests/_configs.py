"""Helpers shared by the tests of the configuration."""

from collections.abc import Callable
from pathlib import Path

import pytest

from config import get_config
from utils.errors import UserError


def writer(folder: Path) -> Callable[..., Path]:
    """Returns a function that writes a text into a file of `folder` and returns its path."""

    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(*args, **kwargs) -> str:
    """Returns the message with which get_config refuses these arguments."""
    with pytest.raises(UserError) as caught:
        get_config(*args, **kwargs)
    return str(caught.value)
