"""A process group of one process, for tests of what otherwise needs several."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from pytest import MonkeyPatch

from utils.distributed import process_group
from utils.distributed.process_group import DistInfo


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """Joins a group of one as main.py joins one of several (NCCL on a GPU, gloo on the CPU), and leaves it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        heartbeat = process_group._join(DistInfo.single(device), timedelta(seconds=60))
        try:
            yield
        finally:
            dist.destroy_process_group()
            heartbeat.stop("done")
