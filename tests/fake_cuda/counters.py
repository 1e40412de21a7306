"""Counts launches and synchronisations in a process that runs on the stand-in. Import it there only."""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tests.fake_cuda.build import RUNTIME


class Counts(NamedTuple):
    """What the device was asked for: kernels, matrix products and collectives; and times that the host waited."""

    launches: int
    syncs: int


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(os.path.join(os.environ["FAKE_CUDA"], RUNTIME))
    library.fake_launches.restype = library.fake_syncs.restype = ctypes.c_long
    return library


def count(step: Callable[[], object], by_name: Path | None = None) -> Counts:
    """Runs `step` and counts.

    Args:
        by_name: a file that gets a line for each kernel: how often, its name.
    """
    library = _library()
    library.fake_trace(1 if by_name else 0)
    library.fake_reset()
    step()
    counts = Counts(library.fake_launches(), library.fake_syncs())
    if by_name:
        library.fake_dump(str(by_name).encode())
        library.fake_trace(0)
    return counts


def forbid_syncs(step: Callable[[], object]) -> None:
    """Runs `step`. PyTorch raises where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
