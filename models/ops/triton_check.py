"""Whether the Triton kernels can be relied upon: for what they were written, and after they were tried on this machine.

A driver, a GPU or a version of Triton that nobody has used yet may fail to compile them, or compile them wrongly.
"""

import functools
import importlib.util
import logging

import torch
from torch import Tensor

from models.ops import reference
from models.ops.spec import AttentionSpec
from models.ops.window import ShiftedWindows

log = logging.getLogger(__name__)

# Largest error allowed, over the largest value: some units in the last place of each type.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@functools.cache
def unsupported_reason(case: AttentionSpec) -> str:
    """Why the kernels do not do a case, in words; empty where they do, and have shown it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (PyTorch brings it along on Linux)"
    if not case.gradients:
        return unsupported_reason(case._replace(gradients=True))  # tried once for both
    from models.ops import triton_attention  # takes its time

    return triton_attention.unsupported(case) or ("" if triton_attention.INTERPRETED else self_test(case))


def self_test(case: AttentionSpec) -> str:
    """What went wrong when the kernels were tried on something small, in words; empty where nothing did.

    Two images of 2 × 2 windows and two heads, shifted: output and all gradients against the reference in float32.
    """
    from models.ops import triton_attention

    device, dtype, side = case.device, case.dtype, 2 * case.window
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device, enabled=False):
        draw = torch.Generator().manual_seed(0)
        qkv = torch.randn(2, side, side, 3, 2, case.width, generator=draw).to(device, dtype)
        bias = torch.randn(2, case.window**2, case.window**2, generator=draw).to(device)
        gradient = torch.randn(2, side, side, 2 * case.width, generator=draw).to(device, dtype)
        scale = torch.tensor([5.0, 20.0], device=device) if case.cosine else case.width**-0.5
        windows = ShiftedWindows((side, side), case.window, shifted=True).to(device)
        try:
            found = _results(triton_attention.window_attention, qkv, bias, windows, scale, gradient)
        except Exception as error:  # whatever a compiler or a driver may raise
            log.warning("The Triton kernels of window attention fail on this machine.", exc_info=True)
            return f"its kernels fail on this machine ({type(error).__name__})"
        right = _results(reference.window_attention, qkv.float(), bias, windows, scale, gradient.float())
    for name, value, expected in zip(found, found.values(), right.values(), strict=True):
        error = ((value - expected).abs().max() / expected.abs().max()).item()
        if not error < TOLERANCE[dtype]:  # not a number is wrong too
            return f"its kernels are wrong on this machine: relative error {error:.1e} of {name} in {dtype}"
    return ""


def _results(
    function, qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, gradient: Tensor
) -> dict[str, Tensor]:
    """The output and the gradient of every input that is a tensor, by name."""
    given = {"qkv": qkv, "bias": bias} | ({"scale": scale} if isinstance(scale, Tensor) else {})
    leaves = [value.detach().clone().requires_grad_() for value in given.values()]
    out = function(*leaves[:2], windows, leaves[2] if len(leaves) == 3 else scale, 0.0)
    gradients = torch.autograd.grad(out, leaves, gradient)
    return {"output": out.detach()} | {f"the gradient of {name}": g for name, g in zip(given, gradients, strict=True)}
