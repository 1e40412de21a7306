"""Swins of other libraries with random weights, and the same architecture of this project."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here needs a network

import torch
import torchvision
from timm.models import swin_transformer as timm_v1
from timm.models import swin_transformer_v2 as timm_v2
from torch import Tensor, nn

from models.swin_transformer import SwinTransformer
from models.swin_transformer_v2 import SwinTransformerV2
from tests._swin import SIZES, spread


@dataclass(frozen=True)
class Case:
    """One architecture, in the words of this project. `origin` is the library that makes it."""

    origin: str
    version: int = 1
    embed_dim: int = 24
    depths: tuple[int, ...] = (2, 1, 2)
    num_heads: tuple[int, ...] = (2, 4, 8)
    img_size: int = 64
    window_size: int = 4
    num_classes: int = 7
    pretrained_window_sizes: tuple[int, ...] = field(default=())

    def ours(self) -> nn.Module:
        arguments = {key: value for key, value in vars(self).items() if key not in ("origin", "version")}
        if self.version == 1:
            del arguments["pretrained_window_sizes"]
        return (SwinTransformer if self.version == 1 else SwinTransformerV2)(**arguments).eval()

    def theirs(self) -> nn.Module:
        """With weights that are easy to tell apart. A key bias, where there is one, is zero, as in a fresh model."""
        model = spread(MAKERS[self.origin](self)).eval()
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


def _timm(case: Case) -> nn.Module:
    arguments = {
        key: getattr(case, key)
        for key in ("embed_dim", "depths", "num_heads", "img_size", "window_size", "num_classes")
    }
    if case.version == 1:
        return timm_v1.SwinTransformer(**arguments)
    return timm_v2.SwinTransformerV2(
        **arguments, pretrained_window_sizes=case.pretrained_window_sizes or (0,) * len(case.depths)
    )


def _torchvision(case: Case) -> nn.Module:
    module = torchvision.models.swin_transformer
    variant = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    return module.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=case.embed_dim,
        depths=list(case.depths),
        num_heads=list(case.num_heads),
        window_size=[case.window_size] * 2,
        num_classes=case.num_classes,
        **(variant if case.version == 2 else {}),
    )


def hf_config(case: Case):
    import transformers

    extra = {"pretrained_window_sizes": list(case.pretrained_window_sizes or (0,) * len(case.depths))}
    kind = transformers.SwinConfig if case.version == 1 else transformers.Swinv2Config
    return kind(
        image_size=case.img_size,
        embed_dim=case.embed_dim,
        depths=list(case.depths),
        num_heads=list(case.num_heads),
        window_size=case.window_size,
        num_labels=case.num_classes,
        **(extra if case.version == 2 else {}),
    )


def _hf(case: Case) -> nn.Module:
    import transformers

    kinds = (transformers.SwinForImageClassification, transformers.Swinv2ForImageClassification)
    return kinds[case.version - 1](hf_config(case))


MAKERS: dict[str, Callable[[Case], nn.Module]] = {"timm": _timm, "torchvision": _torchvision, "hf": _hf}

SMALL = [Case(origin, version) for origin in MAKERS for version in (1, 2)]


def _released() -> list[Case]:
    """Every size that the libraries have weights for."""
    cases = []

    def add(origins: tuple[str, ...], version: int, size: str, img_size: int, window: int, **more) -> None:
        embed_dim, depths, num_heads = SIZES[size]
        for origin in origins:
            architecture = (embed_dim, depths, num_heads, img_size, window)
            cases.append(Case(origin, version, *architecture, **{"num_classes": 1000, **more}))

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
        out = model(images)
    return getattr(out, "logits", out)
