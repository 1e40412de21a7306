"""The geometry of shifted windows: partition, reverse, cyclic shift, mask, relative positions. The only copy of each.

`ShiftedWindows` puts them together for one block: it turns a token map into windows and back, whatever the map's size.
Shapes: `B` batch, `H W` token grid, `C` channels, `nW` windows, `M` side of a window, `N` tokens in a window, `*` any
further dimensions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASKED = -100.0  # added to the score of a pair that must not see each other; finite, so that no row becomes NaN


def window_grid(x: Tensor, window: int) -> Tensor:
    """A map (B, H, W, *), H and W multiples of `window`, seen as its windows (B, H/M, W/M, M, M, *), not copied."""
    return x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cuts a map (B, H, W, C), H and W multiples of `window`, into windows (B, nW, N, C), row by row."""
    return window_grid(x, window).flatten(3, 4).flatten(1, 2)


def window_reverse(windows: Tensor, window: int, height: int, width: int) -> Tensor:
    """Puts windows (B, nW, N, C) back into the map (B, H, W, C) that `partition` cut."""
    B, _, _, C = windows.shape
    x = windows.reshape(B, height // window, width // window, window, window, C)
    return x.transpose(2, 3).reshape(B, height, width, C)


def cyclic_shift(x: Tensor, shifts: tuple[int, int]) -> Tensor:
    """Moves a map (B, H, W, C) up and left by `shifts`; what leaves one side enters at the other (figure 4)."""
    return x if shifts == (0, 0) else x.roll((-shifts[0], -shifts[1]), dims=(1, 2))


def cyclic_unshift(x: Tensor, shifts: tuple[int, int]) -> Tensor:
    """Undoes `cyclic_shift`."""
    return x if shifts == (0, 0) else x.roll(shifts, dims=(1, 2))


def relative_position_index(window: int) -> Tensor:
    """(N, N): for each pair of tokens in a window, the row of their offset in the table of (2·window-1)² biases."""
    along = torch.arange(window)
    rows, columns = along.repeat_interleave(window), along.repeat(window)  # (N,) each
    down = rows[:, None] - rows[None, :] + window - 1
    right = columns[:, None] - columns[None, :] + window - 1
    return down * (2 * window - 1) + right


def padded_length(length: int, window: int) -> int:
    """The smallest multiple of `window` that is not below `length`."""
    return -(-length // window) * window


def axis_shift(length: int, window: int, shift: int) -> int:
    """The shift along an axis: none where a single window covers it, for it would only be cut in two."""
    return shift if length > window else 0


def region_ids(length: int, window: int, shift: int, device: torch.device | None = None) -> Tensor:
    """(padded length,): which region each place of one axis belongs to, after padding and shifting.

    0 is the bulk; 1 is what the shift brought to the last window from the other side, 2 is padding. Only tokens whose
    regions agree on both axes were neighbours in the map, or are padding alike.
    """
    padded = padded_length(length, window)
    origin = (torch.arange(padded, device=device) + shift) % padded
    wrapped = (origin < shift).long()
    return wrapped.masked_fill(origin >= length, 2)


def attention_mask(
    height: int, width: int, window: int, shifts: tuple[int, int], device: torch.device | None = None
) -> Tensor | None:
    """What is added to the attention scores of a map so that only tokens of one region see each other.

    Returns:
        (nW, N, N) float32 of 0 and -100, or None where neither shift nor padding asks for a mask.
    """
    if shifts == (0, 0) and height % window == 0 and width % window == 0:
        return None
    rows = region_ids(height, window, shifts[0], device)
    columns = region_ids(width, window, shifts[1], device)
    regions = rows[:, None] * 3 + columns[None, :]  # (H, W), padded
    regions = window_partition(regions[None, :, :, None], window)[0, :, :, 0]  # (nW, N)
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(apart.shape, device=device).masked_fill(apart, MASKED)


class ShiftedWindows(nn.Module):
    """How one block sees its token map: in windows of window × window tokens, shifted or not (section 3.2).

    Built for maps of `map_size`, whose mask is kept ready; any other size is padded, masked and computed when it comes.
    As in the original, a window larger than that map shrinks to it, and a single window is not shifted. Should a larger
    map come later, it has several windows, and they are: what a size gives does not depend on the size built for.

    Args:
        map_size: (H, W) of the maps to expect.
        window: side of a window, in tokens.
        shifted: whether the windows are displaced by half their side.
    """

    cyclic = True  # the cut is a cyclic shift of the padded map by `shifts`, and a kernel may do it by arithmetic

    def __init__(self, map_size: tuple[int, int], window: int, shifted: bool):
        super().__init__()
        self.map_size = map_size
        self.window = min(window, *map_size)
        self.shift = self.window // 2 if shifted else 0
        mask = attention_mask(*map_size, self.window, self.shifts(*map_size))
        self.register_buffer("attn_mask", mask, persistent=False)

    def shifts(self, height: int, width: int) -> tuple[int, int]:
        """The displacement (down, right) for a map of height × width tokens."""
        return axis_shift(height, self.window, self.shift), axis_shift(width, self.window, self.shift)

    def columns(self, width: int) -> int:
        """Windows side by side in a map that is `width` tokens wide."""
        return padded_length(width, self.window) // self.window

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pads and shifts a map (B, H, W, *) and sees it as windows (B, rows, columns, M, M, *), which is not copied.

        Returns:
            The windows, rows · columns = nW, and the mask (nW, N, N), or None where there is nothing to mask.
        """
        height, width = x.shape[1:3]
        shifts = self.shifts(height, width)
        if (height, width) == self.map_size:
            mask = self.attn_mask
        else:
            mask = attention_mask(height, width, self.window, shifts, x.device)
        down, right = padded_length(height, self.window) - height, padded_length(width, self.window) - width
        if down or right:
            x = F.pad(x, (*(0, 0) * (x.ndim - 3), 0, right, 0, down))
        return window_grid(cyclic_shift(x, shifts), self.window), mask

    def join(self, windows: Tensor, height: int, width: int) -> Tensor:
        """The map (B, H, W, *) again from windows (B, rows, columns, M, M, *): undoes `split`, padding included."""
        x = windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        x = cyclic_unshift(x, self.shifts(height, width))
        return x if x.shape[1:3] == (height, width) else x[:, :height, :width]

    def extra_repr(self) -> str:
        return f"window={self.window}, shift={self.shift}, map_size={self.map_size}"
