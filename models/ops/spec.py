"""What an implementation of window attention has to know to say whether it can do it."""

from typing import NamedTuple

import torch


class AttentionSpec(NamedTuple):
    """One use of the operation, apart from the size of the map.

    Args:
        device: type of the device: "cpu", "cuda", …
        dtype: of queries, keys and values.
        window: side of a window, in tokens.
        width: of a head.
        cosine: whether scores are cosines (Swin V2).
        gradients: whether a backward pass may follow.
        dropout: whether attention weights are dropped.
        cyclic: whether windows are cut by a cyclic shift alone, see `models.ops.window.ShiftedWindows`.
    """

    device: str
    dtype: torch.dtype
    window: int
    width: int
    cosine: bool
    gradients: bool
    dropout: bool
    cyclic: bool
