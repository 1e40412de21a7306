"""Random draws as pure functions of counters: nothing about randomness ever has to be saved or restored."""

import hashlib
import random

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed that depends on all `parts` and on nothing else (not on process, platform or Python's hash seed).

    Unlike adding or multiplying counters, hashing them gives unrelated seeds for neighbouring (seed, epoch, index).
    """
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def seed_cpu(seed: int) -> None:
    """Seeds the generators that timm's and torchvision's transforms draw from: random's, numpy's, torch's CPU one."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_device(seed: int, device: torch.device) -> None:
    """Seeds what dropout and DropPath draw from on `device`. Queues no work on a GPU: it may be called every step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
