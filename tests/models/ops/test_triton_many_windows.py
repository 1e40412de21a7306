"""The Triton kernels where each program goes through several windows, as in training, against the reference."""

import itertools

import pytest
import torch
from torch import Tensor

from models.ops import reference
from models.ops.window import ShiftedWindows

pytestmark = pytest.mark.gpu
HEADS, HEAD_DIM = 3, 32
TOLERANCE = 2e-2  # relative error in norm; bfloat16 has 8 bits


@pytest.mark.parametrize(
    ("window", "cosine", "shifted", "dtype"),
    itertools.product((7, 8, 12, 16), (False, True), (False, True), (torch.bfloat16, torch.float16)),
    ids=str,
)
def test_many_windows_in_a_program(window: int, cosine: bool, shifted: bool, dtype: torch.dtype):
    """4,800 windows, 1,200 large ones: each program goes through seven or more. Twice the same bits."""
    from models.ops import triton_attention

    torch.manual_seed(0)
    images, side = 1200 if window < 9 else 300, 2 * window
    qkv = torch.randn(images, side, side, 3, HEADS, HEAD_DIM, device="cuda", dtype=dtype)
    grad_out = torch.randn(images, side, side, HEADS * HEAD_DIM, device="cuda", dtype=dtype)
    bias = torch.randn(HEADS, window**2, window**2, device="cuda")
    scale = torch.tensor([3.0, 7.0, 20.0], device="cuda") if cosine else HEAD_DIM**-0.5
    windows = ShiftedWindows((side, side), window, shifted).to("cuda")

    def output_and_gradients(attention, qkv: Tensor, grad_out: Tensor) -> list[Tensor]:
        tensors = [qkv, bias, *([scale] if isinstance(scale, Tensor) else [])]
        leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        out = attention(*leaves[:2], windows, leaves[2] if cosine else scale, 0.0)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    first, second = (output_and_gradients(triton_attention.window_attention, qkv, grad_out) for _ in range(2))
    expected = output_and_gradients(reference.window_attention, qkv.float(), grad_out.float())
    names = ("output", "gradient of qkv", "gradient of bias", "gradient of scale")
    for name, value, again, right in zip(names, first, second, expected, strict=False):
        error = ((value.float() - right).norm() / right.norm()).item()
        assert error < TOLERANCE, f"{name}: relative error {error:.1e}"
        assert torch.equal(value, again), f"{name}: other bits the second time"
