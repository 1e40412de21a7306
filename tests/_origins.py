"""Swins of other libraries with random weights, and the same architecture of this project."""

from dataclasses import dataclass

import torch
import torchvision
from torch import Tensor, nn

from models.other_libraries import Architecture, Logits, timm_swin, transformers_swin
from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from tests._swin import SIZES, spread


@dataclass(frozen=True)
class WeightsCase:
    """One architecture with this project's argument names. `origin` is the library to compare with."""

    origin: str
    version: int = 1
    embed_dim: int = 24
    depths: tuple[int, ...] = (2, 1, 2)
    num_heads: tuple[int, ...] = (2, 4, 8)
    img_size: int = 64
    window_size: int = 4
    num_classes: int = 7
    pretrained_window_sizes: tuple[int, ...] = ()

    def ours(self) -> nn.Module:
        arguments = {key: value for key, value in vars(self).items() if key not in ("origin", "version")}
        if self.version == 1:
            del arguments["pretrained_window_sizes"]
        return (SwinTransformer if self.version == 1 else SwinTransformerV2)(**arguments).eval()

    def architecture(self) -> Architecture:
        arguments = {key: value for key, value in vars(self).items() if key not in ("origin", "version")}
        return Architecture("swin" if self.version == 1 else "swinv2", **arguments)

    def theirs(self) -> nn.Module:
        """The library's model with weights that are easy to tell apart. A key bias is zero, as in a new model."""
        build = {"timm": timm_swin, "torchvision": torchvision_swin, "hf": transformers_swin}[self.origin]
        model = spread(build(self.architecture())).eval()
        if (self.origin, self.version) == ("torchvision", 2):
            for name, parameter in model.named_parameters():
                if name.endswith("attn.qkv.bias"):
                    parameter.detach().chunk(3)[1].zero_()
        return model

    def images(self) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return torch.randn(1, 3, self.img_size, self.img_size, generator=generator)

    def name(self) -> str:
        return (
            f"{self.origin}-v{self.version}-{self.embed_dim}x{sum(self.depths)}-{self.img_size}w{self.window_size}"
            f"{'-from' + str(self.pretrained_window_sizes[0]) if self.pretrained_window_sizes else ''}"
            f"{'-' + str(self.num_classes) if self.num_classes not in (7, 1000) else ''}"
        )


def torchvision_swin(architecture: Architecture) -> nn.Module:
    """torchvision's model of any architecture, also of those that it has no name for."""
    module = torchvision.models.swin_transformer
    v2 = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    return module.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=architecture.embed_dim,
        depths=list(architecture.depths),
        num_heads=list(architecture.num_heads),
        window_size=[architecture.window_size] * 2,
        num_classes=architecture.num_classes,
        **(v2 if architecture.model_type == "swinv2" else {}),
    )


SMALL = [WeightsCase(origin, version) for origin in ("timm", "torchvision", "hf") for version in (1, 2)]


def _released() -> list[WeightsCase]:
    """Every architecture that the libraries have weights for."""
    cases = []

    def add(origins: tuple[str, ...], version: int, size: str, img_size: int, window: int, **more) -> None:
        embed_dim, depths, num_heads = SIZES[size]
        for origin in origins:
            architecture = (embed_dim, depths, num_heads, img_size, window)
            cases.append(WeightsCase(origin, version, *architecture, **{"num_classes": 1000, **more}))

    others, every = ("timm", "hf"), ("timm", "hf", "torchvision")
    for size in SIZES:
        add(others if size == "large" else every, 1, size, 224, 7)
        add(others, 1, size, 224, 7, num_classes=21841)
    for size in ("base", "large"):
        add(others, 1, size, 384, 12)
        add(others, 1, size, 384, 12, num_classes=21841)
        add(others, 2, size, 192, 12, num_classes=21841)
        add(others, 2, size, 256, 16, pretrained_window_sizes=(12, 12, 12, 6))
        add(others, 2, size, 384, 24, pretrained_window_sizes=(12, 12, 12, 6))
    for size in ("tiny", "small", "base"):
        add(every, 2, size, 256, 8)
        add(others, 2, size, 256, 16)
    return cases


RELEASED = _released()


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return Logits(model)(images)
