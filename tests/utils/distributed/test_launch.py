"""utils/distributed/launch.py: the variables of torchrun, and what the messages say where they are wrong."""

import socket

import pytest
import torch.distributed as dist

from utils.distributed import launch, process_group
from utils.distributed.launch import Launch, read_launch, resolve_master
from utils.errors import LostProcess, UserError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in TORCHRUN.items() if name not in names}


def test_variables_are_read():
    assert read_launch({}) == Launch(0, 1, 0, 1)
    assert read_launch(TORCHRUN) == Launch(3, 4, 1, 2)
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 1, 0, 1)
    assert read_launch(without("LOCAL_RANK", "LOCAL_WORLD_SIZE")) == Launch(3, 4, 0, 1)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (without("MASTER_ADDR"), "MASTER_ADDR is not set"),
        (TORCHRUN | {"MASTER_ADDR": " "}, "MASTER_ADDR is not set"),
        (without("MASTER_PORT"), "MASTER_PORT is not set"),
        (without("RANK"), "RANK is not set, although WORLD_SIZE is 4"),
        ({"RANK": "1"}, "RANK is 1, but WORLD_SIZE is not set"),
        (TORCHRUN | {"RANK": "x"}, "variable RANK is 'x', no number from 0 to 3"),
        (TORCHRUN | {"RANK": "4"}, "variable RANK is '4', no number from 0 to 3"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "variable WORLD_SIZE is '', no number of at least 1"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "variable WORLD_SIZE is 'two'"),
        (TORCHRUN | {"LOCAL_RANK": "-1"}, "variable LOCAL_RANK is '-1'"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK 2 is not below LOCAL_WORLD_SIZE 2"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "variable LOCAL_WORLD_SIZE is '9', no number from 1 to 4"),
        (TORCHRUN | {"MASTER_PORT": "abc"}, "variable MASTER_PORT is 'abc', no number from 1 to 65535"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "variable MASTER_PORT is '70000'"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "task 1 of 2 .*srun --ntasks-per-node=1 torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "task 0 of 8"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}, "task 2 of 4 .*--nproc_per_node=4"),
        ({"PMI_SIZE": "4", "PMI_RANK": "2"}, "task 2 of 4 .*torchrun"),
    ],
)
def test_wrong_variables_are_named(environ: dict[str, str], message: str):
    with pytest.raises(UserError, match=message) as refusal:
        read_launch(environ)
    assert "torchrun" in str(refusal.value)


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_NTASKS": "8"},  # an interactive allocation: no task of it
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # srun -n 1 within it
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "WORLD_SIZE": "1"},
    ],
)
def test_a_single_process_within_an_allocation_is_alone(environ: dict[str, str]):
    assert read_launch(environ) == Launch(0, 1, 0, 1)


def test_an_unknown_host_is_named(monkeypatch: pytest.MonkeyPatch):
    def unknown(host: str, port: int) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(launch, "_RESOLVE_SECONDS", 0.0)
    monkeypatch.setattr(launch, "_RESOLVE_PAUSE", 0.001)
    with pytest.raises(UserError, match=r"MASTER_ADDR node7: no such host \(Name or service not known\)"):
        resolve_master(TORCHRUN | {"MASTER_ADDR": "node7"})


def test_a_port_in_use_is_named_without_a_word_of_the_timeout(monkeypatch: pytest.MonkeyPatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: False)
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"MASTER_PORT: port {port} is in use") as refusal:
            with process_group.process_group(timeout=1800):
                pass
    assert "TIMEOUT" not in str(refusal.value) and not isinstance(refusal.value, LostProcess)


@pytest.mark.parametrize(("timeout", "expected"), [(0, r"within 0 s \(TIMEOUT\)"), (1800, "within 0 s: ")])
def test_the_timeout_is_named_only_where_it_was_waited_for(timeout: int, expected: str, monkeypatch):
    def fails(*args, **kwargs):
        raise dist.DistNetworkError("connection reset")

    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(process_group.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "rendezvous", fails)
    with pytest.raises(LostProcess, match=expected):
        with process_group.process_group(timeout):
            pass
