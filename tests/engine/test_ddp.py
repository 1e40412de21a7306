"""Training steps under DDP in a process group of one: NCCL on a GPU, gloo on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from config import get_config
from engine.setup import build_components, compile_and_wrap
from engine.train_step import TrainComponents, TrainState, train_steps
from tests._process_group import group_of_one
from utils.distributed.process_group import DistInfo, barrier, broadcast_from_main, sum_across
from utils.paths import REPO_ROOT

BATCH_SIZE, STEPS = 4, 4
OPTS = ["DATA.BATCH_SIZE", BATCH_SIZE, "MODEL.DROP_PATH_RATE", 0.0, "TRAIN.BASE_LR", 1e-3]


def trained_change(device: torch.device, ddp: bool, *opts: object) -> torch.Tensor:
    """Trains a few steps on one batch and returns how much each parameter changed."""
    config = get_config(REPO_ROOT / "configs" / "demo.yaml", [*OPTS, *opts])
    dist_info = DistInfo.single(device)
    components = build_components(config, dist_info, None)
    before = all_parameters(components)
    # A single process is not wrapped: only the world size says two, the process group is of one.
    components = compile_and_wrap(config, replace(dist_info, world_size=2) if ddp else dist_info, components)
    assert isinstance(components.task, DistributedDataParallel) == ddp
    batch = components.module_without_ddp.example_batch(BATCH_SIZE, device)
    state = TrainState()
    for _ in train_steps(components, [batch] * STEPS, state, lambda step: 1e-3, BATCH_SIZE):
        pass
    assert state.images_seen == BATCH_SIZE * STEPS and state.skipped == 0
    return all_parameters(components) - before


def all_parameters(components: TrainComponents) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in components.module_without_ddp.parameters()])


@pytest.mark.parametrize(
    ("device", "compiled"),
    [
        ("cpu", False),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
    ids=["cpu", "gpu", "gpu, compiled"],
)
def test_steps_under_ddp_are_those_of_one_process(device: str, compiled: bool):
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    amp = ["AMP_DTYPE", "bfloat16"] if device == "cuda" else ["AMP_ENABLE", False]
    opts = [*amp, "TRAIN.COMPILE", compiled]
    torch.compiler.reset()
    alone = trained_change(place, False, *opts)
    with group_of_one(place):
        assert torch.distributed.get_backend() == ("nccl" if device == "cuda" else "gloo")
        assert broadcast_from_main({"a": 1}) == {"a": 1}
        barrier()
        total = sum_across(torch.ones(2, device=place))
        torch.compiler.reset()
        together = trained_change(place, True, *opts)
    assert total.tolist() == [1.0, 1.0]
    # Compiled code is cut at the buckets of DDP, which changes what is rounded to bfloat16.
    tolerance = 0.2 if compiled else 0.02 if device == "cuda" else 1e-5
    assert alone.norm() > 0
    assert (together - alone).norm() <= tolerance * alone.norm()
