"""bfloat16 parameters with float32 masters: training, checkpoints, and resuming to the same bits."""

import copy
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from timm.utils import ModelEmaV3

from config import get_config
from engine.setup import build_components, compile_and_wrap
from engine.train_step import TrainComponents, TrainState, train_steps
from utils.compat import TorchDispatchMode
from utils.distributed.process_group import DistInfo
from utils.errors import UserError
from utils.paths import REPO_ROOT

CPU = torch.device("cpu")
ALONE = DistInfo.single(CPU)
OPTS = "DATA.IMG_SIZE 32 " + " ".join(
    f"MODEL.SWIN.{key}" for key in ("EMBED_DIM 16", "DEPTHS [2]", "NUM_HEADS [2]", "WINDOW_SIZE 4")
)
BATCH = 8


def make(bf16: bool, weights: dict | None = None, more: str = "") -> TrainComponents:
    opts = f"{OPTS} MODEL.NUM_CLASSES 5 AMP_DTYPE bfloat16 TRAIN.EMA_DECAY 0.9 TRAIN.BF16_PARAMS {bf16} {more}"
    config = get_config(None, opts.split())
    components = build_components(config, ALONE, None)
    if weights is not None:
        components.load_state_dict(weights)
    return compile_and_wrap(config, ALONE, components)


def batches(first: int, last: int) -> list[dict]:
    made = []
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        target = torch.randint(5, (BATCH,), generator=generator)
        image = torch.randn(BATCH, 3, 32, 32, generator=generator)
        made.append({"image": image, "target": target, "position": number * BATCH})
    return made


def run(components: TrainComponents, given: list[dict], state: TrainState | None = None) -> list[float]:
    """Returns the loss of each step."""
    state = state or TrainState()
    rate, size = 2e-3, BATCH * components.grad_accum_steps
    return [each.sync_and_reset()["loss"] for each in train_steps(components, given, state, lambda step: rate, size)]


def assert_same(one: object, other: object) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_matrices_compute_in_bfloat16_and_are_saved_in_float32():
    components, plain = make(True), make(False)
    types = {name: parameter.dtype for name, parameter in components.module_without_ddp.model.named_parameters()}
    assert types["layers.0.blocks.0.attn.qkv.weight"] == types["head.weight"] == torch.bfloat16
    assert types["layers.0.blocks.0.attn.relative_position_bias_table"] == torch.float32
    assert types["layers.0.blocks.0.norm1.weight"] == types["head.bias"] == torch.float32
    assert_same(
        components.state_dict(), plain.state_dict()
    )  # as if there were no bfloat16: readable without the option
    run(components, batches(0, 3))
    saved = components.state_dict()
    assert {value.dtype for value in saved["model"].values()} == {torch.float32}
    for name, parameter in components.module_without_ddp.model.named_parameters():
        assert torch.equal(parameter, saved["model"][name].to(parameter.dtype)), name
    master = saved["model"]["head.weight"]
    assert not torch.equal(master, master.bfloat16().float())  # learnt finer than bfloat16 can say


@pytest.mark.parametrize("steps", [1, 2])
def test_it_learns_the_same_bits_as_float32_parameters(steps: int):
    """Autocast rounds the same weights and the same gradients, each time anew; micro-batches add up in float32."""
    half, full = (make(bf16, more=f"TRAIN.ACCUMULATION_STEPS {steps}") for bf16 in (True, False))
    assert run(half, batches(0, 6)) == run(full, batches(0, 6))
    assert_same(half.state_dict(), full.state_dict())


def test_gradients_are_cast_and_summed_in_few_operations():
    components = make(True, more="TRAIN.ACCUMULATION_STEPS 2")
    bf16 = components.bf16
    with torch.no_grad():
        expected = []
        for copy in bf16.bf16_params:
            copy.grad = torch.full_like(copy, 1.5)
            expected.append(copy.grad.float() * 2)
    for _ in range(2):
        for copy in bf16.bf16_params:
            copy.grad = torch.full_like(copy, 1.5)
        with CountOperations() as counted:
            bf16.accumulate_master_grads()
        assert {name: count for name, count in counted.items() if name != "aten.empty_like"}.keys() <= {
            "aten._foreach_copy_", "aten._foreach_add_"
        }  # fmt: skip
        assert all(copy.grad is None for copy in bf16.bf16_params)
    assert_same([master.grad for master in bf16.masters.values()], expected)


class CountOperations(TorchDispatchMode):
    def __enter__(self) -> Counter:
        super().__enter__()
        self.counts: Counter = Counter()
        return self.counts

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[str(operation.overloadpacket)] += 1
        return operation(*args, **(kwargs or {}))


def test_resumed_it_has_the_same_bits():
    through, first = make(True), make(True)
    run(through, batches(0, 5))
    state = TrainState()
    run(first, batches(0, 3), state)
    second = make(True, copy.deepcopy(first.state_dict()))
    run(second, batches(3, 5), state)
    assert_same(second.state_dict(), through.state_dict())


def test_averages_are_those_of_the_masters():
    components = make(True)
    twin = ModelEmaV3(components.ema.module, decay=0.9)
    run(components, batches(0, 1))
    twin.update(components.module_without_ddp)
    average = components.ema.module.model.state_dict()
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert_same(dict(average), dict(twin.module.model.state_dict()))


def test_cosine_attention_too():
    section = "MODEL.SWINV2"
    more = f"MODEL.TYPE swinv2 {section}.EMBED_DIM 16 {section}.DEPTHS [2] {section}.NUM_HEADS [2]"
    components = make(True, more=more)
    assert components.module_without_ddp.model.layers[0].blocks[0].attn.cpb_mlp[0].weight.dtype == torch.float32
    assert all(loss > 0 for loss in run(components, batches(0, 2)))


@pytest.mark.parametrize("name", ["float32", "float16"])
def test_other_types_are_refused(name: str):
    with pytest.raises(UserError, match=f"TRAIN.BF16_PARAMS.*{name}.*AMP_DTYPE bfloat16"):
        make(True, more=f"AMP_DTYPE {name}")


@pytest.mark.slow
def test_two_processes(tmp_path: Path):
    """They sum gradients in bfloat16: the losses are those without the key, but for that; continued, the same bits."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"]
    launch += ["--cfg", "configs/demo.yaml", "--data-path", str(tmp_path / "digits"), "--output", str(tmp_path)]
    opts = "TRAIN.EPOCHS 2 TRAIN.WARMUP_EPOCHS 1 SAVE_FREQ 1 DATA.NUM_WORKERS 0 AMP_DTYPE bfloat16 TRAIN.BF16_PARAMS"
    alone = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

    def run(tag: str, bf16: bool, *words: str) -> dict:
        command = [*launch, "--tag", tag, *words, "--opts", *opts.split(), str(bf16)]
        subprocess.run(command, check=True, cwd=REPO_ROOT, env=alone, timeout=280)
        return torch.load(tmp_path / "demo" / tag / "checkpoints" / "last.pth", weights_only=True)

    def losses(tag: str) -> list[float]:
        """Compares the first steps only: rounding differences grow."""
        lines = (tmp_path / "demo" / tag / "metrics.jsonl").read_text().splitlines()[:3]
        return [json.loads(line)["loss"] for line in lines]

    through = run("through", True)
    again = run("again", True, "--resume", str(tmp_path / "demo" / "through" / "checkpoints" / "epoch_0001.pth"))
    assert_same(again["model"], through["model"])
    assert_same(again["optimizer"]["state"], through["optimizer"]["state"])
    assert {value.dtype for value in through["model"].values()} == {torch.float32}
    run("plain", False)
    assert losses("through") == pytest.approx(losses("plain"), rel=1e-3)
    assert losses("through") != losses("plain")
