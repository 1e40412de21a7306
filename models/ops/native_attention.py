"""Window attention on the CPU by the C++ code in `native/`, as a custom operator that `torch.compile` does not split.

`swin::native_attention` has the gradient `swin::native_attention_backward`. Results are bitwise equal from run to run
and for any number of threads: one thread computes a window, and sums over windows are made in splits whose number does
not depend on the number of threads.
Shapes: `B` batch, `H W` token grid, `C` channels, `M` side of a window, `N` tokens in a window, `nH` heads, `d` head
dimension.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from models.ops.custom_op import dispatch, register_autograd
from models.ops.spec import AttentionSpec, unsupported_by_fused_kernel
from models.ops.window import ShiftedWindows
from utils.compile_native import CannotBuild, NativeLibrary

DTYPES = (torch.float32, torch.bfloat16)
MAX_TOKENS = 1024  # in a window: the scores of one head have to fit into a core's cache
VECTOR_WIDTH = 16  # floats in a vector
OUT_OF_MEMORY = "not enough memory for the buffers of a thread (window attention on the CPU)"
MAX_SPLITS = 32  # of the windows; each split sums its own gradients of the bias

LIBRARY = NativeLibrary(
    purpose="window attention for this CPU",
    folder=Path(__file__).with_name("native"),
    language="c++",
    flags=("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"),
)


@functools.cache
def unsupported_reason(spec: AttentionSpec) -> str:
    """Returns why the native code does not support `spec`; empty if it does."""
    if spec.device != "cpu":
        return f"it runs on the CPU, not on {spec.device}"
    if spec.head_dim % VECTOR_WIDTH:
        return f"the head dimension is {spec.head_dim}, not a multiple of {VECTOR_WIDTH}"
    if reason := unsupported_by_fused_kernel(spec, DTYPES, MAX_TOKENS):
        return reason
    try:
        LIBRARY.load()
    except CannotBuild as error:
        return str(error)
    return ""


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """See `models.ops.dispatch.window_attention`; `dropout_p` has to be 0."""
    if dropout_p:
        raise ValueError("the native code has no dropout of attention weights")
    return dispatch(attend, qkv.contiguous(), bias, windows, scale)


def _require(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype is not dtype:
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; the native code needs {dtype} {shape}")


def _shape(
    qkv: Tensor, bias: Tensor, head_scales: Tensor | None, window: int, shift_h: int, shift_w: int
) -> ctypes.Array:
    """Fills `Shape` of native/attention.cpp: B, H, W, nH, d, M and the shift.

    Raises:
        ValueError: the native code, which checks nothing, cannot compute with these arguments.
    """
    if qkv.dim() != 6 or qkv.shape[3] != 3 or qkv.shape[5] % VECTOR_WIDTH or qkv.dtype not in DTYPES:
        raise ValueError(f"qkv is {qkv.dtype} {tuple(qkv.shape)}; the native code needs (B, H, W, 3, nH, 16 n)")
    if not 1 <= window**2 <= MAX_TOKENS or min(shift_h, shift_w) < 0:
        raise ValueError(f"windows of {window} shifted by {shift_h} and {shift_w}: the native code has no such windows")
    num_heads = qkv.shape[4]
    _require("bias", bias, (num_heads, window**2, window**2), torch.float32)
    if head_scales is not None:
        _require("head_scales", head_scales, (num_heads,), torch.float32)
    B, H, W, _, _, head_dim = qkv.shape
    return (ctypes.c_long * 8)(B, H, W, num_heads, head_dim, window, shift_h, shift_w)


def _transpose_and_pad(bias: Tensor) -> Tensor:
    """Turns (nH, N queries, N keys) into (nH, N keys, N queries), the queries padded to whole vectors."""
    return F.pad(bias.transpose(1, 2), (0, -bias.shape[-1] % VECTOR_WIDTH)).contiguous()


def _scale_per_head(head_scales: Tensor | None, scale: float, num_heads: int) -> Tensor:
    return torch.full((num_heads,), scale) if head_scales is None else head_scales.contiguous()


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@torch.library.custom_op("swin::native_attention", mutates_args=(), device_types="cpu")
def attend(
    qkv: Tensor, bias: Tensor, head_scales: Tensor | None, scale: float, window: int, shift_h: int, shift_w: int
) -> Tensor:
    """Computes window attention: (B, H, W, 3, nH, d) to (B, H, W, C).

    Args:
        bias: (nH, N, N) float32.
        head_scales: (nH,) float32, factors of the cosines between queries and keys; None to use products and `scale`.
        shift_h, shift_w: the cyclic shift.
    """
    qkv = qkv.contiguous()
    shape = _shape(qkv, bias, head_scales, window, shift_h, shift_w)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    padded_bias, scales = _transpose_and_pad(bias), _scale_per_head(head_scales, scale, qkv.shape[4])
    failed = LIBRARY.load().window_attention_forward(
        shape, qkv.dtype is torch.bfloat16, _address(qkv), _address(padded_bias), _address(scales),
        head_scales is not None, _address(out), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(OUT_OF_MEMORY)
    return out


@torch.library.custom_op("swin::native_attention_backward", mutates_args=(), device_types="cpu")
def attend_backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor,
    head_scales: Tensor | None,
    scale: float,
    window: int,
    shift_h: int,
    shift_w: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of qkv, bias (float32) and head_scales (float32; empty if there are none)."""
    qkv, grad_out = qkv.contiguous(), grad_out.contiguous()
    shape = _shape(qkv, bias, head_scales, window, shift_h, shift_w)
    B, H, W, _, num_heads, head_dim = qkv.shape
    _require("grad_out", grad_out, (B, H, W, num_heads * head_dim), qkv.dtype)
    padded_bias, scales = _transpose_and_pad(bias), _scale_per_head(head_scales, scale, num_heads)
    splits = min(MAX_SPLITS, B * (H // window) * (W // window))
    grad_qkv = torch.empty_like(qkv)
    grad_bias = padded_bias.new_zeros(splits, *padded_bias.shape)
    grad_scales = padded_bias.new_zeros(splits, num_heads)
    failed = LIBRARY.load().window_attention_backward(
        shape, qkv.dtype is torch.bfloat16, _address(qkv), _address(padded_bias), _address(scales),
        head_scales is not None, _address(grad_out), _address(grad_qkv), _address(grad_bias), _address(grad_scales),
        ctypes.c_long(splits), torch.get_num_threads(),
    )  # fmt: skip
    if failed:
        raise MemoryError(OUT_OF_MEMORY)
    grad_bias = grad_bias.sum(0)[:, :, : bias.shape[-1]].transpose(1, 2).contiguous()
    return grad_qkv, grad_bias, bias.new_empty(0) if head_scales is None else grad_scales.sum(0)


register_autograd(attend, attend_backward)
