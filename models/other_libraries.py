"""The same Swins by other libraries, untrained: to be compared with and to be measured beside."""

import os
from collections.abc import Callable

import torchvision
from timm.models import swin_transformer, swin_transformer_v2
from torch import Tensor, nn
from yacs.config import CfgNode

from data.transforms.eval_presets import TORCHVISION

Build = Callable[[CfgNode, CfgNode, int], nn.Module | None]


def by_timm(config: CfgNode, section: CfgNode, classes: int) -> nn.Module:
    """timm's class with the arguments of this architecture."""
    v2 = config.MODEL.TYPE == "swinv2"
    build = swin_transformer_v2.SwinTransformerV2 if v2 else swin_transformer.SwinTransformer
    return build(
        img_size=config.DATA.IMG_SIZE,
        num_classes=classes,
        embed_dim=section.EMBED_DIM,
        depths=tuple(section.DEPTHS),
        num_heads=tuple(section.NUM_HEADS),
        window_size=section.WINDOW_SIZE,
        **({"pretrained_window_sizes": tuple(section.PRETRAINED_WINDOW_SIZES)} if v2 else {}),
    )


def by_torchvision(config: CfgNode, section: CfgNode, classes: int) -> nn.Module | None:
    """torchvision's model of this architecture; None where it has none."""
    name = TORCHVISION.get((config.MODEL.TYPE, section.EMBED_DIM, tuple(section.DEPTHS)))
    same_window = section.WINDOW_SIZE == (8 if config.MODEL.TYPE == "swinv2" else 7)
    if name is None or not same_window or 32 * section.NUM_HEADS[0] != section.EMBED_DIM:
        return None
    return torchvision.models.get_model(name, weights=None, num_classes=classes)


def by_transformers(config: CfgNode, section: CfgNode, classes: int) -> nn.Module:
    """The model for image classification of transformers, made from a configuration of this architecture."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    v2 = config.MODEL.TYPE == "swinv2"
    build = transformers.Swinv2ForImageClassification if v2 else transformers.SwinForImageClassification
    settings = (transformers.Swinv2Config if v2 else transformers.SwinConfig)(
        image_size=config.DATA.IMG_SIZE,
        num_labels=classes,
        embed_dim=section.EMBED_DIM,
        depths=list(section.DEPTHS),
        num_heads=list(section.NUM_HEADS),
        window_size=section.WINDOW_SIZE,
        **({"pretrained_window_sizes": list(section.PRETRAINED_WINDOW_SIZES)} if v2 else {}),
    )
    return build(settings)


LIBRARIES: dict[str, Build] = {"timm": by_timm, "torchvision": by_torchvision, "transformers": by_transformers}


def section_of(config: CfgNode) -> CfgNode:
    return config.MODEL[config.MODEL.TYPE.upper()]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """(B, classes), also where the library wraps them in an object."""
    answer = model(images)
    return answer if isinstance(answer, Tensor) else answer.logits


class Logits(nn.Module):
    """A model that gives its logits, whatever its library wraps them in."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.model, images)
