"""Builds the same Swins with timm, torchvision and transformers, untrained, for comparisons and benchmarks."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from utils.origins import TORCHVISION_NAMES

if TYPE_CHECKING:
    import transformers


@dataclass(frozen=True)
class Architecture:
    """Hyperparameters that all libraries have in common. `models.build.architecture_of` reads them from a config.

    Attributes:
        model_type: swin, swinv2 or swin_mlp, as MODEL.TYPE.
        pretrained_window_sizes: of Swin V2, one per stage, 0 for window_size; () for 0 in every stage.
    """

    model_type: str
    img_size: int
    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    num_classes: int
    pretrained_window_sizes: tuple[int, ...] = ()

    @property
    def v2_arguments(self) -> dict[str, Any]:
        """The arguments that only the libraries' Swin V2 takes."""
        if self.model_type != "swinv2":
            return {}
        return {"pretrained_window_sizes": list(self.pretrained_window_sizes or (0,) * len(self.depths))}


def timm_swin(architecture: Architecture) -> nn.Module:
    """timm's model of this architecture."""
    from timm.models import swin_transformer, swin_transformer_v2

    v2 = architecture.model_type == "swinv2"
    model_class = swin_transformer_v2.SwinTransformerV2 if v2 else swin_transformer.SwinTransformer
    return model_class(
        img_size=architecture.img_size,
        num_classes=architecture.num_classes,
        embed_dim=architecture.embed_dim,
        depths=architecture.depths,
        num_heads=architecture.num_heads,
        window_size=architecture.window_size,
        **architecture.v2_arguments,
    )


def torchvision_swin(architecture: Architecture) -> nn.Module | None:
    """torchvision's model of this architecture; None if it has no such model by name."""
    import torchvision

    name = TORCHVISION_NAMES.get((architecture.model_type, architecture.embed_dim, architecture.depths))
    same_window = architecture.window_size == (8 if architecture.model_type == "swinv2" else 7)
    if name is None or not same_window or 32 * architecture.num_heads[0] != architecture.embed_dim:
        return None
    return torchvision.models.get_model(name, weights=None, num_classes=architecture.num_classes)


def transformers_config(architecture: Architecture) -> "transformers.SwinConfig | transformers.Swinv2Config":
    """The configuration of this architecture in transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the import: nothing here needs the network
    import transformers

    config_class = transformers.Swinv2Config if architecture.model_type == "swinv2" else transformers.SwinConfig
    # The classes do not declare `num_labels`: they hand it on to their base class.
    labels: dict[str, Any] = {"num_labels": architecture.num_classes}
    return config_class(
        image_size=architecture.img_size,
        embed_dim=architecture.embed_dim,
        depths=list(architecture.depths),
        num_heads=list(architecture.num_heads),
        window_size=architecture.window_size,
        **labels,
        **architecture.v2_arguments,
    )


def transformers_swin(architecture: Architecture) -> nn.Module:
    """transformers' image classification model of this architecture."""
    settings = transformers_config(architecture)
    import transformers

    if isinstance(settings, transformers.Swinv2Config):
        return transformers.Swinv2ForImageClassification(settings)
    return transformers.SwinForImageClassification(settings)


LIBRARIES: dict[str, Callable[[Architecture], nn.Module | None]] = {
    "timm": timm_swin,
    "torchvision": torchvision_swin,
    "transformers": transformers_swin,
}


def build_with(library: str, architecture: Architecture) -> nn.Module | None:
    """The model of one of LIBRARIES; None if the library has no such architecture, such as Swin-MLP."""
    return None if architecture.model_type == "swin_mlp" else LIBRARIES[library](architecture)


class Logits(nn.Module):
    """Returns a model's logits, (B, num_classes), also if its library wraps them in an object."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits
