"""Window attention by PyTorch's fused scaled dot-product attention. Right is what `reference.py` says."""

from torch import Tensor
from torch.nn import functional as F

from models.ops.reference import attn_bias, merge_heads, scaled_queries_and_keys
from models.ops.window import ShiftedWindows


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """Shapes: see `models.ops.dispatch.window_attention`.

    The fused kernels take four dimensions, so B and nW become one, (B·nW, nH, N, d), of which they read any layout:
    the windows are copied once, as the tokens lie in them. The mask differs from window to window and therefore has to
    be repeated B times.
    """
    batch, height, width = qkv.shape[:3]
    grid, mask = windows.split(qkv)  # (B, rows, columns, M, M, 3, nH, d)
    q, k, v = grid.flatten(3, 4).flatten(0, 2).permute(2, 0, 3, 1, 4).unbind(0)  # (B·nW, nH, N, d) each
    added = attn_bias(bias, mask).to(qkv.dtype)
    if mask is None:
        added = added.unsqueeze(0)  # (1, nH, N, N)
    else:
        added = added.expand(batch, *added.shape).flatten(0, 1)  # (B·nW, nH, N, N)
    if isinstance(scale, Tensor):
        q, k = scaled_queries_and_keys(q, k, scale)
        scale = 1.0
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=added, dropout_p=dropout_p, scale=scale)
    return merge_heads(out.unflatten(0, (batch, -1)), windows, height, width)
