"""Random seeds as pure functions of counters, so that no generator state has to be saved or restored."""

import hashlib
import random

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """Hashes `parts` to a 63-bit seed, independent of process, platform and Python's hash seed.

    Unlike sums or products of counters, hashes of neighbouring (seed, epoch, index) are unrelated.
    """
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def seed_cpu(seed: int) -> None:
    """Seeds the generators that timm's and torchvision's transforms use: Python's, NumPy's, and torch's CPU one."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_device(seed: int, device: torch.device) -> None:
    """Seeds the generators of dropout and DropPath on `device`. Queues no work on a GPU, so every step may call it."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
