"""What the fused implementations share as custom operators of PyTorch: shapes without running, the gradient, the call.

An operator `attend(qkv, bias, scales, factor, window, down, right)` takes (B, H, W, 3, nH, d) to (B, H, W, C);
`attend_backward(gradient, ...)` gives the gradients of qkv, bias and scales (empty where there are none).
"""

import torch
from torch import Tensor
from torch.library import CustomOpDef

from models.ops.window import ShiftedWindows


def register_autograd(attend: CustomOpDef, attend_backward: CustomOpDef) -> None:
    """Registers what `torch.compile` and autograd ask of the two."""

    def shape(qkv: Tensor, bias: Tensor, scales: Tensor | None, *_) -> Tensor:
        return qkv.new_empty(*qkv.shape[:3], qkv.shape[4] * qkv.shape[5])

    def shapes(gradient: Tensor, qkv: Tensor, bias: Tensor, scales: Tensor | None, *_) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.empty_like(qkv, memory_format=torch.contiguous_format),
            torch.empty_like(bias, memory_format=torch.contiguous_format),
            bias.new_empty(0 if scales is None else scales.shape),
        )

    def keep(ctx, inputs: tuple, output: Tensor) -> None:
        qkv, bias, scales, *ctx.numbers = inputs
        ctx.save_for_backward(qkv, bias, scales)

    def backward(ctx, gradient: Tensor) -> tuple:
        qkv, bias, scales = ctx.saved_tensors
        grad_qkv, grad_bias, grad_scales = attend_backward(gradient, qkv, bias, scales, *ctx.numbers)
        return grad_qkv, grad_bias, None if scales is None else grad_scales, *(None for _ in ctx.numbers)

    attend.register_fake(shape)
    attend_backward.register_fake(shapes)
    attend.register_autograd(backward, setup_context=keep)


def dispatch(attend: CustomOpDef, qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor) -> Tensor:
    """`attend` with the arguments of `models.ops.dispatch.window_attention`."""
    down, right = windows.shifts(*qkv.shape[1:3])
    cosine = isinstance(scale, Tensor)
    return attend(
        qkv, bias.float(), scale.float() if cosine else None, 1.0 if cosine else scale, windows.window, down, right
    )
