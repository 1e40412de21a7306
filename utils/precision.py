"""The number format that matrix products of a run use."""

import torch

from utils.compat import cpu_has_bf16

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


def choose_amp_dtype(enabled: bool, name: str, device: torch.device) -> torch.dtype | None:
    """Returns the autocast dtype, or None for plain float32.

    `auto` is bfloat16 where the device computes in it, else float16 (with loss scaling) on a GPU and float32 on a CPU.
    """
    if not enabled:
        return None
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else None


def describe(dtype: torch.dtype | None) -> str:
    """The name of an autocast dtype, such as "bfloat16"."""
    return str(dtype or torch.float32).removeprefix("torch.")
