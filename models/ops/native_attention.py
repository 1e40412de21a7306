"""Window attention on the CPU by `native_code/`, as a custom operator that `torch.compile` takes as a whole.

The operator `swin::native_attention` has a gradient, `swin::native_attention_backward`; both say what shapes they give
without running. Results are the same bits from run to run and for any number of threads: every window is computed by
one thread, and sums over windows are made in shares whose number does not depend on the threads.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.ops.custom_op import dispatch, register_autograd
from models.ops.spec import AttentionSpec
from utils.compile_native import CannotBuild, NativeLibrary

DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 1024  # of a window: the scores of one head are to stay in the processor's own cache
LANES = 16  # floats in a vector
SHARES = 32  # of the windows, each with its own sum of bias gradients

LIBRARY = NativeLibrary(
    purpose="window attention for this CPU",
    folder=Path(__file__).with_name("native"),
    language="c++",
    flags=("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
)


@functools.cache
def unsupported_reason(case: AttentionSpec) -> str:
    """Why it cannot do a case, in words; empty where it can."""
    if case.device != "cpu":
        return f"it runs on the CPU, not on {case.device}"
    if case.dtype not in DTYPES:
        return f"it has no {case.dtype}"
    if case.window**2 > MAX_TOKENS:
        return f"a window has {case.window**2} tokens, more than {MAX_TOKENS}"
    if case.width % LANES:
        return f"a head is {case.width} wide, not a multiple of {LANES}"
    if case.dropout:
        return "it has no dropout of attention weights (MODEL.ATTN_DROP_RATE)"
    if not case.cyclic:
        return "windows are not cut by a cyclic shift"
    try:
        LIBRARY.load()
    except CannotBuild as error:
        return str(error)
    return ""


def window_attention(qkv: Tensor, bias: Tensor, windows, scale: float | Tensor, dropout_p: float) -> Tensor:
    """See `models.ops.dispatch.window_attention`; `dropout_p` is 0."""
    return dispatch(attend, qkv.contiguous(), bias, windows, scale)


def _geometry(qkv: Tensor, window: int, down: int, right: int) -> ctypes.Array:
    """`Shape` in native_code/native.cpp: B, H, W, nH, d, M and the shift."""
    B, H, W, _, heads, width = qkv.shape
    return (ctypes.c_long * 8)(B, H, W, heads, width, window, down, right)


def _across(bias: Tensor) -> Tensor:
    """(nH, N keys, N queries), the queries filled up to whole vectors, of (nH, N queries, N keys)."""
    return F.pad(bias.transpose(1, 2), (0, -bias.shape[-1] % LANES)).contiguous()


def _factors(scales: Tensor | None, factor: float, heads: int) -> Tensor:
    return torch.full((heads,), factor) if scales is None else scales.contiguous()


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@torch.library.custom_op("swin::native_attention", mutates_args=(), device_types="cpu")
def attend(
    qkv: Tensor, bias: Tensor, scales: Tensor | None, factor: float, window: int, down: int, right: int
) -> Tensor:
    """(B, H, W, 3, nH, d) to (B, H, W, C).

    Args:
        bias: (nH, N, N) float32.
        scales: (nH,) float32, of the cosines between queries and keys; None for `factor` times their products.
        down, right: the cyclic shift.
    """
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    across, factors = _across(bias), _factors(scales, factor, qkv.shape[4])
    LIBRARY.load().window_attention_forward(
        _geometry(qkv, window, down, right), qkv.dtype is torch.bfloat16, _address(qkv), _address(across),
        _address(factors), scales is not None, _address(out), torch.get_num_threads(),
    )  # fmt: skip
    return out


@torch.library.custom_op("swin::native_attention_backward", mutates_args=(), device_types="cpu")
def attend_backward(
    gradient: Tensor,
    qkv: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    factor: float,
    window: int,
    down: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, bias (float32) and scales (float32; empty where there are none), given that of the output."""
    qkv, gradient = qkv.contiguous(), gradient.contiguous()
    B, H, W, _, heads, _ = qkv.shape
    across, factors = _across(bias), _factors(scales, factor, heads)
    shares = min(SHARES, B * -(-H // window) * -(-W // window))
    grad_qkv = torch.empty_like(qkv)
    grad_bias, grad_scales = across.new_zeros(shares, *across.shape), across.new_zeros(shares, heads)
    LIBRARY.load().window_attention_backward(
        _geometry(qkv, window, down, right), qkv.dtype is torch.bfloat16, _address(qkv), _address(across),
        _address(factors), scales is not None, _address(gradient), _address(grad_qkv), _address(grad_bias),
        _address(grad_scales), ctypes.c_long(shares), torch.get_num_threads(),
    )  # fmt: skip
    grad_bias = grad_bias.sum(0)[:, :, : bias.shape[-1]].transpose(1, 2).contiguous()
    return grad_qkv, grad_bias, bias.new_empty(0) if scales is None else grad_scales.sum(0)


register_autograd(attend, attend_backward)
