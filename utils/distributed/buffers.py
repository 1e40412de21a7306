"""Gives all ranks the same buffers: in training each rank's BatchNorm keeps statistics of its own images."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def average_buffers(module: nn.Module) -> None:
    """Replaces each saved buffer by its mean over the ranks, and counters by the largest. A collective call.

    Buffers that are equal on all ranks keep their bits. Those that are not saved follow from the configuration, and
    are left alone; so it costs nothing for a model without running statistics, and in a run of one process.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    saved = module.state_dict(keep_vars=True).keys()
    buffers = [buffer for name, buffer in module.named_buffers() if name in saved]
    averaged = [buffer for buffer in buffers if buffer.is_floating_point()]
    counters = [buffer for buffer in buffers if not buffer.is_floating_point() and not buffer.is_complex()]
    if averaged:
        # In float64 the sum and the mean of equal float32 values are exact.
        flat = torch.cat([buffer.flatten().double() for buffer in averaged])
        dist.all_reduce(flat)
        _unflatten(flat / dist.get_world_size(), averaged)
    if counters:
        flat = torch.cat([buffer.flatten().long() for buffer in counters])
        dist.all_reduce(flat, dist.ReduceOp.MAX)
        _unflatten(flat, counters)


def _unflatten(flat: Tensor, buffers: list[Tensor]) -> None:
    parts = flat.split([buffer.numel() for buffer in buffers])
    for buffer, part in zip(buffers, parts, strict=True):
        buffer.copy_(part.view_as(buffer))
