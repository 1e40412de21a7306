"""Gathers the position bias of every pair of tokens from a table, with a gradient whose order of summation is fixed.

The plain gradient of `table[index]` adds into rows of the table: compiled for a GPU, by atomic additions in any order,
so that two runs of the same training differ.
Shapes: `M` side of a window, `N` tokens in a window, `T` = (2·M-1)² offsets of two tokens, `nH` heads.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F


def relative_position_index(window: int) -> Tensor:
    """Returns (N, N): for each pair of tokens in a window, the row of their offset in the table of T biases."""
    axis = torch.arange(window)
    rows, columns = axis.repeat_interleave(window), axis.repeat(window)  # (N,) each
    row_offset = rows[:, None] - rows[None, :] + window - 1
    column_offset = columns[:, None] - columns[None, :] + window - 1
    return row_offset * (2 * window - 1) + column_offset


def pairs_by_offset(window: int) -> Tensor:
    """Returns (T, N) int32: for each offset and first token, the place of their pair in the flattened (N, N).

    The inverse of `relative_position_index`. A second token outside the window is replaced by N², one past the end.
    """
    tokens, offsets = torch.arange(window**2), torch.arange((2 * window - 1) ** 2)[:, None]
    rows = tokens // window - (offsets // (2 * window - 1) - (window - 1))  # (T, N), of the second token
    columns = tokens % window - (offsets % (2 * window - 1) - (window - 1))
    inside = (rows >= 0) & (rows < window) & (columns >= 0) & (columns < window)
    pairs = tokens * window**2 + rows * window + columns
    return pairs.where(inside, window**4).int()


class GatherContext(FunctionCtx):
    """The type of the context that PyTorch passes to the two functions below."""

    saved_tensors: tuple[Tensor, ...]


class GatherBias(torch.autograd.Function):
    """Maps a table (T, nH) to the bias (nH, N, N): every window reads it, so it is made contiguous once."""

    @staticmethod
    def forward(table: Tensor, index: Tensor, pairs: Tensor) -> Tensor:
        """Takes the results of `relative_position_index` and `pairs_by_offset` as `index` and `pairs`."""
        return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()

    @staticmethod
    def setup_context(ctx: GatherContext, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: GatherContext, grad_bias: Tensor) -> tuple[Tensor, None, None]:
        index, pairs = ctx.saved_tensors
        if grad_bias.device.type == "cpu" and not torch.compiler.is_compiling():
            # Added one after the other: faster on a CPU, and the bits of the plain gradient with one thread.
            rows = grad_bias.permute(1, 2, 0).flatten(0, 1)  # (N², nH)
            zeros = rows.new_zeros(pairs.shape[0], rows.shape[1])
            return zeros.index_add(0, index.flatten(), rows), None, None
        values = F.pad(grad_bias.flatten(1), (0, 1))  # (nH, N² + 1), a zero for pairs outside the window
        return values.index_select(1, pairs.flatten()).unflatten(1, pairs.shape).sum(-1).T.contiguous(), None, None
