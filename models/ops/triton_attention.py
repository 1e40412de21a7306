"""Window attention by the kernels of `triton_kernels.py`, as a custom operator that `torch.compile` takes as a whole.

The operator `swin::window_attention` has a gradient, `swin::window_attention_backward`; both say what shapes they give
without running. Results are the same bits from run to run: nothing is added up in an order that varies.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from models.ops import triton_kernels as kernels
from models.ops.custom_op import dispatch, register_autograd
from models.ops.spec import AttentionSpec
from models.ops.window import ShiftedWindows

MAX_TOKENS = 256  # of a window: more do not fit into one tile
MAX_WIDTH = 64  # of a head
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: the kernels run on the CPU, for tests


class Tiles(NamedTuple):
    """How a kernel cuts a window: `block` rows at a time; `full`, all tokens, to a power of 2.

    `warps` of threads compute a program; `stages` - 1 windows are fetched ahead. Chosen so that, compiled for heads of
    32, next to nothing that belongs into registers is spilled to memory (`tests/models/ops/test_triton_compile.py`).
    """

    block: int
    full: int
    warps: int
    stages: int


def tiles(kernel: str, tokens: int) -> Tiles:
    """How the kernel of that name cuts windows of `tokens`."""
    full = max(16, triton.next_power_of_2(tokens))
    if full <= 64:
        return Tiles(full, full, 4, 2)
    return {
        "forward": Tiles(64, full, 4, 2),
        "backward_queries": Tiles(16, full, 4, 2),
        "backward_keys": Tiles(32, full, 8, 1),
    }[kernel]


def unsupported(case: AttentionSpec) -> str:
    """Why the kernels are not for a case, in words; empty where they are."""
    if case.device != "cuda" and not INTERPRETED:
        return f"it runs on CUDA devices, not on {case.device}"
    if case.device == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if case.dtype not in DTYPES:
        return f"it has no {case.dtype}"
    if case.window**2 > MAX_TOKENS:
        return f"a window has {case.window**2} tokens, more than {MAX_TOKENS}"
    if case.width > MAX_WIDTH:
        return f"a head is {case.width} wide, more than {MAX_WIDTH}"
    if case.dropout:
        return "it has no dropout of attention weights (MODEL.ATTN_DROP_RATE)"
    if not case.cyclic:
        return "windows are not cut by a cyclic shift"
    return ""


def geometry(qkv: Tensor, window: int, down: int, right: int) -> tuple[int, ...]:
    """What the kernels know of the map: windows in all, in an image and in a row; its sides, unpadded and padded; the
    shift; C.
    """
    B, H, W, _, heads, width = qkv.shape
    rows, columns = -(-H // window), -(-W // window)
    windows = rows * columns
    return B * windows, windows, columns, H, W, rows * window, columns * window, down, right, heads * width


def constants(kernel: str, window: int, width: int, masked: bool, cosine: bool) -> dict[str, int | bool]:
    """What the kernel of that name is compiled for, and how it is run."""
    cut = tiles(kernel, window**2)
    return {
        "M": window,
        "D": width,
        "WIDTH": max(16, triton.next_power_of_2(width)),
        "BLOCK": cut.block,
        "FULL": cut.full,
        "MASKED": masked,
        "COSINE": cosine,
    }


def launch(kernel: str, qkv: Tensor, window: int, shares: int, *arguments: Tensor | float, shift: tuple, cosine: bool):
    """Starts the kernel of that name: for each head, block of a window and share of the windows one program.

    The head varies fastest, so that the heads of a window, which lie side by side in memory, are read at the same time.
    """
    _, H, W, _, heads, width = qkv.shape
    cut = tiles(kernel, window**2)
    masked = any(shift) or H % window > 0 or W % window > 0
    with torch.cuda.device_of(qkv):
        getattr(kernels, kernel)[heads, triton.cdiv(window**2, cut.block), shares](
            *arguments,
            *geometry(qkv, window, *shift),
            **constants(kernel, window, width, masked, cosine),
            num_warps=cut.warps,
            num_stages=cut.stages,
        )


def shares_of_windows(kernel: str, qkv: Tensor, window: int, programs: int) -> int:
    """Over how many programs the windows are spread, where `programs` at a time fit on each of the processors."""
    B, H, W, _, heads, _ = qkv.shape
    blocks = triton.cdiv(window**2, tiles(kernel, window**2).block)
    if qkv.device.type == "cuda":
        programs *= torch.cuda.get_device_properties(qkv.device).multi_processor_count
    return min(B * -(-H // window) * -(-W // window), max(1, programs // (heads * blocks)))


@torch.library.custom_op("swin::window_attention", mutates_args=())
def attend(
    qkv: Tensor, bias: Tensor, scales: Tensor | None, factor: float, window: int, down: int, right: int
) -> Tensor:
    """(B, H, W, 3, nH, d) to (B, H, W, C).

    Args:
        bias: (nH, N, N) float32.
        scales: (nH,) float32, of the cosines between queries and keys; None for `factor` times their products.
        down, right: the cyclic shift.
    """
    qkv, bias = qkv.contiguous(), bias.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])
    shares = shares_of_windows("forward", qkv, window, 16)
    given = qkv, bias, bias if scales is None else scales, factor, out
    launch("forward", qkv, window, shares, *given, shift=(down, right), cosine=scales is not None)
    return out


@torch.library.custom_op("swin::window_attention_backward", mutates_args=())
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
    qkv, bias, gradient = qkv.contiguous(), bias.contiguous(), gradient.contiguous()
    heads, tokens = qkv.shape[4], window**2
    cut, shares = tiles("backward_queries", tokens), shares_of_windows("backward_queries", qkv, window, 4)
    blocks, one_tile = triton.cdiv(tokens, cut.block), cut.block == cut.full
    grad_qkv = torch.empty_like(qkv)
    grad_bias = bias.new_empty(shares, *bias.shape)
    grad_scales = bias.new_empty(0 if scales is None else (shares, blocks, heads))
    statistics = bias if one_tile else bias.new_empty(geometry(qkv, window, down, right)[0], heads, 2, tokens)
    given = gradient, qkv, bias, bias if scales is None else scales, factor, grad_qkv
    start = functools.partial(launch, shift=(down, right), cosine=scales is not None)
    start("backward_queries", qkv, window, shares, *given, grad_bias, grad_scales, statistics)
    if not one_tile:
        start("backward_keys", qkv, window, shares_of_windows("backward_keys", qkv, window, 8), *given, statistics)
    return grad_qkv, grad_bias.sum(0), grad_scales if scales is None else grad_scales.sum((0, 1))


register_autograd(attend, attend_backward)


def window_attention(
    qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor, dropout_p: float
) -> Tensor:
    """Shapes: see `models.ops.dispatch.window_attention`. The softmax is in float32."""
    if dropout_p:
        raise ValueError("the Triton kernels have no dropout of attention weights")
    return dispatch(attend, qkv, bias, windows, scale)
