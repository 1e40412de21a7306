"""Models sharded over the ranks of a run (FSDP2): each rank holds a part of every parameter and of its optimizer state.

The parameters of a block are gathered just before they are used and freed afterwards. Only this file and
`engine/setup.py` know about sharding; saving and summing use `to_full_tensor` and `gather_full_state`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.distributed.process_group import DistInfo


def mesh_of(dist_info: DistInfo) -> DeviceMesh:
    """The one-dimensional mesh of all ranks."""
    return init_device_mesh(dist_info.device.type, (dist_info.world_size,))


def shard(model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Shards the parameters of `model` over `mesh`, in place, and moves each part to its device.

    Each of `blocks` is gathered as one unit, and all other parameters as another.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Loads the state dict of an unsharded optimizer into one over sharded parameters.

    Each tensor is sharded like its parameter. Every rank has all of `saved`, so nothing is sent.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def shard_like(value: object, parameter: DTensor) -> object:
        if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
            return value  # the step counter
        return distribute_tensor(
            value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
        )

    state = {
        number: {name: shard_like(value, parameters[number]) for name, value in values.items()}
        for number, values in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})


def to_full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the full tensor of a sharded one, and any other tensor unchanged. A collective call if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_full_state(contents: Any) -> Any:
    """Returns nested dicts and lists with each sharded tensor gathered on rank 0's CPU, None on the other ranks.

    Gathers one tensor at a time, so a device needs room only for the largest. A collective call if any is sharded.
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
    """Gathers all parameters of `module` on every rank for the body. A collective call if it is sharded.

    Evaluation needs this, because ranks have different numbers of batches.
    """
    sharded = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.reshard()
            part.set_reshard_after_forward(True, recurse=False)
