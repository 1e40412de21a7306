"""Window attention by the kernels of `triton_kernels.py`, as a custom operator that `torch.compile` does not split.

`swin::window_attention` has the gradient `swin::window_attention_backward`. Results are bitwise equal from run to run:
every sum has a fixed order.
Shapes: `B` batch, `H W` token grid, `C` channels, `M` side of a window, `N` tokens in a window, `nH` heads, `d` head
dimension.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops import triton_kernels as kernels
from models.ops.custom_op import dispatch, register_autograd
from models.ops.spec import AttentionSpec, unsupported_by_fused_kernel
from models.ops.window import ShiftedWindows

MAX_TOKENS = 256  # in a window: more do not fit into one tile
MAX_HEAD_DIM = 64
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, for tests
_max_splits = sys.maxsize  # see `limit_splits`


class TileConfig(NamedTuple):
    """How a kernel cuts a window: `block` tokens at a time; `padded_tokens`, N rounded up to a power of 2.

    A program has `num_warps` warps and prefetches `num_stages` - 1 windows. With these values, compiled for heads of
    32, almost no registers are spilled (`tests/models/ops/test_triton_compile.py`).
    """

    block: int
    padded_tokens: int
    num_warps: int
    num_stages: int


def tile_config(kernel: str, tokens: int) -> TileConfig:
    """Returns how the kernel of that name cuts windows of `tokens`."""
    padded = max(16, triton.next_power_of_2(tokens))
    if padded <= 64:
        return TileConfig(padded, padded, num_warps=4, num_stages=2)
    return {
        "forward": TileConfig(64, padded, num_warps=4, num_stages=2),
        "backward_queries": TileConfig(16, padded, num_warps=4, num_stages=2),
        "backward_keys": TileConfig(32, padded, num_warps=8, num_stages=1),
    }[kernel]


def resident_programs(kernel: str, tokens: int, shifted: bool) -> int:
    """Returns how many programs run on one multiprocessor at the same time, by the registers and memory that they need.

    As compiled for compute capability 9.0, heads of 32 and half precision (`tests/models/ops/test_triton_compile.py`).
    """
    if kernel == "forward" and tokens <= 64:
        return 3 if shifted else 4
    return 1 if kernel == "backward_keys" else 2


def unsupported_spec(spec: AttentionSpec) -> str:
    """Returns why the kernels are not written for `spec`; empty if they are."""
    if spec.device != "cuda" and not INTERPRETED:
        return f"it runs on CUDA devices, not on {spec.device}"
    if spec.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if spec.head_dim > MAX_HEAD_DIM:
        return f"the head dimension is {spec.head_dim}, more than {MAX_HEAD_DIM}"
    return unsupported_by_fused_kernel(spec, DTYPES, MAX_TOKENS)


def map_geometry(qkv: Tensor, window: int, shift_h: int, shift_w: int) -> tuple[int, ...]:
    """Returns the map's description for the kernels: B, the rows and columns of windows, the shift, C."""
    B, H, W, _, num_heads, head_dim = qkv.shape
    return B, H // window, W // window, shift_h, shift_w, num_heads * head_dim


def constexprs(kernel: str, window: int, head_dim: int, shifted: bool, cosine: bool) -> dict[str, int | bool]:
    """Returns the compile-time constants of the kernel of that name."""
    tile = tile_config(kernel, window**2)
    return {
        "M": window,
        "D": head_dim,
        "D_PADDED": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK": tile.block,
        "N_PADDED": tile.padded_tokens,
        "SHIFTED": shifted,
        "COSINE": cosine,
    }


def launch(
    kernel: str,
    qkv: Tensor,
    window: int,
    splits: int,
    *arguments: Tensor | float,
    shifts: tuple[int, int],
    cosine: bool,
) -> None:
    """Launches the kernel of that name: one program for each head, block of a window and split of the windows.

    The head varies fastest: the heads of a token are adjacent in memory, and are then read at the same time.
    """
    num_heads, head_dim = qkv.shape[4:]
    tile = tile_config(kernel, window**2)
    with torch.cuda.device_of(qkv):
        getattr(kernels, kernel)[num_heads, triton.cdiv(window**2, tile.block), splits](
            *arguments,
            *map_geometry(qkv, window, *shifts),
            **constexprs(kernel, window, head_dim, any(shifts), cosine),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def num_splits(kernel: str, qkv: Tensor, window: int, shifted: bool) -> int:
    """Returns into how many splits the windows are divided, so that all programs run at the same time."""
    B, rows, columns = map_geometry(qkv, window, 0, 0)[:3]
    processors = 4  # in the interpreter
    if qkv.device.type == "cuda":
        processors = torch.cuda.get_device_properties(qkv.device).multi_processor_count
    programs = processors * resident_programs(kernel, window**2, shifted)
    blocks = triton.cdiv(window**2, tile_config(kernel, window**2).block)
    return min(B * rows * columns, max(1, programs // (qkv.shape[4] * blocks)), _max_splits)


@contextlib.contextmanager
def limit_splits(number: int) -> Iterator[None]:
    """Divides the windows into at most `number` splits, so that programs of a small input have several windows."""
    global _max_splits
    previous, _max_splits = _max_splits, number
    try:
        yield
    finally:
        _max_splits = previous


@torch.library.custom_op("swin::window_attention", mutates_args=())
def attend(
    qkv: Tensor, bias: Tensor, head_scales: Tensor | None, scale: float, window: int, shift_h: int, shift_w: int
) -> Tensor:
    """Computes window attention: (B, H, W, 3, nH, d) to (B, H, W, C).

    Args:
        bias: (nH, N, N) float32.
        head_scales: (nH,) float32, factors of the cosines between queries and keys; None to use products and `scale`.
        shift_h, shift_w: the cyclic shift.
    """
    qkv, bias = qkv.contiguous(), bias.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    splits = num_splits("forward", qkv, window, shift_h > 0 or shift_w > 0)
    arguments = qkv, bias, bias if head_scales is None else head_scales, scale, out
    launch("forward", qkv, window, splits, *arguments, shifts=(shift_h, shift_w), cosine=head_scales is not None)
    return out


@torch.library.custom_op("swin::window_attention_backward", mutates_args=())
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
    qkv, bias, grad_out = qkv.contiguous(), bias.contiguous(), grad_out.contiguous()
    num_heads, tokens = qkv.shape[4], window**2
    tile = tile_config("backward_queries", tokens)
    blocks, single_tile = triton.cdiv(tokens, tile.block), tile.block == tile.padded_tokens
    splits = num_splits("backward_queries", qkv, window, shift_h > 0 or shift_w > 0)
    grad_qkv = torch.empty_like(qkv)
    grad_bias = bias.new_empty(splits, *bias.shape)
    grad_scales = bias.new_empty(0 if head_scales is None else (splits, blocks, num_heads))
    B, rows, columns = map_geometry(qkv, window, shift_h, shift_w)[:3]
    # A single tile writes no statistics.
    stats = bias if single_tile else bias.new_empty(B * rows * columns, num_heads, 2, tokens)
    arguments = grad_out, qkv, bias, bias if head_scales is None else head_scales, scale, grad_qkv
    start = functools.partial(launch, shifts=(shift_h, shift_w), cosine=head_scales is not None)
    start("backward_queries", qkv, window, splits, *arguments, grad_bias, grad_scales, stats)
    if not single_tile:
        splits = num_splits("backward_keys", qkv, window, shift_h > 0 or shift_w > 0)
        start("backward_keys", qkv, window, splits, *arguments, stats)
    return grad_qkv, grad_bias.sum(0), grad_scales if head_scales is None else grad_scales.sum((0, 1))


register_autograd(attend, attend_backward)


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """See `models.ops.dispatch.window_attention`; `dropout_p` has to be 0. The softmax is in float32."""
    if dropout_p:
        raise ValueError("the Triton kernels have no dropout of attention weights")
    return dispatch(attend, qkv, bias, windows, scale)
