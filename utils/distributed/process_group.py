"""The processes of a run: rank and device of this one, and the few collectives that the project uses.

A run of one process has no process group: every collective here then does nothing or returns its argument.
"""

import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from utils import interrupt
from utils.distributed.heartbeat import Heartbeat
from utils.distributed.launch import port_refusal, read_launch, resolve_master
from utils.errors import LostProcess, UserError

Value = TypeVar("Value")

# Messages of collective calls that timed out or lost their peer.
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|timed out|broken pipe", re.IGNORECASE)

# NCCL aborts a process that timed out without an error that could be explained. Gloo, used for the stop flag after each
# step, raises one: NCCL's timeout is longer by this much, so that gloo's comes first.
_NCCL_EXTRA_TIMEOUT = timedelta(minutes=1)
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class DistInfo:
    """Rank, world size and device of this process, as set by torchrun."""

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
        UserError: more processes on this machine than it has GPUs, or variables that do not let the processes meet.
        LostProcess: another process was killed, or did not join within `timeout`; the message names it.
    """
    dist_info = _read_environment()
    if dist_info.world_size == 1:
        yield dist_info
        return
    heartbeat = _join(dist_info, timedelta(seconds=timeout))
    exit_reason = "done"
    try:
        yield dist_info
        dist.destroy_process_group()
    except RuntimeError as error:
        if not _LOST.search(str(error)):
            exit_reason = _summarize(error)
            raise
        if interrupt.received():  # the other process was, too, and has ended first
            raise KeyboardInterrupt from error
        # This process is not the cause. The group is not destroyed, because that could wait for the lost process.
        exit_reason = ""
        raise LostProcess(
            f"a process of this run is lost: {heartbeat.describe_lost_ranks()}. Its own error, if any, is in its log. "
            "Start again to continue from the last checkpoint (torchrun --max-restarts=N does so automatically)"
        ) from error
    except BaseException as error:
        exit_reason = _summarize(error)
        raise
    finally:
        heartbeat.stop(exit_reason)


def _read_environment() -> DistInfo:
    """Reads torchrun's environment variables and selects the device."""
    launch = read_launch()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if launch.local_world_size > num_gpus:
            raise UserError(
                f"torchrun started {launch.local_world_size} processes here, but this machine has {num_gpus} GPU(s). "
                f"Start one per GPU: --nproc_per_node={num_gpus}"
            )
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    return DistInfo(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        device=device,
    )


def _join(dist_info: DistInfo, timeout: timedelta) -> Heartbeat:
    cuda = dist_info.device.type == "cuda"
    resolve_master()
    began = time.monotonic()
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        store = _unique_store_prefix(store, dist_info, timeout)
        heartbeat = Heartbeat(store, dist_info.rank, dist_info.world_size)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=dist_info.rank,
            world_size=dist_info.world_size,
            timeout=timeout + _NCCL_EXTRA_TIMEOUT if cuda else timeout,
            device_id=dist_info.device if cuda else None,
        )
    except (dist.DistError, TimeoutError) as error:
        if refusal := port_refusal(error):
            raise refusal from error
        waited = time.monotonic() - began
        limit = " (TIMEOUT)" if waited >= timeout.total_seconds() else ""
        raise LostProcess(
            f"not all {dist_info.world_size} processes joined within {waited:.0f} s{limit}: {_summarize(error)}. Start "
            "all of them, with the same address in MASTER_ADDR and MASTER_PORT"
        ) from error
    return heartbeat


def _unique_store_prefix(store: dist.Store, dist_info: DistInfo, timeout: timedelta) -> dist.Store:
    """Returns a part of `store` that is empty and the same on all ranks.

    torchrun keeps one store for all its restarts, in which ranks would find the addresses of earlier processes. Each
    rank sends a nonce; rank 0 replies with that nonce and the prefix of this start, and the rank acknowledges it.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    nonce = uuid.uuid4().hex
    others = [str(rank) for rank in range(1, dist_info.world_size)]
    store = dist.PrefixStore("start", store)
    if dist_info.rank == 0:
        prefix = nonce
        acks = [f"{rank}/ack" for rank in others]
        while not (store.check(acks) and all(value.decode() == prefix for value in store.multi_get(acks))):
            for rank in others:
                if store.check([f"{rank}/request"]):
                    store.set(f"{rank}/reply", f"{store.get(f'{rank}/request').decode()} {prefix}")
            _sleep_until_deadline(deadline, "some ranks sent no request")
        return dist.PrefixStore(prefix, store)
    store.set(f"{dist_info.rank}/request", nonce)
    while True:
        if store.check([f"{dist_info.rank}/reply"]):
            echo, _, prefix = store.get(f"{dist_info.rank}/reply").decode().partition(" ")
            if echo == nonce:
                store.set(f"{dist_info.rank}/ack", prefix)
                return dist.PrefixStore(prefix, store)
        _sleep_until_deadline(deadline, "rank 0 did not reply")


def _sleep_until_deadline(deadline: float, message: str) -> None:
    """Sleeps for one polling interval. Raises TimeoutError with `message` after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError(message)
    time.sleep(_POLL_SECONDS)


def _summarize(error: BaseException) -> str:
    """The type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def barrier() -> None:
    """Waits for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_across(tensor: torch.Tensor) -> torch.Tensor:
    """Sums `tensor` over all ranks, in place, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def broadcast_from_main(value: Value) -> Value:
    """Returns rank 0's `value`, a small picklable object, on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


@contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Runs the body, and raises rank 0's UserError on all ranks, which would otherwise wait for it. Collective."""
    message = None
    try:
        yield
    except UserError as error:
        message = str(error)
    if message := broadcast_from_main(message):
        raise UserError(message)


@contextmanager
def local_rank_zero_first(dist_info: DistInfo) -> Iterator[None]:
    """Runs the body on local rank 0 first, then on the other ranks of its machine: they find its downloads cached."""
    if dist_info.local_rank != 0:
        barrier()
    try:
        yield
    finally:
        if dist_info.local_rank == 0:
            barrier()
