"""Describes one use of window attention, so that an implementation can tell whether it supports it."""

from collections.abc import Collection
from typing import NamedTuple

import torch


class AttentionSpec(NamedTuple):
    """One use of the operation, apart from the size of the map.

    Args:
        device: device type: "cpu", "cuda", …
        dtype: dtype of queries, keys and values.
        window: side of a window, in tokens.
        head_dim: d, channels of one head.
        cosine: whether scores are cosines (Swin V2).
        gradients: whether a backward pass may follow.
        dropout: whether attention weights are dropped.
        cyclic: whether windows are cut by a cyclic shift alone, see `models.ops.window.ShiftedWindows`.
    """

    device: str
    dtype: torch.dtype
    window: int
    head_dim: int
    cosine: bool
    gradients: bool
    dropout: bool
    cyclic: bool


def unsupported_by_fused_kernel(spec: AttentionSpec, dtypes: Collection[torch.dtype], max_tokens: int) -> str:
    """Returns why a fused kernel with these limits does not support `spec`; empty if it does.

    The limits that the Triton kernels and the native code have in common.
    """
    if spec.dtype not in dtypes:
        return f"it has no {spec.dtype}"
    if spec.window**2 > max_tokens:
        return f"a window has {spec.window**2} tokens, more than {max_tokens}"
    if spec.dropout:
        return "it has no dropout of attention weights (MODEL.ATTN_DROP_RATE)"
    if not spec.cyclic:
        return "windows are not cut by a cyclic shift"
    return ""
