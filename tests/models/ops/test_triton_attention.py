"""The Triton kernels of window attention against the definition, on a GPU or in Triton's interpreter.

The interpreter has to be enabled before Triton is imported: `test_by_the_interpreter` runs this file in a subprocess.
By hand: `TRITON_INTERPRET=1 python -m pytest tests/models/ops/test_triton_attention.py`.
"""

import functools
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import numpy as np
import pytest
import torch
from packaging.version import Version
from torch import nn

from models.ops import dispatch as ops
from models.ops import triton_check
from models.ops.spec import AttentionSpec
from tests._attention import AttentionCase, assert_matches_definition, output_and_gradients
from tests._swin import assert_same_gradients, logits_and_gradients, small, spread
from tests._swin_v2 import small_v2, spread_v2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
attend = functools.partial(ops.window_attention, impl="triton")


def kernels(*marks: pytest.MarkDecorator) -> Callable:
    """Marks tests that run the kernels: they need a GPU or the interpreter."""

    def mark(test: Callable) -> Callable:
        for each in marks if INTERPRETED else (*marks, pytest.mark.gpu):
            test = each(test)
        return pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a GPU or the interpreter")(test)

    return mark


# Checked: Triton 3.6 (torch 2.11) works with numpy 2.3 and fails with 2.4 and 2.5; Triton 3.8 works with numpy 2.4.
INTERPRETER_FAILS = (
    importlib.util.find_spec("triton") is not None
    and Version(metadata.version("triton")) < Version("3.8")
    and Version(np.__version__) >= Version("2.4")
)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("markers", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.skipif(INTERPRETED, reason="runs in the interpreter already")
@pytest.mark.skipif(INTERPRETER_FAILS, reason="Triton's interpreter before 3.8 fails with numpy 2.4 and newer")
def test_by_the_interpreter(markers: str):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", markers, __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= (25 if markers == "not slow" else 12), done.stdout


CASES = [
    AttentionCase(3, (6, 3), False, head_dim=8),
    AttentionCase(4, (8, 8), True, num_heads=1, batch_size=3),
    AttentionCase(3, (9, 6), True, cosine=True, head_dim=24),  # head_dim is not a power of 2
    AttentionCase(4, (4, 12), True, cosine=True, num_heads=1),  # a single window along one axis
]
LARGE = [  # more than 64 tokens: several tiles
    AttentionCase(9, (9, 18), True, num_heads=1, batch_size=1),
    AttentionCase(12, (12, 24), True, cosine=True, num_heads=1, batch_size=1),
]


@kernels()
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_and_gradients(case: AttentionCase, dtype: torch.dtype):
    assert_matches_definition(attend, case, dtype, DEVICE)


@kernels()
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_windows(case: AttentionCase):
    assert_matches_definition(attend, case, torch.float16 if case.cosine else torch.float32, DEVICE)


@kernels()
@pytest.mark.parametrize(
    ("case", "num_splits"),
    [
        (AttentionCase(3, (6, 9), False, head_dim=8, num_heads=1), 3),  # 12 windows in all
        (AttentionCase(3, (6, 9), True, head_dim=8, num_heads=1), 2),  # 4 of 12 windows without a mask
        (AttentionCase(2, (4, 6), True, cosine=True, head_dim=8, num_heads=1, batch_size=3), 3),
        (AttentionCase(9, (18, 18), True, num_heads=1, head_dim=8), 2),  # several tiles
    ],
    ids=str,
)
def test_many_windows_a_program(case: AttentionCase, num_splits: int, monkeypatch):
    """The loop over windows, with its mask and the sums that it accumulates, and the sum over splits."""
    from models.ops import triton_attention

    monkeypatch.setattr(triton_attention, "num_splits", lambda *arguments: num_splits)
    assert_matches_definition(attend, case, torch.float32, DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cosine", [False, True], ids=["products", "cosines"])
def test_many_images(cosine: bool, dtype: torch.dtype):
    """As in training: some 20 windows for each program, at the splits that are chosen for the GPU."""
    assert_matches_definition(attend, AttentionCase(4, (8, 8), True, cosine, batch_size=1200), dtype, DEVICE)


@kernels(pytest.mark.slow)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        AttentionCase(7, (14, 14), True, head_dim=32),
        AttentionCase(8, (16, 8), True, cosine=True, head_dim=64, num_heads=1),
        AttentionCase(12, (24, 12), True, head_dim=32, num_heads=1, batch_size=1),
        AttentionCase(16, (16, 32), True, cosine=True, head_dim=32, num_heads=1, batch_size=1),
    ],
    ids=str,
)
def test_windows_of_the_papers(case: AttentionCase, dtype: torch.dtype):
    assert_matches_definition(attend, case, dtype, DEVICE)


@kernels()
@pytest.mark.parametrize("case", [CASES[1], LARGE[0]], ids=str)
def test_bitwise_equal_from_run_to_run(case: AttentionCase):
    """The gradient of the bias is a sum over windows: its order must not depend on which program finishes first."""
    first, second = (output_and_gradients(attend, case, torch.bfloat16, DEVICE) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@kernels()
@pytest.mark.parametrize(
    "scales", [pytest.param(None, marks=pytest.mark.slow), torch.tensor([3.0, 7.0])], ids=["products", "cosines"]
)
def test_passes_opcheck(scales: torch.Tensor | None):
    from models.ops.triton_attention import attend as operator

    qkv = torch.randn(1, 6, 3, 3, 2, 8, device=DEVICE, requires_grad=True)
    bias = torch.randn(2, 9, 9, device=DEVICE, requires_grad=True)
    if scales is not None:
        scales = scales.to(DEVICE).requires_grad_()
    torch.library.opcheck(operator, (qkv, bias, scales, 0.3, 3, 1, 0))


def models(version: int, img_size: int = 16) -> tuple[nn.Module, nn.Module]:
    """Returns two models with the same weights: the reference in float64, and the kernels."""
    pair = []
    for attn in ("reference", "triton"):
        arguments = {"img_size": img_size, "window_size": 2, "depths": (2,), "num_heads": (2,), "attn": attn}
        model = spread(small(**arguments)) if version == 1 else spread_v2(small_v2(**arguments), past_limit=2.0)
        pair.append(model.to(DEVICE))
    return pair[0].double(), pair[1]


@kernels()
@pytest.mark.parametrize("version", [1, 2])
def test_whole_model(version: int):
    """Logits and every gradient, with shifted blocks and padded maps."""
    reference_model, model = models(version)
    images = torch.randn(1, 3, 15, 12, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected, expected_gradients = logits_and_gradients_on(reference_model, images.double())
    logits, gradients = logits_and_gradients_on(model, images)
    torch.testing.assert_close(logits.double(), expected, atol=1e-5, rtol=0)
    assert_same_gradients(gradients, expected_gradients, tolerance=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).double(), expected, atol=1e-5, rtol=0)


@kernels(pytest.mark.slow)
@pytest.mark.parametrize("version", [1, 2])
def test_compiles_without_a_break(version: int):
    _, model = models(version)
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    expected, expected_gradients = logits_and_gradients_on(model, images)
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    logits, gradients = logits_and_gradients_on(compiled, images)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert_same_gradients({n.removeprefix("_orig_mod."): g for n, g in gradients.items()}, expected_gradients)


def logits_and_gradients_on(model: torch.nn.Module, images: torch.Tensor):
    """Runs `logits_and_gradients` on DEVICE and returns its results on the CPU."""
    logits, gradients = logits_and_gradients(model, images)
    return logits.cpu(), {name: gradient.cpu() for name, gradient in gradients.items()}


@kernels()
@pytest.mark.skipif(INTERPRETED, reason="autocast on the CPU differs from autocast on a GPU")
def test_selected_on_a_gpu_under_autocast(caplog):
    ops._log_once.cache_clear()
    caplog.set_level(logging.INFO)
    _, model = models(1)
    for block in model.blocks():
        block.attn.impl = "auto"
    with torch.autocast("cuda", torch.bfloat16):
        model(torch.randn(2, 3, 16, 16, device="cuda")).sum().backward()
    assert "Window attention for training on cuda: triton (requested: auto)" in caplog.text


SPEC = AttentionSpec("cpu", torch.float32, 2, 8, False, True, False, True)


@kernels()
@pytest.mark.parametrize("broken", ["masked", "unmasked", "accumulated"])
def test_self_test_covers_the_loop_over_windows(broken: str, monkeypatch):
    """Each error is only visible in some windows, or where a program has more than one."""
    from models.ops import triton_attention

    spec = SPEC._replace(device=DEVICE)
    launch = triton_attention.launch

    def launch_wrongly(kernel: str, qkv, window: int, splits: int, *arguments, shifts, cosine: bool) -> None:
        launch(kernel, qkv, window, splits, *arguments, shifts=shifts, cosine=cosine)
        assert splits == 3
        if kernel == "forward" and broken == "masked" and any(shifts):
            arguments[-1][:, -1, -1] += 1  # a token of the last window
        if kernel == "forward" and broken == "unmasked" and not any(shifts):
            arguments[-1][:, 0, 0] += 1
        if kernel == "backward_queries" and broken == "accumulated":
            arguments[6][1:] = 0  # the sums of all programs but the first

    monkeypatch.setattr(triton_attention, "launch", launch_wrongly)
    assert "wrong on this machine" in triton_check.self_test(spec)


@kernels()
def test_self_test_finds_wrong_and_failing_kernels(monkeypatch):
    from models.ops import triton_attention

    spec = SPEC._replace(device=DEVICE)
    state = torch.random.get_rng_state()
    assert triton_check.self_test(spec._replace(cosine=True)) == ""
    assert torch.equal(torch.random.get_rng_state(), state)
    correct = triton_attention.window_attention
    monkeypatch.setattr(triton_attention, "window_attention", lambda *args: correct(*args) * 1.01)
    assert re.fullmatch(
        "its kernels are wrong on this machine: relative error 1.0e-02 .*", triton_check.self_test(spec)
    )
    monkeypatch.setattr(triton_attention, "window_attention", lambda *args: correct(*args) * float("nan"))
    assert "wrong" in triton_check.self_test(spec)

    def broken(*args):
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(triton_attention, "window_attention", broken)
    assert triton_check.self_test(spec) == "its kernels fail on this machine (RuntimeError)"


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "it has no torch.float64"),
        ({"window": 17}, "a window has 289 tokens, more than 256"),
        ({"head_dim": 80}, "the head dimension is 80, more than 64"),
        ({"dropout": True}, "no dropout.*MODEL.ATTN_DROP_RATE"),
        ({"cyclic": False}, "not cut by a cyclic shift"),
    ],
)
def test_unsupported_reason(changes: dict, reason: str):
    from models.ops import triton_attention

    if not INTERPRETED:
        assert "it runs on CUDA devices, not on cpu" in triton_check.unsupported_reason(SPEC)
    else:
        assert triton_check.unsupported_reason(SPEC) == ""
        assert re.search(reason, triton_attention.unsupported_spec(SPEC._replace(**changes)))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(triton_check.importlib.util, "find_spec", lambda name: None)
    triton_check.unsupported_reason.cache_clear()
    assert triton_check.unsupported_reason(SPEC) == "Triton is not installed (PyTorch brings it along on Linux)"
    triton_check.unsupported_reason.cache_clear()


def test_bytes_are_counted_without_a_gpu():
    """The kernels read and write each tensor once, shifted or not; SDPA also reads a mask for every image."""
    from benchmarks.window_attention import STAGES, AttentionCall, count_bytes

    floor = AttentionCall(STAGES[2], False, "reference", 3, "cpu").floor()
    triton, shifted = (count_bytes(STAGES[2], shift, "triton", 3) for shift in (False, True))
    sdpa, sdpa_shifted = (count_bytes(STAGES[2], shift, "sdpa", 3) for shift in (False, True))
    assert triton == shifted == floor
    assert sdpa[0] > 1.5 * floor[0] and sdpa_shifted[0] > 2 * sdpa[0] and sdpa[1] > 1.5 * floor[1]
