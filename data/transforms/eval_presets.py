"""How each library prepares an image for a test: its own resize, crop, interpolation and arithmetic, to the bit.

Published accuracies hold for the preparation they were measured with. `Protocol` says which one, in words for the log
and as a transform from an RGB picture to a normalised (3, S, S) float32 tensor.
"""

from dataclasses import dataclass

import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from data.transforms.reference import SMALL, Transform, eval_transform, interpolation_mode, original_resize
from utils.errors import UserError

ORIGINS = ("original", "timm", "torchvision", "hf")

TORCHVISION = {  # its names by MODEL.TYPE, channels of the first stage, and depths
    ("swin", 96, (2, 2, 6, 2)): "swin_t",
    ("swin", 96, (2, 2, 18, 2)): "swin_s",
    ("swin", 128, (2, 2, 18, 2)): "swin_b",
    ("swinv2", 96, (2, 2, 6, 2)): "swin_v2_t",
    ("swinv2", 96, (2, 2, 18, 2)): "swin_v2_s",
    ("swinv2", 128, (2, 2, 18, 2)): "swin_v2_b",
}


@dataclass(frozen=True)
class InputConfig:
    """What a network expects of its images. The defaults are those of every Swin."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float | None = None  # timm's share of the resized image's short side that the crop keeps; None: by size
    crop_mode: str = "center"


@dataclass(frozen=True)
class EvalPreset:
    """One way to prepare images for a test: whose it is, what it does, and the transform."""

    origin: str
    description: str
    transform: Transform


def timm_inputs(name: str, size: int) -> InputConfig:
    """What timm's configuration of the model `name` says about images of `size` × `size`.

    Raises:
        UserError: timm has no model of that name.
    """
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        raise UserError(f"MODEL.NAME {name!r} is no model of timm {timm.__version__}; timm.list_models() names them.")
    at_test_size = cfg.test_input_size is not None and cfg.test_input_size[-1] == size
    crop_pct = cfg.test_crop_pct if at_test_size and cfg.test_crop_pct else cfg.crop_pct
    return InputConfig(cfg.mean, cfg.std, cfg.interpolation, crop_pct, cfg.crop_mode)


def eval_preset(
    origin: str, size: int, crop: bool, interpolation: str, inputs: InputConfig, torchvision_name: str
) -> EvalPreset:
    """The preparation of `origin`, one of ORIGINS, for images of `size` × `size` pixels.

    Args:
        crop, interpolation: of the original's preparation alone; the other three have no choice.
        inputs: mean and standard deviation, and timm's numbers where the model is timm's.
        torchvision_name: which of torchvision's models this architecture is, such as "swin_v2_t"; "" for none.

    Raises:
        UserError: torchvision has no preparation for this architecture.
    """
    if origin == "original":
        return _original(size, crop, interpolation, inputs)
    if origin == "timm":
        return _timm(size, inputs)
    if origin == "torchvision":
        return _torchvision(size, torchvision_name)
    return _hugging_face(size, inputs)


def _original(size: int, crop: bool, interpolation: str, inputs: InputConfig) -> EvalPreset:
    cropped = f"resize to {original_resize(size)}, centre crop {size}"
    said = cropped if crop or size <= SMALL else f"resize to {size} x {size}"
    transform = eval_transform(size, crop, interpolation, inputs.mean, inputs.std)
    return EvalPreset("original", f"{said}, {interpolation_mode(interpolation).value}", transform)


def _timm(size: int, inputs: InputConfig) -> EvalPreset:
    """timm's transform. Its Swins keep all of a 384-pixel image's resized short side, and 0.9 of smaller ones'."""
    crop_pct = inputs.crop_pct or (1.0 if size >= 384 else 0.9)
    transform = create_transform(
        input_size=size,
        is_training=False,
        interpolation=inputs.interpolation,
        mean=inputs.mean,
        std=inputs.std,
        crop_pct=crop_pct,
        crop_mode=inputs.crop_mode,
    )
    said = f"resize to {int(size / crop_pct)}, {inputs.crop_mode} crop {size} ({crop_pct}), {inputs.interpolation}"
    return EvalPreset("timm", said, transform)


def _torchvision(size: int, name: str) -> EvalPreset:
    """The preset that comes with torchvision's weights; at another image size, both of its sizes in proportion."""
    if not name:
        raise UserError(
            "TEST.PRESET torchvision: torchvision has no weights of this architecture, only of Swin and Swin V2 "
            "T, S and B; set TEST.PRESET to original, timm or hf."
        )
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms
    published = preset()
    resized = round(published.resize_size[0] * size / published.crop_size[0])
    transform = preset(crop_size=size, resize_size=resized)
    said = f"{name}: resize to {resized}, centre crop {size}, {published.interpolation.value}"
    return EvalPreset("torchvision", said, transform)


def _hugging_face(size: int, inputs: InputConfig) -> EvalPreset:
    return EvalPreset("hf", f"resize to {size} x {size}, bicubic on tensors", _ImageProcessor(size, inputs))


class _ImageProcessor:
    """What transformers' image processor does with the settings that the released Swins share.

    That is `ViTImageProcessor` of transformers 5, which works on tensors: it rounds the resized values to whole numbers
    in another way than Pillow does, and divides by 255 and the standard deviation at once, both in float32.
    """

    def __init__(self, size: int, inputs: InputConfig):
        self.size = [size, size]
        self.mean = (torch.tensor(inputs.mean) * 255).tolist()
        self.std = (torch.tensor(inputs.std) * 255).tolist()

    def __call__(self, picture: Image.Image) -> Tensor:
        values = functional.pil_to_tensor(picture)  # (3, height, width) uint8
        values = functional.resize(values, self.size, InterpolationMode.BICUBIC, antialias=True)
        return functional.normalize(values.float(), self.mean, self.std)
