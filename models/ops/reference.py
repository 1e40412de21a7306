"""Window attention written out step by step. This file is the definition of right for every faster path."""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.ops.window import ShiftedWindows


def attn_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the scaled products: the bias (nH, N, N), or bias and mask together (nW, nH, N, N)."""
    return bias if mask is None else bias + mask.unsqueeze(1)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of scores, norms and softmax: float32, or float64 where the input is."""
    return torch.promote_types(dtype, torch.float32)


def partition_heads(parts: Tensor, windows: ShiftedWindows) -> tuple[Tensor, Tensor | None]:
    """Cuts a map of parts, such as queries, keys and values, into windows and heads.

    Args:
        parts: (B, H, W, parts, nH, d).
        windows: how the map is cut.

    Returns:
        (parts, B, nW, nH, N, d), of which every part is contiguous, copied once; and the mask (nW, N, N) or None.
    """
    grid, mask = windows.split(parts)  # (B, rows, columns, M, M, parts, nH, d)
    return grid.permute(5, 0, 1, 2, 6, 3, 4, 7).flatten(5, 6).flatten(2, 3), mask


def merge_heads(out: Tensor, windows: ShiftedWindows, height: int, width: int) -> Tensor:
    """What every head of every window says, (B, nW, nH, N, d), as a map (B, H, W, C)."""
    grid = out.unflatten(3, (windows.window, -1)).transpose(2, 3).transpose(3, 4)  # (B, nW, M, M, nH, d)
    return windows.join(grid.unflatten(1, (-1, windows.columns(width))), height, width).flatten(3)


def scaled_queries_and_keys(q: Tensor, k: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products are the scores: q · scale and k; or, where `scale` is a tensor (nH,), one factor
    for each head, the cosines of their angles times it (Swin Transformer V2, section 3.3, equation 2).
    """
    if not isinstance(scale, Tensor):
        return q * scale, k
    lengths = F.normalize(q.to(accumulate_dtype(q.dtype)), dim=-1) * scale.to(accumulate_dtype(q.dtype))[:, None, None]
    return lengths.to(q.dtype), F.normalize(k.to(accumulate_dtype(k.dtype)), dim=-1).to(k.dtype)


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """SoftMax(q kᵀ · scale + bias + mask) v in every window, softmax in float32 or wider. See
    `models.ops.dispatch.window_attention`.
    """
    (q, k, v), mask = partition_heads(qkv, windows)  # (B, nW, nH, N, d) each
    q, k = scaled_queries_and_keys(q, k, scale)
    scores = q @ k.transpose(-2, -1)  # (B, nW, nH, N, N)
    scores = scores.to(accumulate_dtype(scores.dtype)) + attn_bias(bias, mask)
    probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
    return merge_heads(probabilities.to(v.dtype) @ v, windows, *qkv.shape[1:3])
