"""The processes of a run: who I am, on which device, and the few collectives the project uses.

One process needs no process group; everything here then does nothing or returns its argument.
"""

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from utils.distributed.heartbeat import Heartbeat
from utils.errors import LostProcess, UserError

# How a collective call says that it waited in vain, or that the other end is gone.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe", re.IGNORECASE)

# NCCL ends a process that waited too long without another word. Gloo, which agrees on stopping after each update,
# raises an error that can be explained: it is given the time to.
_GLOO_FIRST = timedelta(minutes=1)


@dataclass(frozen=True)
class DistInfo:
    """This process among those of the run, as torchrun numbered them."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @classmethod
    def single(cls, device: torch.device) -> "DistInfo":
        """A run of one process."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, device=device)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def process_group(timeout: int) -> Iterator[DistInfo]:
    """Joins the processes that torchrun started (NCCL between GPUs, gloo between CPUs) and leaves them at the end.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        UserError: more processes on this machine than it has GPUs.
        LostProcess: another process was killed, or did not come within `timeout`; the message names it.
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
    dist_info = DistInfo(rank, world_size, local_rank, local_world_size, device)
    if world_size == 1:
        yield dist_info
        return
    heartbeat = _join(dist_info, timedelta(seconds=timeout))
    why = "done"
    try:
        yield dist_info
        dist.destroy_process_group()
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            why = _in_short(error)
            raise
        why = ""  # not the cause; and no word to the group any more: it could wait for the lost one
        raise LostProcess(
            f"a process of this run is lost: {heartbeat.describe_lost_ranks()}. Its own last words, if any, stand in its output. "
            "Start again to continue from the last checkpoint (torchrun --max-restarts=N does so by itself)"
        ) from error
    except BaseException as error:
        why = _in_short(error)
        raise
    finally:
        heartbeat.stop(why)


def _join(dist_info: DistInfo, timeout: timedelta) -> Heartbeat:
    cuda = dist_info.device.type == "cuda"
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = _unique_store_prefix(store, dist_info, timeout)
        heartbeat = Heartbeat(store, dist_info.rank, dist_info.world_size)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=dist_info.rank,
            world_size=dist_info.world_size,
            timeout=timeout + _GLOO_FIRST if cuda else timeout,
            device_id=dist_info.device if cuda else None,
        )
    except (dist.DistError, TimeoutError) as error:
        raise LostProcess(
            f"not all {dist_info.world_size} processes came together within {timeout.total_seconds():.0f} s (TIMEOUT): "
            f"{_in_short(error)}. Start all of them, with the same address in MASTER_ADDR and MASTER_PORT"
        ) from error
    return heartbeat


def _unique_store_prefix(store: dist.Store, dist_info: DistInfo, timeout: timedelta) -> dist.Store:
    """A part of `store` that holds nothing yet, the same one on all processes.

    torchrun keeps one store for all its restarts, in which processes would find the addresses of those before them.
    Rank 0 gives this start a name, to each process that asks: an answer counts for whoever's question it repeats.
    """
    until = time.monotonic() + timeout.total_seconds()
    me = uuid.uuid4().hex
    others = [str(rank) for rank in range(1, dist_info.world_size)]
    store = dist.PrefixStore("start", store)
    if dist_info.rank == 0:
        acks = [f"{rank}/heard" for rank in others]
        while not (store.check(acks) and all(value.decode() == me for value in store.multi_get(acks))):
            for rank in others:
                if store.check([f"{rank}/asks"]):
                    store.set(f"{rank}/told", f"{store.get(f'{rank}/asks').decode()} {me}")
            _sleep_until_deadline(until, "some processes did not ask")
        return dist.PrefixStore(me, store)
    store.set(f"{dist_info.rank}/asks", me)
    while True:
        if store.check([f"{dist_info.rank}/told"]):
            asked, _, name = store.get(f"{dist_info.rank}/told").decode().partition(" ")
            if asked == me:
                store.set(f"{dist_info.rank}/heard", name)
                return dist.PrefixStore(name, store)
        _sleep_until_deadline(until, "rank 0 did not answer")


def _sleep_until_deadline(until: float, otherwise: str) -> None:
    if time.monotonic() > until:
        raise TimeoutError(otherwise)
    time.sleep(0.01)


def _in_short(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


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
def local_rank_zero_first(dist_info: DistInfo) -> Iterator[None]:
    """Local rank 0 runs the body alone, then the others of its machine run it: downloads and caches are made once."""
    if dist_info.local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if dist_info.local_rank == 0:
            barrier()
