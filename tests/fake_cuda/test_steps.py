"""The training step on the stand-in CUDA runtime: the host never waits for the device, and launches are bounded."""

import json
import sys

import pytest

from tests.fake_cuda.run import fake_environment, run_on_fake_cuda

# Launches of a step of configs/demo.yaml with torch 2.14.1. More of them make a slower step where the CPU is the
# bottleneck: find the new kernels with --by-name (README.md) before changing a number.
LAUNCHES = {
    "bfloat16": 411,
    "bfloat16 parameters": 393,
    "float16 with loss scaling": 414,
    "moving average": 412,
    "two accumulation steps": 841,
    "ddp": 476,
    "compiled": 288,
    "ddp, compiled": 356,
}
TOLERANCE = 1.1  # other versions of PyTorch fuse a little more or less
OPTS = {
    "bfloat16": ["AMP_DTYPE", "bfloat16"],
    "bfloat16 parameters": ["AMP_DTYPE", "bfloat16", "TRAIN.BF16_PARAMS", "True"],
    "float16 with loss scaling": ["AMP_DTYPE", "float16"],
    "moving average": ["AMP_DTYPE", "bfloat16", "TRAIN.EMA_DECAY", "0.999"],
    "two accumulation steps": ["AMP_DTYPE", "bfloat16", "TRAIN.ACCUMULATION_STEPS", "2"],
    "ddp": ["AMP_DTYPE", "bfloat16"],
    "compiled": ["AMP_DTYPE", "bfloat16"],
    "ddp, compiled": ["AMP_DTYPE", "bfloat16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTS)
def test_step_never_waits_and_launches_few_kernels(name: str):
    command = [sys.executable, "-m", "tests.fake_cuda.steps", "configs/demo.yaml"]
    command += ["--ddp"] if name.startswith("ddp") else []
    command += ["--opts", "TRAIN.COMPILE", str(name.endswith("compiled")), *OPTS[name]]
    done = run_on_fake_cuda(command, fake_environment())
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["syncs"] == 0
    assert 0 < measured["launches"] <= TOLERANCE * LAUNCHES[name]
