"""utils/distributed/buffers.py: ranks that saw other images evaluate and save the same running statistics."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn

from engine import evaluation
from engine.train_step import TrainComponents
from tasks.classification import Classification
from utils.distributed.buffers import average_buffers

RANKS = 3  # a mean over three ranks rounds


class WithBuffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("constant", torch.tensor([0.1, 1 / 3]))
        self.register_buffer("derived", torch.rand(2), persistent=False)
        self.head = nn.Linear(3, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(image).mean((2, 3)))


def images(rank: int) -> torch.Tensor:
    return torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(rank)) * (1 + rank)


def on_all_ranks(tmp_path: Path, function: Callable[[int], object]) -> list:
    """Runs `function` in a forked process for each rank, and returns the results by rank."""
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=rank, world_size=RANKS)
                torch.save(function(rank), tmp_path / f"{rank}.pt")
                dist.barrier()
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * RANKS
    return [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def build() -> TrainComponents:
    torch.manual_seed(0)
    task = Classification(WithBuffers())
    optimizer = torch.optim.SGD([{"params": list(task.parameters()), "names": ["a"], "lr_scale": 1.0}], lr=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return TrainComponents(task, optimizer, scaler, torch.device("cpu"), None, ema=ModelEmaV3(task, decay=0.5))


@pytest.mark.parametrize("when", ["save", "evaluation"])
def test_ranks_save_and_evaluate_the_mean_of_their_statistics(tmp_path: Path, when: str):
    def train(rank: int) -> dict:
        components = build()
        model = components.module_without_ddp.model
        model.train()
        for _ in range(2):
            model(images(rank))
        model.norm.num_batches_tracked += rank
        components.ema.update(components.module_without_ddp)
        own = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if when == "save":
            components.state_dict()
        else:
            evaluation.evaluate_model_and_ema(components, lambda: [])
        averaged = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return {"own": own, "averaged": averaged, "ema": components.ema.module.model.state_dict()}

    ranks = on_all_ranks(tmp_path, train)
    for name in ("norm.running_mean", "norm.running_var"):
        mean = torch.stack([rank["own"][name] for rank in ranks]).mean(0)
        assert not torch.equal(ranks[0]["own"][name], mean)
        for rank in ranks:
            torch.testing.assert_close(rank["averaged"][name], mean)
            assert torch.equal(rank["averaged"][name], ranks[0]["averaged"][name])
            assert torch.equal(rank["ema"][name], ranks[0]["ema"][name])
    for rank in ranks:
        assert rank["averaged"]["norm.num_batches_tracked"] == 2 + RANKS - 1
        for name in ("constant", "derived"):
            assert torch.equal(rank["averaged"][name], rank["own"][name])


def test_equal_buffers_keep_their_bits_and_other_models_send_nothing(monkeypatch: pytest.MonkeyPatch):
    sent = []

    def sum_of_equal_ranks(tensor: torch.Tensor, operation: object = dist.ReduceOp.SUM) -> None:
        sent.append(tensor.numel())
        if operation == dist.ReduceOp.SUM:
            tensor *= RANKS

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: RANKS)
    monkeypatch.setattr(dist, "all_reduce", sum_of_equal_ranks)
    module = WithBuffers()
    module(images(0))
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    average_buffers(module)
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
    assert sent == [8, 1]
    average_buffers(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)))
    assert len(sent) == 2
