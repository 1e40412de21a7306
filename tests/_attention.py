"""What the tests of window attention share: the operation token by token, in another spelling than `reference.py`'s."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.window import ShiftedWindows

# Largest error allowed beside float64, over the largest value: some units in the last place of each type.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Use:
    """One use of the operation: a map of `size`, cut into windows."""

    window: int
    size: tuple[int, int]
    shifted: bool
    cosine: bool = False
    heads: int = 2
    width: int = 16
    images: int = 2

    def __str__(self) -> str:
        words = [f"{self.window}in{self.size[0]}x{self.size[1]}", "shifted" * self.shifted, "cosine" * self.cosine]
        return "-".join([word for word in words if word] + [f"{self.heads}of{self.width}"])

    def windows(self, device: str = "cpu") -> ShiftedWindows:
        return ShiftedWindows((16 * self.window, 16 * self.window), self.window, self.shifted).to(device)

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """qkv, bias, scales where there are any, a gradient of the output; bias and scales not in half precision."""
        draw = torch.Generator().manual_seed(0)
        tokens = self.window**2
        qkv = torch.randn(self.images, *self.size, 3, self.heads, self.width, generator=draw)
        gradient = torch.randn(self.images, *self.size, self.heads * self.width, generator=draw)
        small = {"bias": torch.randn(self.heads, tokens, tokens, generator=draw)}
        if self.cosine:
            small["scale"] = 1 + 9 * torch.rand(self.heads, generator=draw)
        large = {"qkv": qkv, "gradient": gradient}
        wide = torch.promote_types(dtype, torch.float32)
        # Rounded to bfloat16 first, so that every type starts from the same numbers.
        return {n: t.bfloat16().to(device, dtype) for n, t in large.items()} | {
            n: t.bfloat16().to(device, wide) for n, t in small.items()
        }


def spelled_out(qkv: Tensor, bias: Tensor, windows: ShiftedWindows, scale: float | Tensor) -> Tensor:
    """Equation 4 for all tokens of the map at once: those of one window see each other, where each axis is cut at the
    shift and every `window` tokens from there, and never joined.
    """
    (_, height, width), window = qkv.shape[:3], windows.window
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    down, right = windows.shifts(height, width)
    y, x = y.flatten() - down, x.flatten() - right  # (H·W,) each, from the first cut
    group, place = y // window * 10_000 + x // window, y % window * window + x % window
    group, place = group.to(qkv.device), place.to(qkv.device)
    seen = group[:, None] == group[None, :]
    q, k, v = qkv.flatten(1, 2).unbind(2)  # (B, H·W, nH, d) each
    if isinstance(scale, Tensor):
        q, k = q / q.square().sum(-1, keepdim=True).sqrt(), k / k.square().sum(-1, keepdim=True).sqrt()
        q = q * scale[:, None]
    else:
        q = q * scale
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + bias[:, place[:, None], place[None, :]]
    weights = scores.exp() * seen
    out = torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)
    return out.flatten(2).unflatten(1, (height, width))


def results(function, use: Use, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Output and gradients of `function(qkv, bias, windows, scale)`, by the names of the inputs."""
    given = use.inputs(dtype, device)
    gradient = given.pop("gradient")
    leaves = {name: value.requires_grad_() for name, value in given.items()}
    out = function(leaves["qkv"], leaves["bias"], use.windows(device), leaves.get("scale", use.width**-0.5))
    return {"output": out.detach()} | dict(
        zip(leaves, torch.autograd.grad(out, list(leaves.values()), gradient), strict=True)
    )


def assert_right(function, use: Use, dtype: torch.dtype, device: str = "cpu") -> None:
    """Output and every gradient against `spelled_out` in float64."""
    expected = results(spelled_out, use, torch.float64)
    found = results(function, use, dtype, device)
    for name, right in expected.items():
        value = found[name].cpu()
        assert value.dtype == (dtype if name in ("output", "qkv") else torch.promote_types(dtype, torch.float32)), name
        size = right.abs().max().clamp(min=1)  # gradients of the bias are sums over all windows
        error = ((value - right).abs().max() / size).item()
        assert error < TOLERANCE[dtype], f"{name}: {error:.1e}"
