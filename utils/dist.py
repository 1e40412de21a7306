"""The processes of a run: who I am, on which device, and the few collectives the project uses.

One process needs no process group; everything here then does nothing or returns its argument.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.errors import UserError

# How long a process waits for the others: walking a folder of millions of files over a network takes its time.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class Process:
    """This process among those of the run, as torchrun numbered them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Process]:
    """Joins the processes that torchrun started (NCCL between GPUs, gloo between CPUs) and leaves them at the end.

    Raises:
        UserError: more processes on this machine than it has GPUs.
    """
    rank, world_size, local_rank, local_world_size = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    if torch.cuda.is_available():
        if local_world_size > torch.cuda.device_count():
            raise UserError(
                f"torchrun started {local_world_size} processes here, but this machine has "
                f"{torch.cuda.device_count()} GPU(s). Start one per GPU: --nproc_per_node={torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if world_size > 1:
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, timeout=PATIENCE)
        else:
            dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Process(rank, world_size, local_rank, local_world_size, device)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def sum_across(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` summed over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(value: object) -> object:
    """Rank 0's `value`, a small picklable object, on every process."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextmanager
def first_on_node(process: Process) -> Iterator[None]:
    """Local rank 0 runs the body alone, then the others of its machine run it: downloads and caches are made once."""
    if process.local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if process.local_rank == 0:
            barrier()
