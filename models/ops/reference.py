"""Window attention written out step by step: the definition that every faster implementation is compared with.

Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `M` side of a window, `N` tokens in a window, `nH`
heads, `d` head dimension.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.ops.window import ShiftedWindows

MIN_LENGTH = 1e-12  # of a query or key in cosine attention; shorter ones count as zero


def attn_bias(bias: Tensor, mask: Tensor | None) -> Tensor:
    """Adds the mask (nW, N, N), if any, to the position bias (nH, N, N): (nH, N, N) or (nW, nH, N, N)."""
    return bias if mask is None else bias + mask.unsqueeze(1)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of scores, norms and softmax: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def partition_heads(projected: Tensor, windows: ShiftedWindows) -> tuple[Tensor, Tensor | None]:
    """Cuts projections of a map, such as queries, keys and values, into windows and heads.

    Args:
        projected: (B, H, W, P, nH, d) with P projections.
        windows: how the map is cut.

    Returns:
        (P, B, nW, nH, N, d), copied once, each projection contiguous; and the mask (nW, N, N) or None.
    """
    grid, mask = windows.split(projected)  # (B, rows, columns, M, M, P, nH, d)
    return grid.permute(5, 0, 1, 2, 6, 3, 4, 7).flatten(5, 6).flatten(2, 3), mask


def merge_heads(out: Tensor, windows: ShiftedWindows, height: int, width: int) -> Tensor:
    """Merges the outputs of all heads and windows (B, nW, nH, N, d) into a map (B, H, W, C)."""
    grid = out.unflatten(3, (windows.window, -1)).transpose(2, 3).transpose(3, 4)  # (B, nW, M, M, nH, d)
    return windows.join(grid.unflatten(1, (-1, windows.columns(width))), height, width).flatten(3)


def scale_queries_and_keys(q: Tensor, k: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Scales queries and keys (..., nH, N, d) so that their products are the scores.

    With a float `scale`: q · scale and k. With a tensor (nH,): both normalized, and q times the scale of its head, so
    that the products are scaled cosines (Swin Transformer V2, section 3.3, equation 2).
    """
    if not isinstance(scale, Tensor):
        return q * scale, k
    dtype = accumulate_dtype(q.dtype)
    scaled_q = normalize(q.to(dtype)) * scale.to(dtype)[:, None, None]
    return scaled_q.to(q.dtype), normalize(k.to(dtype)).to(k.dtype)


def normalize(x: Tensor) -> Tensor:
    """Scales vectors (..., d) to length 1. A vector of zeros stays zero and has the gradient 0.

    The key of a padded token is zero. `F.normalize` would give it a gradient of 1e12, which overflows in float16.
    """
    length = x.norm(dim=-1, keepdim=True)
    return x / length.masked_fill(length < MIN_LENGTH, torch.inf)


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """Computes SoftMax(q kᵀ · scale + bias + mask) v in every window, with the softmax in float32 or float64.

    See `models.ops.dispatch.window_attention` for the arguments.
    """
    (q, k, v), mask = partition_heads(qkv, windows)  # (B, nW, nH, N, d) each
    q, k = scale_queries_and_keys(q, k, scale)
    scores = q @ k.transpose(-2, -1)  # (B, nW, nH, N, N)
    scores = scores.to(accumulate_dtype(scores.dtype)) + attn_bias(bias, mask)
    probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
    return merge_heads(probabilities.to(v.dtype) @ v, windows, *qkv.shape[1:3])
