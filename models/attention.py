"""Attention within shifted windows, as a module that takes a token map and gives one back.

Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `N` tokens in a window, `nH` heads, `d` head width.
"""

import torch
from torch import Tensor, nn

from models.ops import window_attention
from models.window import ShiftedWindows, relative_position_index


class WindowAttention(nn.Module):
    """W-MSA, or SW-MSA where shifted, with a learnt bias for each relative position (section 3.2, equation 4).

    Args:
        dim: C.
        num_heads: nH, a divisor of C.
        map_size: (H, W) of the maps to expect.
        window: side of a window, in tokens; shrinks to the map where that is smaller.
        shifted: whether the windows are displaced by half their side.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor of the products of queries and keys; None for d^-0.5.
        attn_drop: dropout of the attention weights.
        proj_drop: dropout of the output.
        impl: how it is computed, see `models.ops.window_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        window: int,
        shifted: bool,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        impl: str = "auto",
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.attn_drop = attn_drop
        self.impl = impl
        self.windows = ShiftedWindows(map_size, window, shifted)
        window = self.windows.window  # shrunk, perhaps
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def relative_position_bias(self) -> Tensor:
        """(nH, N, N), read from the table."""
        index = self.relative_position_index
        bias = self.relative_position_bias_table[index.flatten()].unflatten(0, index.shape)  # (N, N, nH)
        return bias.permute(2, 0, 1).contiguous()  # every window reads it: once in order here, not each time

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        height, width = x.shape[1:3]
        windows, mask = self.windows.split(x)  # (B, nW, N, C)
        qkv = self.qkv(windows).unflatten(-1, (3, self.num_heads, -1))  # (B, nW, N, 3, nH, d)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, nW, nH, N, d) each
        dropout_p = self.attn_drop if self.training else 0.0
        out = window_attention(q, k, v, self.relative_position_bias(), mask, self.scale, dropout_p, self.impl)
        out = self.proj_drop(self.proj(out.transpose(2, 3).flatten(3)))  # (B, nW, N, C)
        return self.windows.join(out, height, width)
