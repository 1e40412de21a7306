"""Window attention written out step by step. This file is the definition of right for every faster path."""

import torch
from torch import Tensor
from torch.nn import functional as F


def additive_term(bias: Tensor, mask: Tensor | None) -> Tensor:
    """What is added to the scaled products: the bias (nH, N, N), or bias and mask together (nW, nH, N, N)."""
    return bias if mask is None else bias + mask.unsqueeze(1)


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """SoftMax(q kᵀ · scale + bias + mask) v, softmax in float32 or wider. See `models.ops.window_attention`."""
    scores = (q * scale) @ k.transpose(-2, -1)  # (B, nW, nH, N, N)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + additive_term(bias, mask)
    probabilities = F.dropout(scores.softmax(dim=-1), dropout_p)
    return probabilities.to(v.dtype) @ v  # (B, nW, nH, N, d)
