"""Shared by the tests of window attention: cases, and the operation token by token, independent of `reference.py`.

Shapes: `B` batch, `H W` token grid, `N` tokens in a window, `nH` heads, `d` head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.window import ShiftedWindows

# Largest error allowed against float64, relative to the largest value: a few units in the last place of each dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}

Attention = Callable[[Tensor, Tensor, ShiftedWindows, float | Tensor], Tensor]


@dataclass(frozen=True)
class AttentionCase:
    """One use of the operation: a map of `size`, a multiple of the window, cut into windows."""

    window: int
    size: tuple[int, int]
    shifted: bool
    cosine: bool = False
    num_heads: int = 2
    head_dim: int = 16
    batch_size: int = 2

    def __str__(self) -> str:
        words = [f"{self.window}in{self.size[0]}x{self.size[1]}", "shifted" * self.shifted, "cosine" * self.cosine]
        return "-".join([word for word in words if word] + [f"{self.num_heads}of{self.head_dim}"])

    def windows(self, device: str = "cpu") -> ShiftedWindows:
        return ShiftedWindows((16 * self.window, 16 * self.window), self.window, self.shifted).to(device)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """Returns qkv, grad_out, bias and, with cosine, scale. Bias and scale are at least float32."""
        generator = torch.Generator().manual_seed(0)
        tokens = self.window**2
        qkv = torch.randn(self.batch_size, *self.size, 3, self.num_heads, self.head_dim, generator=generator)
        grad_out = torch.randn(self.batch_size, *self.size, self.num_heads * self.head_dim, generator=generator)
        parameters = {"bias": torch.randn(self.num_heads, tokens, tokens, generator=generator)}
        if self.cosine:
            parameters["scale"] = 1 + 9 * torch.rand(self.num_heads, generator=generator)
        activations = {"qkv": qkv, "grad_out": grad_out}
        parameter_dtype = torch.promote_types(dtype, torch.float32)
        # Rounded to bfloat16 first, so that every dtype starts from the same numbers.
        return {name: t.bfloat16().to(device, dtype) for name, t in activations.items()} | {
            name: t.bfloat16().to(device, parameter_dtype) for name, t in parameters.items()
        }


def attention_by_token(qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor) -> Tensor:
    """Computes equation 4 for all tokens of the map at once, without forming windows.

    Two tokens see each other if they are in the same cell on both axes; an axis is cut at the shift and every `window`
    tokens from there.
    """
    (_, height, width), window = qkv.shape[:3], windows.window
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shift_h, shift_w = windows.shifts(height, width)
    y, x = y.flatten() - shift_h, x.flatten() - shift_w  # (H·W,) each, from the first cut
    cell, position = y // window * 10_000 + x // window, y % window * window + x % window
    cell, position = cell.to(qkv.device), position.to(qkv.device)
    visible = cell[:, None] == cell[None, :]
    q, k, v = qkv.flatten(1, 2).unbind(2)  # (B, H·W, nH, d) each
    if isinstance(scale, Tensor):
        q, k = q / q.square().sum(-1, keepdim=True).sqrt(), k / k.square().sum(-1, keepdim=True).sqrt()
        q = q * scale[:, None]
    else:
        q = q * scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + bias[:, position[:, None], position[None, :]]
    weights = scores.exp() * visible
    out = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)
    return out.flatten(2).unflatten(1, (height, width))


def output_and_gradients(
    attention: Attention, case: AttentionCase, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    """Returns the output, and the gradients by the names of the inputs."""
    inputs = case.inputs(dtype, device)
    grad_out = inputs.pop("grad_out")
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    out = attention(leaves["qkv"], leaves["bias"], case.windows(device), leaves.get("scale", case.head_dim**-0.5))
    gradients = torch.autograd.grad(out, list(leaves.values()), grad_out)
    return {"output": out.detach()} | dict(zip(leaves, gradients, strict=True))


def assert_matches_definition(
    attention: Attention, case: AttentionCase, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """Compares the output and every gradient with `attention_by_token` in float64."""
    reference = output_and_gradients(attention_by_token, case, torch.float64)
    results = output_and_gradients(attention, case, dtype, device)
    for name, expected in reference.items():
        actual = results[name].cpu()
        expected_dtype = dtype if name in ("output", "qkv") else torch.promote_types(dtype, torch.float32)
        assert actual.dtype == expected_dtype, name
        largest = expected.abs().max().clamp(min=1)  # gradients of the bias are sums over all windows
        error = ((actual - expected).abs().max() / largest).item()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
