"""Code that the Triton and the native implementation share as PyTorch custom operators: fake shapes, autograd, call.

An operator `attend(qkv, bias, head_scales, scale, window, shift_h, shift_w)` maps (B, H, W, 3, nH, d) to (B, H, W, C).
`attend_backward(grad_out, ...)` returns the gradients of qkv, bias and head_scales (empty if there are none).
Shapes: `B` batch, `H W` token grid, `C` channels, `N` tokens in a window, `nH` heads, `d` head dimension.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import CustomOpDef

from models.ops.window import ShiftedWindows


class OpContext(FunctionCtx):
    """The type of the context that PyTorch passes to both functions; `constants` are the arguments without gradient."""

    saved_tensors: tuple[Tensor, Tensor, Tensor | None]
    constants: list[float | int]


def register_autograd(attend: CustomOpDef, attend_backward: CustomOpDef) -> None:
    """Registers the gradient, and the output shapes that `torch.compile` needs."""

    def fake_forward(qkv: Tensor, bias: Tensor, head_scales: Tensor | None, *_) -> Tensor:
        return qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])

    def fake_backward(
        grad_out: Tensor, qkv: Tensor, bias: Tensor, head_scales: Tensor | None, *_
    ) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty_like(qkv, memory_format=torch.contiguous_format),
            torch.empty_like(bias, memory_format=torch.contiguous_format),
            bias.new_empty(0 if head_scales is None else head_scales.shape),
        )

    def setup_context(ctx: OpContext, inputs: tuple, output: Tensor) -> None:
        qkv, bias, head_scales, *ctx.constants = inputs
        ctx.save_for_backward(qkv, bias, head_scales)

    def backward(ctx: OpContext, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, bias, head_scales = ctx.saved_tensors
        grad_qkv, grad_bias, grad_scales = attend_backward(grad_out, qkv, bias, head_scales, *ctx.constants)
        return grad_qkv, grad_bias, None if head_scales is None else grad_scales, *(None for _ in ctx.constants)

    attend.register_fake(fake_forward)
    attend_backward.register_fake(fake_backward)
    attend.register_autograd(backward, setup_context=setup_context)


def dispatch(attend: CustomOpDef, qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor) -> Tensor:
    """Calls `attend` with the arguments of `models.ops.dispatch.window_attention`."""
    shift_h, shift_w = windows.shifts(*qkv.shape[1:3])
    if isinstance(scale, Tensor):
        return attend(qkv, bias.float(), scale.float(), 1.0, windows.window, shift_h, shift_w)
    return attend(qkv, bias.float(), None, scale, windows.window, shift_h, shift_w)
