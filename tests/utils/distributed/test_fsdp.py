"""TRAIN.PARALLEL fsdp computes what ddp computes, and its checkpoints are anybody's."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.tensor import DTensor
from yacs.config import CfgNode

from config import get_config
from engine.setup import apply_fsdp, build_components, compile_and_wrap
from engine.train_step import TrainComponents, TrainState, train_steps
from main import main
from utils.distributed.fsdp import summon_full_params
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.paths import REPO_ROOT

TINY = """
DATA: {IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 0}
MODEL:
  NAME: tiny
  NUM_CLASSES: 0
  DROP_PATH_RATE: 0.1
  SWIN: {EMBED_DIM: 16, DEPTHS: [2, 2], NUM_HEADS: [1, 2], WINDOW_SIZE: 4}
TRAIN: {EPOCHS: 3, WARMUP_EPOCHS: 1, BASE_LR: 0.05, EMA_DECAY: 0.9}
AMP_ENABLE: False
PRINT_FREQ: 1
"""
ALONE = DistInfo.single(torch.device("cpu"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(TINY)
    return tmp_path / "tiny.yaml"


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(recipe: Path, **opts) -> tuple[CfgNode, TrainComponents]:
    opts |= {"MODEL__NUM_CLASSES": 2}
    config = get_config(str(recipe), [word for pair in opts.items() for word in (pair[0].replace("__", "."), pair[1])])
    return config, build_components(config, ALONE, None)


def make_steps(components: TrainComponents, number: int) -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [
        {"image": torch.randn(4, 3, 32, 32, generator=draw), "target": torch.tensor([0, 1, 1, 0]), "position": 4 * i}
        for i in range(number)
    ]
    for metrics in train_steps(components, batches, TrainState(), lambda step: 1e-3, global_batch_size=4):
        metrics.sync_and_reset()


def assert_close(one: dict, other: dict, where: str = "") -> None:
    """The same entries all the way down, of the same kinds, and equal to a few roundings."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert type(other[key]) is type(value), key
        if isinstance(value, dict):
            assert_close(value, other[key], f"{where}.{key}")
        elif isinstance(value, torch.Tensor):
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=f"{where}.{key}")


def test_sharded_components_resume_from_and_save_full_state_dicts(recipe, one_process_group):
    config, plain = build(recipe)
    _, split = build(recipe)
    make_steps(plain, 2)
    split.load_state_dict(copy.deepcopy(plain.state_dict()))  # as from a file: nothing is shared
    split = apply_fsdp(config, ALONE, split)
    assert all(isinstance(parameter, DTensor) for parameter in split.module_without_ddp.parameters())
    make_steps(plain, 3)
    make_steps(split, 3)
    assert_close(plain.state_dict(), split.state_dict())
    assert not any(isinstance(value, DTensor) for value in split.state_dict()["model"].values())
    plain.load_state_dict(split.state_dict())  # and back


def test_full_params_compute_the_same_and_are_sharded_again_afterwards(recipe, one_process_group):
    config, components = build(recipe)
    components = apply_fsdp(config, ALONE, components)
    image = torch.zeros(1, 3, 32, 32)
    components.module_without_ddp.eval()
    with torch.no_grad():
        before = components.module_without_ddp.model(image)
    with summon_full_params(components.module_without_ddp), torch.inference_mode():
        assert not any(isinstance(parameter, DTensor) for parameter in components.module_without_ddp.parameters())
        assert torch.equal(components.module_without_ddp.model(image), before)
        assert torch.equal(components.module_without_ddp.model(image), before)
    assert all(isinstance(parameter, DTensor) for parameter in components.module_without_ddp.parameters())
    make_steps(components, 1)


def test_float16_is_refused(recipe, one_process_group):
    config, components = build(recipe)
    components = replace(components, scaler=torch.amp.GradScaler("cpu", enabled=True))
    with pytest.raises(UserError, match="AMP_DTYPE bfloat16"):
        apply_fsdp(config, ALONE, components)


def test_a_single_rank_is_not_sharded(recipe):
    config, components = build(recipe, TRAIN__PARALLEL="fsdp")
    components = compile_and_wrap(config, ALONE, components)
    assert not any(isinstance(parameter, DTensor) for parameter in components.module_without_ddp.parameters())


@pytest.mark.slow
def test_two_ranks_train_the_same_with_fsdp_as_with_ddp(recipe: Path, tmp_path: Path):
    """The same losses as ddp; killed and continued to the same bits; evaluated by one process without fsdp."""
    # 9 validation images: one process has two batches of them, the other has one
    for split, counts in (("train", (11, 11)), ("val", (5, 4))):
        for name, colour, count in zip(("blue", "green"), ((30, 30, 220), (30, 220, 30)), counts, strict=True):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                shade = tuple(min(255, c + 5 * i) for c in colour)
                Image.new("RGB", (40, 36), shade).save(tmp_path / "data" / split / name / f"{i}.jpg")
    where = ["--cfg", str(recipe), "--data-path", str(tmp_path / "data"), "--output", str(tmp_path / "logs")]

    def run(tag: str, *words: str) -> list[dict]:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        command = [*start, str(REPO_ROOT / "main.py"), *where, "--tag", tag, *words]
        subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
        lines = (tmp_path / "logs" / "tiny" / tag / "metrics.jsonl").read_text().splitlines()
        return [record for line in lines if "loss" in (record := json.loads(line))]

    ddp = run("ddp")
    fsdp = run("fsdp", "--opts", "TRAIN.PARALLEL", "fsdp")
    assert len(ddp) == len(fsdp) > 6
    for one, other in zip(ddp, fsdp, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    folder = tmp_path / "logs" / "tiny" / "fsdp" / "checkpoints"
    run("again", "--resume", str(folder / "epoch_0002.pth"), "--opts", "TRAIN.PARALLEL", "fsdp")
    uninterrupted = torch.load(folder / "last.pth", weights_only=True)
    continued = torch.load(folder.parent.parent / "again" / "checkpoints" / "last.pth", weights_only=True)
    for part in ("model", "ema"):
        for name, tensor in uninterrupted[part].items():
            assert torch.equal(continued[part][name], tensor), name
    assert main([*where, "--eval", "--resume", str(folder / "best.pth"), "--tag", "eval"]) == 0
