"""The parts of every Swin: patch embedding, patch merging, MLP, stage; and resizing what is learnt on a grid.

Shapes: `B` batch, `H W` token grid, `C` channels. Token maps are (B, H, W, C).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def init_linear(module: nn.Module) -> None:
    """Initialises a linear layer as the released models were: weights normal (0.02, cut at ±2), biases zero.

    A Conv1d of length 1, as in Swin-MLP, is a linear layer too; the Conv2d of the patch embedding keeps PyTorch's.
    """
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_grid(values: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resamples (old H · old W, C) values that lie on a grid, bicubically, to (new H · new W, C)."""
    if old == new:
        return values
    grid = values.T.reshape(1, -1, *old)  # (1, C, H, W)
    return F.interpolate(grid, size=new, mode="bicubic").flatten(2)[0].T


class PatchEmbed(nn.Module):
    """Patch partition and linear embedding (section 3.1): (B, in_chans, height, width) to (B, H, W, C).

    An image whose sides are not multiples of the patch is padded with zeros at the bottom and on the right.

    Args:
        patch_size: side of a patch, in pixels.
        in_chans: channels of the image.
        dim: C.
        norm: whether a LayerNorm follows.
    """

    def __init__(self, patch_size: int, in_chans: int, dim: int, norm: bool):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        down, right = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        if down or right:
            x = F.pad(x, (0, right, 0, down))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves the map and doubles its channels (section 3.1): (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C).

    A map with an odd side is padded with zeros at the bottom or on the right.

    Args:
        dim: C.
        norm_last: whether the LayerNorm follows the linear layer, as everywhere in V2, or precedes it.
    """

    def __init__(self, dim: int, norm_last: bool = False):
        super().__init__()
        self.norm_last = norm_last
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if norm_last else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        down, right = x.shape[1] % 2, x.shape[2] % 2
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        # The four tokens of a 2×2 square, down the columns first: that order is learnt into the weights.
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)  # (B, H/2, W/2, 4C)
        return self.norm(self.reduction(x)) if self.norm_last else self.reduction(self.norm(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class Stage(nn.Module):
    """Blocks at one resolution, then the step down to the next.

    Args:
        blocks: modules that map (B, H, W, C) to (B, H, W, C).
        downsample: module that makes the next stage's map, or None at the last stage.
        use_checkpoint: compute each block again in the backward pass instead of keeping what it computed.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None, use_checkpoint: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the map after the blocks (B, H, W, C), and what the next stage gets (the same after the last one)."""
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x, x if self.downsample is None else self.downsample(x)
