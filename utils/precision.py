"""Which number format the matrix products of a run use."""

import torch

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


def choose_amp_dtype(enabled: bool, name: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for plain float32.

    `auto` is bfloat16 where the device computes in it, else float16 (with loss scaling) on a GPU and float32 on a CPU.
    """
    if not enabled:
        return None
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


def describe(dtype: torch.dtype | None) -> str:
    return str(dtype or torch.float32).removeprefix("torch.")
