"""Swin-MLP, the original project's MLP with shifted windows.

The differences from V1: instead of attention, each head has one learnt matrix that mixes the tokens of a window, and
windows are shifted by padding instead of rolling. Names and order of the parameters are those of the released
checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `N` tokens in a window, `nH` heads, `d` head dimension.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone, BlockSpec
from models.layers import DropPath, Mlp
from models.ops.window import axis_shift, padded_length, window_partition, window_reverse


class SpatialMlp(nn.Conv1d):
    """Mixes the tokens of each window, head by head, with weights (nH·N, N, 1) and biases (nH·N,).

    A map is padded with zeros at the bottom and on the right to whole windows; if shifted, also by window - shift at
    the top and on the left. Padding takes part in the mixing as zeros: nothing is masked.

    Args:
        num_heads: nH, a divisor of C.
        map_size: expected (H, W).
        window: side of a window, in tokens; shrinks to the map if that is smaller.
        shifted: whether the windows are displaced by half their side.
    """

    def __init__(self, num_heads: int, map_size: tuple[int, int], window: int, shifted: bool):
        window = min(window, *map_size)
        super().__init__(num_heads * window**2, num_heads * window**2, kernel_size=1, groups=num_heads)
        self.num_heads = num_heads
        self.window = window
        self.shift = window // 2 if shifted else 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        height, width = x.shape[1:3]
        top, bottom = self.axis_padding(height)
        left, right = self.axis_padding(width)
        x = F.pad(x, (0, 0, left, right, top, bottom))
        windows = window_partition(x, self.window).unflatten(-1, (self.num_heads, -1))  # (B, nW, N, nH, d)
        rows = windows.transpose(2, 3).flatten(2, 3)  # (B, nW, nH·N, d)
        mixed = super().forward(rows.flatten(0, 1)).view(rows.shape).unflatten(2, (self.num_heads, -1))
        windows = mixed.transpose(2, 3).flatten(3)  # (B, nW, N, C)
        x = window_reverse(windows, self.window, x.shape[1], x.shape[2])
        return x[:, top : top + height, left : left + width]

    def axis_padding(self, length: int) -> tuple[int, int]:
        """Returns the padding before and after an axis of `length` tokens. As in V1, a single window is not shifted."""
        shift = axis_shift(length, self.window, self.shift)
        before = self.window - shift if shift else 0
        return before, padded_length(before + length, self.window) - before - length


class SwinMLPBlock(nn.Module):
    """Mixing of tokens, then an MLP on each token, both after a LayerNorm and with a shortcut."""

    def __init__(self, spec: BlockSpec, spatial_mlp: SpatialMlp):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.dim)
        self.spatial_mlp = spatial_mlp
        self.drop_path = DropPath(spec.drop_path_rate, spec.drop_path_skip)
        self.norm2 = nn.LayerNorm(spec.dim)
        self.mlp = Mlp(spec.dim, int(spec.dim * spec.mlp_ratio), spec.drop_rate)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.drop_path(x, lambda x: self.spatial_mlp(self.norm1(x)), recompute)
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x), recompute), recompute)


class SwinMLP(Backbone):
    """Swin-MLP.

    Args:
        img_size, num_heads, window_size, **backbone: see `models.backbone.Backbone`.
    """

    def __init__(
        self,
        *,
        img_size: int = 256,
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 8,
        **backbone: Any,
    ):
        def make_block(spec: BlockSpec) -> SwinMLPBlock:
            return SwinMLPBlock(spec, SpatialMlp(spec.num_heads, spec.map_size, spec.window_size, spec.shifted))

        super().__init__(make_block, img_size=img_size, num_heads=num_heads, window_size=window_size, **backbone)
