"""Evaluation presets: the resize, crop, interpolation and arithmetic of each library, bit-equal.

A published accuracy holds for the preset it was measured with. An `EvalPreset` is a description for the log and a
transform from an RGB image to a normalised (3, S, S) float32 tensor.
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


@dataclass(frozen=True)
class InputConfig:
    """The images that a network expects. The defaults are those of all Swins."""

    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float | None = None  # fraction of the short side that timm's crop keeps; None: depends on the size
    crop_mode: str = "center"


DEFAULT_INPUTS = InputConfig()


@dataclass(frozen=True)
class EvalPreset:
    """One way to prepare images for evaluation.

    Attributes:
        origin: the library that the preset is from, one of utils.origins.ORIGINS.
        description: the steps, for the log.
    """

    origin: str
    description: str
    transform: Transform


def timm_inputs(name: str, size: int) -> InputConfig:
    """The input configuration of timm's model `name` for images of `size` × `size`.

    Raises:
        UserError: timm has no model of that name.
    """
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        raise UserError(f"MODEL.NAME {name!r} is no model of timm {timm.__version__}; timm.list_models() lists them.")
    at_test_size = cfg.test_input_size is not None and cfg.test_input_size[-1] == size
    crop_pct = cfg.test_crop_pct if at_test_size and cfg.test_crop_pct else cfg.crop_pct
    return InputConfig(cfg.mean, cfg.std, cfg.interpolation, crop_pct, cfg.crop_mode)


def eval_preset(
    origin: str,
    size: int,
    *,
    crop: bool = True,
    interpolation: str = "bicubic",
    inputs: InputConfig = DEFAULT_INPUTS,
    torchvision_name: str = "",
) -> EvalPreset:
    """The preset of `origin`, one of utils.origins.ORIGINS, for images of `size` × `size` pixels.

    Args:
        crop, interpolation: used by the original preset only.
        inputs: mean and standard deviation, and for timm's models their interpolation and crop.
        torchvision_name: torchvision's name of this architecture, such as "swin_v2_t"; "" if it has none.

    Raises:
        UserError: torchvision has no preset for this architecture.
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
    steps = cropped if crop or size <= SMALL else f"resize to {size} x {size}"
    transform = eval_transform(size, crop, interpolation, inputs.mean, inputs.std)
    return EvalPreset("original", f"{steps}, {interpolation_mode(interpolation).value}", transform)


def _timm(size: int, inputs: InputConfig) -> EvalPreset:
    """timm's transform. For its Swins the crop keeps the whole short side from 384 pixels on, and 0.9 of it below."""
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
    steps = f"resize to {int(size / crop_pct)}, {inputs.crop_mode} crop {size} ({crop_pct}), {inputs.interpolation}"
    return EvalPreset("timm", steps, transform)


def _torchvision(size: int, name: str) -> EvalPreset:
    """The preset of torchvision's weights. For another image size, resize and crop are scaled in proportion."""
    if not name:
        raise UserError(
            "TEST.PRESET torchvision: torchvision has no weights of this architecture, only of Swin and Swin V2 "
            "T, S and B; set TEST.PRESET to original, timm or hf."
        )
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms
    published = preset()
    resized = round(published.resize_size[0] * size / published.crop_size[0])
    transform = preset(crop_size=size, resize_size=resized)
    steps = f"{name}: resize to {resized}, centre crop {size}, {published.interpolation.value}"
    return EvalPreset("torchvision", steps, transform)


def _hugging_face(size: int, inputs: InputConfig) -> EvalPreset:
    return EvalPreset("hf", f"resize to {size} x {size}, bicubic on tensors", _ImageProcessor(size, inputs))


class _ImageProcessor:
    """The image processor of transformers, with the settings that the released Swins share.

    It is `ViTImageProcessor` of transformers 5. It works on tensors: it rounds the resized values to integers in
    another way than Pillow does, and it divides by 255 and by the standard deviation in one step, in float32.
    """

    def __init__(self, size: int, inputs: InputConfig):
        self.size = [size, size]
        self.mean = (torch.tensor(inputs.mean) * 255).tolist()
        self.std = (torch.tensor(inputs.std) * 255).tolist()

    def __call__(self, image: Image.Image) -> Tensor:
        values = functional.pil_to_tensor(image)  # (3, height, width) uint8
        values = functional.resize(values, self.size, InterpolationMode.BICUBIC, antialias=True)
        return functional.normalize(values.float(), self.mean, self.std)
