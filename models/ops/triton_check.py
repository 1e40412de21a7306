"""Decides whether the Triton kernels can be used: their limits, then a self-test on this machine.

A new driver, GPU or version of Triton may fail to compile the kernels, or compile them wrongly.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from models.ops import reference
from models.ops.spec import AttentionSpec
from models.ops.window import ShiftedWindows

log = logging.getLogger(__name__)

# Largest error allowed, relative to the largest value: a few units in the last place of each dtype.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@functools.cache
def unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the kernels do not support `spec`; empty if they do and have passed their self-test."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch brings it along on Linux)"
    if not spec.gradients:
        return unsupported_reason(spec._replace(gradients=True))  # one self-test for both
    from models.ops import triton_attention  # slow to import

    return triton_attention.unsupported_spec(spec) or ("" if triton_attention.INTERPRETED else self_test(spec))


def self_test(spec: AttentionSpec) -> str:
    """Runs the kernels on a small input, shifted and not, and returns what went wrong; empty if nothing did.

    The input is two images of 3 × 3 windows and two heads. A program has six windows, as it has several in training.
    Output and all gradients are compared with the reference in float32.
    """
    for shifted in (False, True):
        if reason := _compare_with_reference(spec, shifted):
            return reason
    return ""


def _compare_with_reference(spec: AttentionSpec, shifted: bool) -> str:
    """Returns how the kernels differ from the reference; empty if they do not."""
    from models.ops import triton_attention

    device, dtype, head_dim, side = spec.device, spec.dtype, spec.head_dim, 3 * spec.window
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        generator = torch.Generator().manual_seed(0)
        qkv = torch.randn(2, side, side, 3, 2, head_dim, generator=generator).to(device, dtype)
        bias = torch.randn(2, spec.window**2, spec.window**2, generator=generator).to(device)
        grad_out = torch.randn(2, side, side, 2 * head_dim, generator=generator).to(device, dtype)
        scale = torch.tensor([5.0, 20.0], device=device) if spec.cosine else head_dim**-0.5
        windows = ShiftedWindows((side, side), spec.window, shifted).to(device)
        try:
            with triton_attention.limit_splits(3):
                actual = _output_and_gradients(triton_attention.window_attention, qkv, bias, windows, scale, grad_out)
        except Exception as error:  # a compiler or a driver may raise anything
            log.warning("The Triton kernels of window attention fail on this machine.", exc_info=True)
            return f"its kernels fail on this machine ({type(error).__name__})"
        expected = _output_and_gradients(
            reference.window_attention, qkv.float(), bias, windows, scale, grad_out.float()
        )
    for name, value in actual.items():
        worst = ((value - expected[name]).abs().max() / expected[name].abs().max()).item()
        if not worst < TOLERANCE[dtype]:  # NaN fails too
            return f"its kernels are wrong on this machine: relative error {worst:.1e} of {name} in {dtype}"
    return ""


def _output_and_gradients(
    attention: Callable[[Tensor, Tensor, ShiftedWindows, float | Tensor, float], Tensor],
    qkv: Tensor,
    bias: Tensor,
    windows: ShiftedWindows,
    scale: float | Tensor,
    grad_out: Tensor,
) -> dict[str, Tensor]:
    """Returns the output and the gradient of every input that is a tensor, by name."""
    inputs = {"qkv": qkv, "bias": bias} | ({"scale": scale} if isinstance(scale, Tensor) else {})
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    out = attention(leaves["qkv"], leaves["bias"], windows, leaves.get("scale", scale), 0.0)
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"output": out.detach()} | {f"the gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
