"""The layers that all Swins share: patch embedding, patch merging, MLP, DropPath, stage; and grid resampling.

Shapes: `B` batch, `H W` token grid, `C` channels. Token maps are (B, H, W, C).
"""

import functools
from collections.abc import Callable

import torch
from timm.layers import drop_path
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def init_linear(module: nn.Module) -> None:
    """Initialises a linear layer like the released models: weights normal (std 0.02, truncated at ±2), biases zero.

    A Conv1d of length 1, as in Swin-MLP, is a linear layer too. The Conv2d of the patch embedding keeps PyTorch's
    initialisation.
    """
    if isinstance(module, nn.Linear | nn.Conv1d):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def resize_grid(values: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resamples values on a grid, (old H · old W, C), bicubically to (new H · new W, C)."""
    if old == new:
        return values
    grid = values.T.reshape(1, -1, *old)  # (1, C, H, W)
    return F.interpolate(grid, size=new, mode="bicubic").flatten(2)[0].T


class PatchEmbed(nn.Module):
    """Patch partition and linear embedding (section 3.1): (B, in_chans, height, width) to (B, H, W, C).

    An image whose sides are not multiples of the patch is padded with zeros at the bottom and on the right. Patches do
    not overlap, so the convolution of the released models is computed as one matrix product. Its output is
    channels-last, as the LayerNorm needs it.

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
        """(B, in_chans, height, width) to (B, H, W, C)."""
        bottom, right = -x.shape[2] % self.patch_size, -x.shape[3] % self.patch_size
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        p = self.patch_size
        x = x.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, in_chans, H, p, W, p)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, H, W, in_chans·p·p), in the order of the weights
        return self.norm(F.linear(x, self.proj.weight.flatten(1), self.proj.bias))


class PatchMerging(nn.Module):
    """Halves the map and doubles its channels (section 3.1): (B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C).

    A map with an odd side is padded with zeros at the bottom or on the right.

    Args:
        dim: C.
        norm_last: whether the LayerNorm follows the linear layer, as in V2, or precedes it.
    """

    def __init__(self, dim: int, norm_last: bool = False):
        super().__init__()
        self.norm_last = norm_last
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if norm_last else 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, ⌈H/2⌉, ⌈W/2⌉, 2C)."""
        bottom, right = x.shape[1] % 2, x.shape[2] % 2
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        # The four tokens of a 2×2 square, down the columns first: the released weights expect this order.
        x = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)  # (B, H/2, W/2, 4C)
        return self.norm(self.reduction(x)) if self.norm_last else self.reduction(self.norm(x))


class GeluContext(FunctionCtx):
    """The type of the context that PyTorch passes to the two functions below."""

    saved_tensors: tuple[Tensor, Tensor]


class GeluLinearRecompute(torch.autograd.Function):
    """Computes F.linear(F.gelu(x), weight, bias), but keeps only x for the backward pass and recomputes gelu(x).

    That saves the memory of one activation of the MLP's hidden width, the largest of a block.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """(..., hidden) to (..., C)."""
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx: GeluContext, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: GeluContext, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows = grad_out.flatten(0, -2)  # (tokens, C)
        grad_x = torch.ops.aten.gelu_backward((rows @ weight).view(x.shape), x)
        return grad_x, rows.T @ F.gelu(x).flatten(0, -2), rows.sum(0)


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, applied to each token."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor, recompute: bool = False) -> Tensor:
        """(..., C) to (..., C). With `recompute`, the caller checkpoints this module: saving memory is left to it."""
        x = self.fc1(x)
        if recompute or self.drop.p > 0 or not torch.is_grad_enabled():
            return self.drop(self.fc2(self.drop(self.act(x))))
        # Under autocast, x has the dtype of fc1's output. The casts are outside, so that autograd handles them.
        return GeluLinearRecompute.apply(x, self.fc2.weight.to(x.dtype), self.fc2.bias.to(x.dtype))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016) of a residual branch: x + branch(x).

    In training, a sample loses its branch with probability `rate`, and the remaining branches are scaled so that the
    expectation is the same.

    Args:
        rate: fraction of the samples whose branch is dropped.
        skip: compute the branch only for the samples that keep it. This differs from the default: every batch drops
            the same number of samples, B · rate rounded, instead of an independent draw per sample. A batch so small
            that this rounds to 0 drops none.
    """

    def __init__(self, rate: float, skip: bool = False):
        super().__init__()
        self.rate = rate
        self.skip = skip

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], recompute: bool = False) -> Tensor:
        """Returns x + branch(x) for x (B, ...), with the branches of some samples dropped. `branch` keeps the shape.

        With `recompute`, only the branch's input is kept for the backward pass. Because the checkpoint is around the
        branch and not the block, the last product of each branch is not recomputed: the backward pass does not need
        its output.
        """
        if recompute:
            branch = functools.partial(checkpoint, branch, use_reentrant=False)
        if not self.training or self.rate == 0:
            return x + branch(x)
        if not self.skip:
            return x + drop_path(branch(x), self.rate, training=True)
        num_kept = self.num_kept(x.shape[0])
        if num_kept == x.shape[0]:
            return x + branch(x)
        kept = torch.rand(x.shape[0], device=x.device).argsort()[:num_kept]
        out = branch(x.index_select(0, kept))
        dtype = torch.promote_types(x.dtype, out.dtype)  # as in x + out
        # Deterministic: no index occurs twice.
        return x.to(dtype).index_add(0, kept, out.to(dtype), alpha=x.shape[0] / num_kept)

    def num_kept(self, batch_size: int) -> int:
        """Returns how many samples keep their branch: at least one, and the same for every batch of that size."""
        return max(1, batch_size - round(batch_size * self.rate))

    def extra_repr(self) -> str:
        return f"{self.rate:g}" + (", skip" if self.skip else "")


class Stage(nn.Module):
    """Blocks at one resolution, then the patch merging (`BasicLayer` in the original code).

    Args:
        blocks: modules that map (B, H, W, C) to (B, H, W, C) and take `recompute`.
        downsample: module that computes the next stage's map; None in the last stage.
        use_checkpoint: recompute the branches in the backward pass instead of keeping their activations.
    """

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None, use_checkpoint: bool):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the map after the blocks (B, H, W, C) and the next stage's input, in the last stage the same map."""
        for block in self.blocks:
            x = block(x, recompute=self.use_checkpoint and torch.is_grad_enabled())
        return x, x if self.downsample is None else self.downsample(x)
