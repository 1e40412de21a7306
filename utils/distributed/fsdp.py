"""Models split over the processes of a run (FSDP2): each keeps a part of every parameter and of what belongs to it.

A block's parameters are brought together just before they are used, and given up after. Only this file and
`engine/setup.py` know how that is done; whoever saves or sums sees whole tensors, made by `whole` and `gathered`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.distributed.process_group import DistInfo


def mesh_of(dist_info: DistInfo) -> DeviceMesh:
    """All processes of the run in a row."""
    return init_device_mesh(dist_info.device.type, (dist_info.world_size,))


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Splits the parameters of `model` over the processes of `mesh`, in place, and moves the parts to their devices.

    The parameters of each of `blocks` travel together, and those of all the rest.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Gives an optimizer over split parameters the state dict of one over whole ones, each tensor split like its own.

    Every process has all of `saved`: nothing is sent.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def split(value: object, parameter: DTensor) -> object:
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            return value  # a count of steps
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    state = {
        number: {name: split(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def to_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which this process may have a part only, whole. A collective call if so."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full_state(contents: object) -> object:
    """`contents`, dicts and lists of anything, each split tensor whole and on the CPU. A collective call if any is.

    Rank 0 alone gets them, the others None in their place. One tensor at a time is put together, so that a device
    never needs room for more than the largest.
    """
    if isinstance(contents, DTensor):
        tensor = contents.full_tensor()
        return tensor.cpu() if dist.get_rank() == 0 else None
    if isinstance(contents, dict):
        return type(contents)((key, gather_full_state(value)) for key, value in contents.items())
    if isinstance(contents, list | tuple):
        return type(contents)(gather_full_state(value) for value in contents)
    return contents


@contextmanager
def summon_full_params(module: nn.Module) -> Iterator[None]:
    """Within the block every process has all parameters of `module`, so that each may use it as often as it likes.

    (Evaluation needs that: processes have different numbers of batches.) A collective call if it is split.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
