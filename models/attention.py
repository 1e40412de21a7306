"""Attention within shifted windows, as a module that maps a token map to a token map.

Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `M` side of a window, `N` tokens in a window, `nH`
heads, `d` head dimension.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.ops.dispatch import window_attention
from models.ops.position_bias import GatherBias, pairs_by_offset, relative_position_index
from models.ops.reference import accumulate_dtype, attn_bias, merge_heads, partition_heads
from models.ops.window import ShiftedWindows

RELATIVE = ("bias", "none", "bias_only")


class ShiftedWindowAttention(nn.Module):
    """The common part of V1 and V2: project the map, attend within its windows, project again.

    A map that is not a multiple of the window is padded with zeros first, and its output is cropped. The projections
    act on each token alone, so only the operation between them depends on the windows, and a fast implementation need
    not move tokens to form them. A subclass defines `qkv`, `proj`, `proj_drop` and `attend`.

    Args:
        num_heads: nH.
        map_size: expected (H, W).
        window: side of a window, in tokens; shrinks to the map if that is smaller.
        shifted: whether the windows are displaced by half their side.
        attn_drop: dropout of the attention weights.
        impl: implementation, see `models.ops.dispatch.window_attention`.
    """

    qkv: nn.Linear
    proj: nn.Linear
    proj_drop: nn.Dropout
    relative_position_index: Tensor  # of those with a relative position bias

    def __init__(
        self, num_heads: int, map_size: tuple[int, int], window: int, shifted: bool, attn_drop: float, impl: str
    ):
        super().__init__()
        self.num_heads = num_heads
        self.attn_drop = attn_drop
        self.impl = impl
        self.windows = ShiftedWindows(map_size, window, shifted)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        height, width = x.shape[1:3]
        out = self.attend(self.windows.pad(x), self.attn_drop if self.training else 0.0)
        return self.proj_drop(self.proj(out[:, :height, :width]))

    def attend(self, x: Tensor, dropout_p: float) -> Tensor:
        """Computes the outputs of all heads, before the last projection: (B, H, W, C) to (B, H, W, C).

        H and W are multiples of the window.
        """
        raise NotImplementedError

    def unflatten_heads(self, projected: Tensor) -> Tensor:
        """Views P projections (B, H, W, P · C), such as queries, keys and values, as (B, H, W, P, nH, d)."""
        return projected.unflatten(-1, (-1, self.num_heads, self.proj.in_features // self.num_heads))

    def gather_relative_bias(self, table: Tensor) -> Tensor:
        """Gathers the bias (nH, N, N) of each pair of tokens from a table ((2·M-1)², nH) by their offset."""
        return GatherBias.apply(table, self.relative_position_index, self.pairs_by_offset)

    def register_offsets(self) -> None:
        """Registers the buffers that `gather_relative_bias` needs."""
        window = self.windows.window
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.register_buffer("pairs_by_offset", pairs_by_offset(window), persistent=False)


class WindowAttention(ShiftedWindowAttention):
    """W-MSA, or SW-MSA if shifted, with a learnt bias for each relative position (section 3.2, equation 4).

    Args:
        dim: C.
        num_heads: nH, a divisor of C.
        map_size, window, shifted, attn_drop, impl: see `ShiftedWindowAttention`.
        qkv_bias: whether the projections to queries, keys and values have a bias.
        qk_scale: factor of the products of queries and keys; None for d^-0.5.
        proj_drop: dropout of the output.
        relative: use of the relative position bias (the ablations of table 4). "bias": added to the scaled products of
            queries and keys. "none": no bias. "bias_only": the bias is the score, so that attention depends on
            positions and not on content, and `qkv` projects to values only.
    """

    zero_bias: Tensor

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
        relative: str = "bias",
    ):
        super().__init__(num_heads, map_size, window, shifted, attn_drop, impl)
        if relative not in RELATIVE:
            raise ValueError(f"relative is {relative!r}, not one of {', '.join(RELATIVE)}")
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.relative = relative
        window = self.windows.window  # may have shrunk to the map
        if relative == "none":
            self.register_buffer("zero_bias", torch.zeros(num_heads, window**2, window**2), persistent=False)
        else:
            self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
            nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
            self.register_offsets()
        self.qkv = nn.Linear(dim, dim if relative == "bias_only" else 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def relative_position_bias(self) -> Tensor:
        """Returns the bias (nH, N, N)."""
        if self.relative == "none":
            return self.zero_bias
        return self.gather_relative_bias(self.relative_position_bias_table)

    def attend(self, x: Tensor, dropout_p: float) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        projected, bias = self.unflatten_heads(self.qkv(x)), self.relative_position_bias()
        if self.relative == "bias_only":
            (v,), mask = partition_heads(projected, self.windows)
            scores = attn_bias(bias, mask)  # ([nW,] nH, N, N), the same for every image
            weights = scores.to(accumulate_dtype(scores.dtype)).softmax(dim=-1)
            out = F.dropout(weights.expand(*v.shape[:3], -1, -1), dropout_p).to(v.dtype) @ v
            return merge_heads(out, self.windows, *x.shape[1:3])
        return window_attention(projected, bias, self.windows, self.scale, dropout_p, self.impl)
