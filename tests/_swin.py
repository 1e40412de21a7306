"""Shared by the tests of models: small models, timm's Swin with distinct weights, and the conversion of its names."""

import torch
from timm.models import swin_transformer as timm_models
from torch import Tensor, nn

from models.swin_transformer import SwinTransformer

SIZES = {  # the paper's table 7: embed_dim, depths, num_heads
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def architecture(size: str, img_size: int = 224, window_size: int = 7, depths: tuple[int, ...] | None = None) -> dict:
    """Returns arguments that timm's Swin and this project's have in common."""
    embed_dim, full_depths, num_heads = SIZES[size]
    return {
        "embed_dim": embed_dim,
        "depths": depths or full_depths,
        "num_heads": num_heads,
        "img_size": img_size,
        "window_size": window_size,
    }


SMALL = {  # two stages on 32 × 32 pixels that run in milliseconds, without DropPath
    "img_size": 32,
    "num_classes": 5,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "drop_path_rate": 0.0,
}


def small(**changes) -> SwinTransformer:
    """Builds a `SMALL` model with `changes`."""
    return SwinTransformer(**{**SMALL, **changes})


def released_names(block: list[str]) -> list[str]:
    """Returns the parameter names of a released Swin-T with absolute embedding, in order. `block`: names of a block."""
    names = ["absolute_pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
    names += ["patch_embed.norm.weight", "patch_embed.norm.bias"]
    for i, depth in enumerate((2, 2, 6, 2)):
        names += [f"layers.{i}.blocks.{j}.{name}" for j in range(depth) for name in block]
        if i < 3:
            names += [f"layers.{i}.downsample.{name}" for name in ("reduction.weight", "norm.weight", "norm.bias")]
    return [*names, "norm.weight", "norm.bias", "head.weight", "head.bias"]


def spread(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomizes every parameter so that it has an effect: no zero biases, no unit norms, large bias tables."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter.device)
            if name.endswith(("relative_position_bias_table", "absolute_pos_embed")):
                parameter.copy_(0.5 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(float("norm" in name and name.endswith("weight")) + 0.1 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model


def timm_swin(num_classes: int = 10, **arguments) -> nn.Module:
    """Builds timm's Swin with spread weights and DropPath 0."""
    return spread(timm_models.SwinTransformer(num_classes=num_classes, drop_path_rate=0.0, **arguments))


def name_here(timm_name: str) -> str:
    """Converts a name from timm, which merges patches at the start of the next stage and wraps the classifier."""
    parts = timm_name.split(".")
    if parts[0] == "layers" and parts[2] == "downsample":
        parts[1] = str(int(parts[1]) - 1)
    return ".".join(parts).replace("head.fc.", "head.")


def from_timm(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of timm's model under this project's names."""
    return {name_here(name): value for name, value in model.state_dict().items()}


def logits_and_gradients(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the logits and the gradients of a fixed linear function of them."""
    model.zero_grad()
    logits = model(images)
    # Drawn on the CPU and moved: the same numbers for every device.
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), device="cpu").to(logits.device)
    (logits * direction).sum().backward()
    return logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        error = ((actual[name] - gradient).norm() / gradient.norm()).item()
        assert error < tolerance, f"{name}: relative error {error:.1e}"
