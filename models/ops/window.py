"""Geometry of shifted windows: partition, reverse, cyclic shift, mask. The only copy of each.

`ShiftedWindows` combines them for one block: it cuts a token map of any size into windows and joins them again.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `M` side of a window, `N` tokens in a window, `*` any
further dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASK_VALUE = -100.0  # added to the score of a pair that must not see each other; finite, so that no row becomes NaN


def window_grid(x: Tensor, window: int) -> Tensor:
    """Views a map (B, H, W, *), H and W multiples of `window`, as windows (B, H/M, W/M, M, M, *), without a copy."""
    return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cuts a map (B, H, W, C), H and W multiples of `window`, into windows (B, nW, N, C), row by row."""
    return window_grid(x, window).flatten(3, 4).flatten(1, 2)


def window_reverse(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Puts windows (B, nW, N, C) back into the map (B, H, W, C): undoes `window_partition`."""
    B, _, _, C = windows.shape
    x = windows.reshape(B, height // window, width // window, window, window, C)
    return x.transpose(2, 3).reshape(B, height, width, C)


def cyclic_shift(x: Tensor, shifts: tuple[int, int]) -> Tensor:
    """Moves a map (B, H, W, *) up and left by `shifts`; tokens that leave one side enter at the other (figure 4)."""
    return x if shifts == (0, 0) else x.roll((-shifts[0], -shifts[1]), dims=(1, 2))


def cyclic_unshift(x: Tensor, shifts: tuple[int, int]) -> Tensor:
    """Undoes `cyclic_shift`."""
    return x if shifts == (0, 0) else x.roll(shifts, dims=(1, 2))


def padded_length(length: int, window: int) -> int:
    """Rounds `length` up to a multiple of `window`."""
    return -(-length // window) * window


def axis_shift(length: int, window: int, shift: int) -> int:
    """Returns the shift along an axis: 0 if a single window covers it, because a shift would only cut it in two."""
    return shift if length > window else 0


def region_ids(length: int, shift: int, device: torch.device | None = None) -> Tensor:
    """Returns (length,): the region of each position of one axis after shifting.

    0 is the bulk, 1 the tokens that the shift wrapped around into the last window. Two tokens of a window may see each
    other only if their regions agree on both axes.
    """
    return (torch.arange(length, device=device) >= length - shift).long()


def make_attn_mask(
    height: int, width: int, window: int, shifts: tuple[int, int], device: torch.device | None = None
) -> Tensor | None:
    """Returns the mask that is added to attention scores, so that only tokens of one region see each other.

    Height and width are multiples of the window. Padding is not masked (`ShiftedWindows.pad`).

    Returns:
        (nW, N, N) float32 of 0 and -100, or None without shift.
    """
    if shifts == (0, 0):
        return None
    rows, columns = region_ids(height, shifts[0], device), region_ids(width, shifts[1], device)
    regions = rows[:, None] * 2 + columns[None, :]  # (H, W)
    regions = window_partition(regions[None, :, :, None], window)[0, :, :, 0]  # (nW, N)
    masked = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(masked.shape, device=device).masked_fill(masked, MASK_VALUE)


class ShiftedWindows(nn.Module):
    """Cuts the token maps of one block into windows of M × M tokens, shifted or not (section 3.2).

    A map that is not a multiple of the window is padded by `pad` before the projection to queries, keys and values, as
    in the original code for detection, torchvision and transformers: padding takes part in attention, as tokens that
    are zero before the projection. `split` and everything after it take padded maps only.

    The mask for `map_size` is a buffer; that of maps of any other size is computed when needed. As in the original, a
    window larger than `map_size` shrinks to it, and a single window is not shifted. Apart from the size of the window,
    the result depends only on the input size, not on `map_size`: a larger map is cut into several windows, and these
    are shifted.

    Args:
        map_size: expected (H, W).
        window: side of a window, in tokens.
        shifted: whether the windows are displaced by half their side.
    """

    attn_mask: Tensor | None
    cyclic = True  # the cut is a cyclic shift of the map by `shifts`, which a kernel can do by index arithmetic

    def __init__(self, map_size: tuple[int, int], window: int, shifted: bool):
        super().__init__()
        self.map_size = map_size
        self.window = min(window, *map_size)
        self.shift = self.window // 2 if shifted else 0
        padded = self.padded_size(*map_size)
        mask = make_attn_mask(*padded, self.window, self.shifts(*padded))
        self.register_buffer("attn_mask", mask, persistent=False)

    def shifts(self, height: int, width: int) -> tuple[int, int]:
        """Returns the shift (rows, columns) for a map of height × width tokens."""
        return axis_shift(height, self.window, self.shift), axis_shift(width, self.window, self.shift)

    def columns(self, width: int) -> int:
        """Returns the number of windows in one row of a map that is `width` tokens wide."""
        return width // self.window

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns (H, W) rounded up to multiples of the window."""
        return padded_length(height, self.window), padded_length(width, self.window)

    def pad(self, x: Tensor) -> Tensor:
        """Appends zeros to a map (B, H, W, C) at the bottom and on the right, up to multiples of the window."""
        height, width = x.shape[1:3]
        bottom, right = padded_length(height, self.window) - height, padded_length(width, self.window) - width
        return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom or right else x

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Shifts a padded map (B, H, W, *) and views it as windows (B, rows, columns, M, M, *), rows · columns = nW.

        Returns:
            The windows; and the mask (nW, N, N), or None if nothing has to be masked.
        """
        height, width = x.shape[1:3]
        shifts = self.shifts(height, width)
        if (height, width) == self.padded_size(*self.map_size):
            mask = self.attn_mask
        else:
            mask = make_attn_mask(height, width, self.window, shifts, x.device)
        return window_grid(cyclic_shift(x, shifts), self.window), mask

    def join(self, windows: Tensor, height: int, width: int) -> Tensor:
        """Merges windows (B, rows, columns, M, M, *) into the map (B, H, W, *): undoes `split`."""
        x = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return cyclic_unshift(x, self.shifts(height, width))

    def extra_repr(self) -> str:
        return f"window={self.window}, shift={self.shift}, map_size={self.map_size}"
