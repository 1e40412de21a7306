"""The attention variants of the paper's Table 5, each made from a `WindowAttention` and its parameters.

Simple implementations for measurements: sliding windows gather every token's neighbours.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `M` side of a window, `N` tokens in a window,
`nH` heads, `d` head width, `m` random features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from yacs.config import CfgNode

from models.attention import WindowAttention
from models.build import build_model
from models.ops.window import MASK_VALUE, ShiftedWindows, padded_length, window_grid, window_partition
from models.swin_transformer import SwinTransformer


class PaddedWindows(ShiftedWindows):
    """Shifted windows without the cyclic shift: the smaller windows at the borders are padded to full size.

    Computes the same function as `ShiftedWindows`, with up to one more window along each axis (section 3.2, figure 4).
    This padding follows the projection and is masked.
    """

    cyclic = False

    def __init__(self, map_size: tuple[int, int], window: int, shifted: bool):
        super().__init__(map_size, window, shifted)
        self.register_buffer("attn_mask", self.mask(*self.padded_size(*map_size)), persistent=False)

    def margins(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding (before, after) of the rows and the columns: the first window border is `shift` tokens inside."""
        sides = []
        for length, shift in zip((height, width), self.shifts(height, width), strict=True):
            before = -shift % self.window
            sides.append((before, padded_length(before + length, self.window) - before - length))
        return sides[0], sides[1]

    def mask(self, height: int, width: int, device: torch.device | None = None) -> Tensor | None:
        """(nW, N, N): separates padding from real tokens; None if nothing is padded."""
        (top, bottom), (left, right) = self.margins(height, width)
        if not (top or bottom or left or right):
            return None
        real = F.pad(torch.ones(1, height, width, 1, device=device), (0, 0, left, right, top, bottom))
        real = window_partition(real, self.window)[0, :, :, 0]  # (nW, N)
        separate = real[:, :, None] != real[:, None, :]
        return torch.zeros(separate.shape, device=device).masked_fill(separate, MASK_VALUE)

    def columns(self, width: int) -> int:
        left, right = self.margins(width, width)[1]
        return (left + width + right) // self.window

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        height, width = x.shape[1:3]
        (top, bottom), (left, right) = self.margins(height, width)
        expected = (height, width) == self.padded_size(*self.map_size)
        mask = self.attn_mask if expected else self.mask(height, width, x.device)
        return window_grid(F.pad(x, (*(0, 0) * (x.ndim - 3), left, right, top, bottom)), self.window), mask

    def join(self, windows: Tensor, height: int, width: int) -> Tensor:
        (top, _), (left, _) = self.margins(height, width)
        x = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return x[:, top : top + height, left : left + width]


class SlidingWindowAttention(nn.Module):
    """Every token attends to the M × M tokens around it that are inside the map.

    Naive: keys and values are gathered for each token, M² copies of the map. An even M has one row and column more
    before the token than after it.
    """

    bias_index: Tensor

    def __init__(self, attention: WindowAttention):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.window = attention.windows.window
        self.qkv, self.proj = attention.qkv, attention.proj
        self.relative_position_bias_table = attention.relative_position_bias_table
        offsets = self.window // 2 - torch.arange(self.window)  # query minus key position, along an axis
        offsets = offsets + self.window - 1
        index = offsets[:, None] * (2 * self.window - 1) + offsets[None, :]
        self.register_buffer("bias_index", index.flatten(), persistent=False)

    def neighbours(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, M², H·W): the tokens around each token, zeros outside the map."""
        before, after = self.window // 2, self.window - 1 - self.window // 2
        return F.unfold(F.pad(x, (before, after, before, after)), self.window).unflatten(1, (x.shape[1], -1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x).permute(0, 3, 1, 2).chunk(3, dim=1)  # (B, C, H, W) each
        heads = (self.num_heads, -1)
        q = q.flatten(2).unflatten(1, heads)  # (B, nH, d, H·W)
        k, v = (self.neighbours(part).unflatten(1, heads) for part in (k, v))  # (B, nH, d, M², H·W)
        scores = torch.einsum("bhdn,bhdmn->bhmn", q * self.scale, k)
        outside = self.neighbours(x.new_ones(1, 1, height, width))[0, 0] == 0  # (M², H·W)
        bias = self.relative_position_bias_table[self.bias_index].T[:, :, None]  # (nH, M², 1)
        weights = (scores + bias).masked_fill(outside, MASK_VALUE).softmax(dim=2)
        out = torch.einsum("bhmn,bhdmn->bhdn", weights, v)  # (B, nH, d, H·W)
        return self.proj(out.flatten(1, 2).transpose(1, 2).unflatten(1, (height, width)))


class PerformerAttention(nn.Module):
    """Every token attends to the whole map, in time linear in its size: FAVOR+ (Choromanski et al., 2021, "Rethinking
    Attention with Performers") with m = d · ln d positive orthogonal random features of the softmax kernel.

    It cannot have a relative position bias.
    """

    directions: Tensor

    def __init__(self, attention: WindowAttention, features: int | None = None):
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        width = attention.proj.in_features // attention.num_heads
        count = features or int(width * math.log(width))
        self.register_buffer("directions", orthogonal_directions(count, width), persistent=False)

    def feature_map(self, x: Tensor, dims: tuple[int, ...]) -> Tensor:
        """(B, nH, H·W, d) to (B, nH, H·W, m) positive features, up to a factor for each slice along `dims`."""
        x = x * x.shape[-1] ** -0.25
        exponents = x @ self.directions.T - x.square().sum(-1, keepdim=True) / 2
        return (exponents - exponents.amax(dims, keepdim=True)).exp() + 1e-4  # keeps every feature positive

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        qkv = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1))  # (B, H·W, 3, nH, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, nH, H·W, d) each
        # A query's factor cancels; a key's cancels only if all keys of the map have the same one.
        q, k = self.feature_map(q, (-1,)), self.feature_map(k, (-2, -1))
        out = q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2, keepdim=True).transpose(-2, -1))
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, x.shape[1:3]))


def orthogonal_directions(count: int, width: int, seed: int = 0) -> Tensor:
    """(count, width): Gaussian directions, orthogonal to each other within each block of `width`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = []
    for _ in range(-(-count // width)):
        gaussian = torch.randn(width, width, generator=generator)
        lengths = torch.randn(width, width, generator=generator).norm(dim=1, keepdim=True)
        q, r = torch.linalg.qr(gaussian)
        uniform = q * r.diagonal().sign()  # otherwise LAPACK's sign convention would prefer some directions
        blocks.append(uniform.T * lengths)
    return torch.cat(blocks)[:count]


def disable_shift(attention: WindowAttention) -> nn.Module:
    attention.windows = ShiftedWindows(attention.windows.map_size, attention.windows.window, shifted=False)
    return attention


def pad_windows(attention: WindowAttention) -> nn.Module:
    windows = attention.windows
    attention.windows = PaddedWindows(windows.map_size, windows.window, shifted=windows.shift > 0)
    return attention


def keep(attention: WindowAttention) -> nn.Module:
    return attention


VARIANTS: dict[str, Callable[[WindowAttention], nn.Module]] = {  # the paper's names
    "sliding window (naive)": SlidingWindowAttention,
    "Performer": PerformerAttention,
    "window (w/o shifting)": disable_shift,
    "shifted window (padding)": pad_windows,
    "shifted window (cyclic)": keep,
}


def attention_of(block: nn.Module) -> WindowAttention:
    """The attention of a block of Swin V1. Raises TypeError for another block."""
    attention = block.get_submodule("attn")
    if not isinstance(attention, WindowAttention):
        raise TypeError(f"a {type(attention).__name__} is not the attention of Swin V1")
    return attention


def replace_attention(model: SwinTransformer, variant: str) -> SwinTransformer:
    """Replaces every window attention of `model` by `variant`, a key of VARIANTS. Parameters stay. Returns `model`."""
    for block in model.blocks():
        block.register_module("attn", VARIANTS[variant](attention_of(block)))
    return model


def build_swin(config: CfgNode, num_classes: int | None = None) -> SwinTransformer:
    """The model of a configuration, which has to be a Swin V1. Raises TypeError for another model."""
    model = build_model(config, num_classes)
    if not isinstance(model, SwinTransformer):
        raise TypeError(f"{config.MODEL.NAME} is no Swin V1")
    return model
