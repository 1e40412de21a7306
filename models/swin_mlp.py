"""Swin-MLP, the original project's MLP with shifted windows: what differs from V1. In place of attention, each head has
one learnt matrix that mixes the tokens of a window, and windows are shifted by padding instead of rolling.

The names and the order of the parameters are those of the released checkpoints.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `N` tokens in a window, `nH` heads, `d` head width.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbone import Backbone
from models.layers import DropPath, Mlp
from models.ops.window import axis_shift, padded_length, window_partition, window_reverse


class SpatialMlp(nn.Conv1d):
    """Mixes the tokens of each window, head by head, with weights (nH·N, N, 1) and biases (nH·N,).

    A map is padded with zeros at the bottom and on the right to whole windows; where shifted, also by all but the shift
    at the top and on the left. Padded tokens are zeros like any others: nothing is masked.

    Args:
        num_heads: nH, a divisor of C.
        map_size: (H, W) of the maps to expect.
        window: side of a window, in tokens; shrinks to the map where that is smaller.
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
        top, bottom = self.margins(height)
        left, right = self.margins(width)
        x = F.pad(x, (0, 0, left, right, top, bottom))
        windows = window_partition(x, self.window).unflatten(-1, (self.num_heads, -1))  # (B, nW, N, nH, d)
        rows = windows.transpose(2, 3).flatten(2, 3)  # (B, nW, nH·N, d)
        mixed = super().forward(rows.flatten(0, 1)).view(rows.shape).unflatten(2, (self.num_heads, -1))
        windows = mixed.transpose(2, 3).flatten(3)  # (B, nW, N, C)
        x = window_reverse(windows, self.window, x.shape[1], x.shape[2])
        return x[:, top : top + height, left : left + width]

    def margins(self, length: int) -> tuple[int, int]:
        """Zeros before and after an axis of `length` tokens. As in V1, a single window is not shifted."""
        shift = axis_shift(length, self.window, self.shift)
        before = self.window - shift if shift else 0
        return before, padded_length(before + length, self.window) - before - length


class SwinMLPBlock(nn.Module):
    """Mixing of tokens, then an MLP on each, both after a LayerNorm and around a shortcut."""

    def __init__(self, dim: int, spatial_mlp: SpatialMlp, mlp_ratio: float, drop: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.spatial_mlp = spatial_mlp
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        x = self.drop_path(x, lambda x: self.spatial_mlp(self.norm1(x)), recompute)
        return self.drop_path(x, lambda x: self.mlp(self.norm2(x), recompute), recompute)


class SwinMLP(Backbone):
    """Swin-MLP.

    Args:
        drop_rate: dropout after the embedding and in the MLPs.
        All others: see `models.swin_transformer.SwinTransformer`.
    """

    def __init__(
        self,
        img_size: int = 256,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (4, 8, 16, 32),
        window_size: int = 8,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        ape: bool = False,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
    ):
        def make_block(
            stage: int, dim: int, map_size: tuple[int, int], shifted: bool, drop_path: float
        ) -> SwinMLPBlock:
            spatial_mlp = SpatialMlp(num_heads[stage], map_size, window_size, shifted)
            return SwinMLPBlock(dim, spatial_mlp, mlp_ratio, drop_rate, drop_path)

        super().__init__(
            make_block, img_size, patch_size, in_chans, num_classes, embed_dim, depths, drop_rate, drop_path_rate, ape,
            patch_norm, use_checkpoint,
        )  # fmt: skip
