"""Window attention by PyTorch's fused scaled dot-product attention. Reference: `reference.py`.

Shapes: `B` batch, `H W` token grid, `nW` windows, `M` side of a window, `N` tokens in a window, `nH` heads, `d` head
dimension.
"""

from torch import Tensor
from torch.nn import functional as F

from models.ops.reference import attn_bias, merge_heads, scale_queries_and_keys
from models.ops.window import ShiftedWindows


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """See `models.ops.dispatch.window_attention` for the arguments.

    The fused kernels take four dimensions, so B and nW become one: (B·nW, nH, N, d). They read any strides, so the
    windows are copied once, in the layout of their tokens. The mask differs from window to window and has to be
    repeated B times.
    """
    batch, height, width = qkv.shape[:3]
    grid, mask = windows.split(qkv)  # (B, rows, columns, M, M, 3, nH, d)
    q, k, v = grid.flatten(3, 4).flatten(0, 2).permute(2, 0, 3, 1, 4).unbind(0)  # (B·nW, nH, N, d) each
    attn_mask = attn_bias(bias, mask).to(qkv.dtype)
    if mask is None:
        attn_mask = attn_mask.unsqueeze(0)  # (1, nH, N, N)
    else:
        attn_mask = attn_mask.expand(batch, *attn_mask.shape).flatten(0, 1)  # (B·nW, nH, N, N)
    if isinstance(scale, Tensor):
        q, k = scale_queries_and_keys(q, k, scale)
        scale = 1.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, scale=scale)
    return merge_heads(out.unflatten(0, (batch, -1)), windows, height, width)
