"""Reads how this process was started: the variables that torchrun or a platform sets. Imports nothing slow."""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from utils.errors import UserError

_TORCHRUN = "torchrun sets it: torchrun --standalone --nproc_per_node=N main.py …"
# Of a launcher that starts tasks without torchrun's variables: how many there are, and which one this is.
_TASK_VARIABLES = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
_SRUN = (
    "srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_NNODES --nproc_per_node=GPUS --rdzv-backend=c10d "
    "--rdzv-endpoint=FIRST_NODE:29500 main.py …, or as docs/cluster/slurm.sbatch, without torchrun"
)
_MPIRUN = "torchrun --standalone --nproc_per_node={tasks} main.py … on one machine; docs/CLUSTER.md has several"
_RESOLVE_SECONDS = 30.0  # a cluster's name service may learn of a machine after its processes have started
_RESOLVE_PAUSE = 1.0


@dataclass(frozen=True)
class Launch:
    """Rank and world size of this process, in the run and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE. Without them this process is alone.

    Raises:
        UserError: a variable is missing or no number of its range, or the process is one of several tasks of a launcher
            that sets none of them.
    """
    if not environ.get("WORLD_SIZE") and not environ.get("RANK"):
        _refuse_tasks(environ)
    world_size = _number(environ, "WORLD_SIZE", 1, 1)
    if "WORLD_SIZE" not in environ and _number(environ, "RANK", 0, 0) > 0:
        raise UserError(f"RANK is {environ['RANK']}, but WORLD_SIZE is not set. {_TORCHRUN}")
    rank = _number(environ, "RANK", None if world_size > 1 else 0, 0, world_size - 1)
    local_world_size = _number(environ, "LOCAL_WORLD_SIZE", 1, 1, world_size)
    local_rank = _number(environ, "LOCAL_RANK", 0, 0)
    if "LOCAL_WORLD_SIZE" in environ and local_rank >= local_world_size:
        raise UserError(f"LOCAL_RANK {local_rank} is not below LOCAL_WORLD_SIZE {local_world_size}. {_TORCHRUN}")
    if world_size > 1:
        _master(environ)
    return Launch(rank, world_size, local_rank, local_world_size)


def resolve_master(environ: Mapping[str, str] = os.environ) -> None:
    """Waits until the host of MASTER_ADDR has an address.

    Raises:
        UserError: it has none within half a minute.
    """
    host, port = _master(environ)
    deadline = time.monotonic() + _RESOLVE_SECONDS
    while True:
        try:
            socket.getaddrinfo(host, port)
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"MASTER_ADDR {host}: no such host ({error.strerror}). Give the host name or the address of the "
                    "machine of rank 0; on one machine, torchrun --standalone needs none"
                ) from error
        time.sleep(_RESOLVE_PAUSE)


def port_refusal(error: Exception, environ: Mapping[str, str] = os.environ) -> UserError | None:
    """Translates the error of a rank 0 that cannot listen at MASTER_PORT; None for any other error."""
    reasons = {"EADDRINUSE": "is in use, perhaps by another run on this machine", "EACCES": "may not be opened"}
    for name, reason in reasons.items():
        if name in str(error):
            return UserError(
                f"MASTER_PORT: port {_master(environ)[1]} {reason}. Give all processes another free port, or let "
                "torchrun choose one: torchrun --standalone --nproc_per_node=N main.py …"
            )
    return None


def _master(environ: Mapping[str, str]) -> tuple[str, int]:
    """Returns the host and the port at which the ranks meet."""
    host = environ.get("MASTER_ADDR", "").strip()
    if not host:
        raise UserError(
            f"WORLD_SIZE is {environ.get('WORLD_SIZE')}, but MASTER_ADDR is not set: the host of rank 0, where all "
            f"processes meet. {_TORCHRUN}"
        )
    return host, _number(environ, "MASTER_PORT", None, 1, 65535)


def _number(environ: Mapping[str, str], name: str, default: int | None, low: int, high: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name} is not set, although WORLD_SIZE is {environ.get('WORLD_SIZE')}. {_TORCHRUN}")
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        wanted = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise UserError(f"the environment variable {name} is {text!r}, no number {wanted}. {_TORCHRUN}")
    return value


def _refuse_tasks(environ: Mapping[str, str]) -> None:
    """Raises UserError if this process is one of several tasks that know nothing of each other."""
    for size, rank in _TASK_VARIABLES:
        if not environ.get(size, "").isdecimal() or rank not in environ:
            continue
        if int(environ[size]) > 1:
            command = _SRUN if size.startswith("SLURM") else _MPIRUN.format(tasks=environ[size])
            raise UserError(
                f"started as task {environ[rank]} of {environ[size]} ({size}), but not by torchrun: each task would "
                f"train by itself. Start with {command}. To run one process alone, set WORLD_SIZE=1"
            )
        return  # SLURM_STEP_NUM_TASKS 1: one process within a larger allocation
