"""Window attention by PyTorch's fused scaled dot-product attention. Right is what `reference.py` says."""

from torch import Tensor
from torch.nn import functional as F

from models.ops.reference import additive_term


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> Tensor:
    """Shapes: see `models.ops.window_attention`.

    The fused kernels take four dimensions, so B and nW become one, (B·nW, nH, N, d), which is a view for q, k and v as
    they come out of the projection. The mask differs from window to window and therefore has to be repeated B times.
    """
    batch, windows = q.shape[:2]
    added = additive_term(bias, mask).to(q.dtype)
    if mask is None:
        added = added.unsqueeze(0)  # (1, nH, N, N)
    else:
        added = added.expand(batch, *added.shape).flatten(0, 1)  # (B·nW, nH, N, N)
    out = F.scaled_dot_product_attention(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=added, dropout_p=dropout_p, scale=scale
    )
    return out.unflatten(0, (batch, windows))
