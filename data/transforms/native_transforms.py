"""DATA.BACKEND native: the transforms of reference.py and eval_presets.py in native code, bit-equal.

They take the same random numbers from the same generators and give the same pixels. A native transform is built from
its reference: known steps become native code; the others run unchanged.
"""

import logging
import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.codecs.crop_decode import CropResizeParams, OpenedImage, Source, has_jpeg_decoder
from data.codecs.pillow_decode import decode
from data.native.library import HOW_TO_INSTALL, library
from data.transforms.gpu_augment import GpuAugment, GpuAugParams
from data.transforms.native_augment import NativeAugment, Normalise
from data.transforms.reference import Transform
from data.transforms.resize_limit import ResizeLimit, check_resized, scale_short_side
from utils.compat import torchvision_eval_preset_type
from utils.compile_native import CannotBuild
from utils.errors import UserError

log = logging.getLogger(__name__)

# (image, its path for messages, memory for the result to save a copy) → (3, S, S) float32. With DATA.BACKEND gpu:
# (S, S, 3) uint8, and the parameters of its augmentation. Raises BadImage.
Prepare = Callable[[Source, str, Tensor | None], Tensor | tuple[Tensor, np.ndarray]]

_FILTERS = {InterpolationMode.BICUBIC: 1, InterpolationMode.BILINEAR: 0}


def resolve_backend(backend: str) -> str:
    """Resolves DATA.BACKEND auto to native, or to reference if the native library cannot be built; logs that once.

    Raises:
        UserError: `backend` is native or gpu, and the native library cannot be built.
    """
    if backend == "reference":
        return backend
    reason = _library_error()
    if reason is None:
        return "native" if backend == "auto" else backend
    if backend != "auto":
        raise UserError(
            f"DATA.BACKEND {backend}: {reason}. To fix this, {HOW_TO_INSTALL}, or set DATA.BACKEND reference."
        )
    _warn_once(
        "DATA.BACKEND auto: images are prepared by Pillow and timm, which takes about three times as long, because the "
        f"native library cannot be built: {reason}. To fix this, {HOW_TO_INSTALL}."
    )
    return "reference"


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@cache
def _library_error() -> str | None:
    """Why the native library cannot be built; None if it can."""
    try:
        library()
    except CannotBuild as error:
        return str(error)
    if not has_jpeg_decoder():
        _warn_once(
            "Pillow decodes all JPEGs, as a whole, which takes longer: its libjpeg gives other pixels than the native "
            "decoder, which is equal to libjpeg-turbo."
        )
    return None


def prepare_train(backend: str, transform: Transform) -> Prepare:
    """The function that prepares training images: `transform` with Pillow's decoding, or its native equivalent.

    Raises:
        UserError: as `resolve_backend`; or the backend is gpu, and a part of the transform is not implemented there.
    """
    resolved = resolve_backend(backend)
    native = None if resolved == "reference" else native_train(transform)
    if native is None:
        return PillowTransform(transform)
    return GpuTrainTransform(native) if resolved == "gpu" else native


def prepare_eval(backend: str, transform: Transform) -> Prepare:
    """The function that prepares evaluation images. With DATA.BACKEND gpu it is the same as with native."""
    native = None if resolve_backend(backend) == "reference" else native_eval(transform)
    return PillowTransform(transform) if native is None else native


class PillowTransform:
    """Decoding with Pillow, then a transform of timm or torchvision."""

    def __init__(self, transform: Transform):
        self.transform = transform
        self.limit = ResizeLimit(transform)

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> Tensor:
        image = decode(source, path)
        self.limit.check(image, path)
        return self.transform(image)


class NativeTrainTransform:
    """The training transform: decodes, crops, resizes and flips in one step, then augments arrays."""

    def __init__(self, steps: list[Any], to_tensor: int):
        """`steps` are those of the reference; `steps[to_tensor]` is ToTensor, and the next one is Normalize."""
        before, normalise = steps[:to_tensor], steps[to_tensor + 1]
        self.crop: RandomResizedCropAndInterpolation | None = None
        self.flip = 0.0
        if isinstance(before[0], RandomResizedCropAndInterpolation):
            self.crop = before.pop(0)
            if before and type(before[0]) is transforms.RandomHorizontalFlip:
                self.flip = before.pop(0).p
        # Without this crop (at small sizes), Pillow does all steps before the augmentation.
        self.pillow_steps = [before.pop(0) for step in list(before) if self.crop is None and _is_geometry(step)]
        self.limit = ResizeLimit(self.pillow_steps)
        self.augments = [NativeAugment(step) for step in before]
        self.mean, self.std = normalise.mean, normalise.std
        self.normalise = Normalise(self.mean, self.std)
        self.after = steps[to_tensor + 2 :]

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> Tensor:
        pixels = self.pixels(source, path)
        for augment in self.augments:
            pixels = augment(pixels)
        image = self.normalise(pixels, out)
        for step in self.after:
            image = step(image)
        return image

    def pixels(self, source: Source, path: str, out: np.ndarray | None = None) -> np.ndarray:
        """(S, S, 3) uint8: cropped, resized and flipped, not yet augmented. Raises BadImage."""
        if self.crop is not None:
            opened = OpenedImage(source, path)
            return opened.crop_resize(self._sample_params(self.crop, *opened.size), out)
        image = decode(source, path)
        self.limit.check(image, path)
        for step in self.pillow_steps:
            image = step(image)
        return np.array(image)

    def _sample_params(self, crop: RandomResizedCropAndInterpolation, width: int, height: int) -> CropResizeParams:
        box = crop_box(width, height, crop.scale, crop.ratio)
        mode = crop.interpolation
        mode = random.choice(mode) if isinstance(mode, tuple) else mode
        flip = self.flip > 0 and bool(torch.rand(1) < self.flip)
        height, width = crop.size
        return CropResizeParams(*box, width, height, 0, 0, width, height, bicubic=_FILTERS[mode], flip=flip)


class GpuTrainTransform:
    """Decodes, crops, resizes and flips as `NativeTrainTransform`, and samples the parameters of the other steps.

    Attributes:
        sample_params: samples the parameters for one image.
        augment: applies them to batches.
    """

    def __init__(self, native: NativeTrainTransform):
        """Raises UserError if one of the augmentations is not implemented in `GpuAugment`."""
        erasing = next((step for step in native.after if isinstance(step, RandomErasing)), None)
        self.native = native
        self.sample_params = GpuAugParams(native.augments, erasing)
        self.augment = GpuAugment(native.mean, native.std, erasing)

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> tuple[Tensor, np.ndarray]:
        pixels = self.native.pixels(source, path, None if out is None else out.numpy())
        height, width, _ = pixels.shape
        return torch.from_numpy(pixels), self.sample_params(width, height)


class NativeEvalTransform:
    """The evaluation transform: decodes, resizes and crops the centre (or only resizes) in one step; normalises."""

    def __init__(self, resize: int | tuple[int, int], crop: int | None, bicubic: int, mean: Any, std: Any):
        """`resize`: the short side, or (height, width). `crop`: the side of the square centre crop, or None."""
        self.resize, self.crop, self.bicubic = resize, crop, bicubic
        self.normalise = Normalise(mean, std)

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> Tensor:
        opened = OpenedImage(source, path)
        params = self._params(*opened.size)
        check_resized(opened.size, (params.out_width, params.out_height), path)
        return self.normalise(opened.crop_resize(params), out)

    def _params(self, width: int, height: int) -> CropResizeParams:
        if isinstance(self.resize, int):
            out_width, out_height = scale_short_side(width, height, self.resize)
        else:
            out_height, out_width = self.resize
        window_width, window_height = (out_width, out_height) if self.crop is None else (self.crop, self.crop)
        left, top = round((out_width - window_width) / 2), round((out_height - window_height) / 2)
        window = left, top, window_width, window_height
        return CropResizeParams(0, 0, width, height, out_width, out_height, *window, bicubic=self.bicubic, flip=0)


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Samples left, top, width and height of timm's random resized crop of an image, with timm's random numbers.

    Up to ten times, samples a fraction of the area (within `scale`) and an aspect ratio (within `ratio`, uniform in its
    logarithm). If none of the ten crops fits, returns the largest centre crop whose aspect ratio is within bounds.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = random.uniform(*scale) * (width * height)
        shape = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if w <= width and h <= height:
            top = random.randint(0, height - h)
            return random.randint(0, width - w), top, w, h
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (width - w) // 2, (height - h) // 2, w, h


def native_train(reference: Transform) -> NativeTrainTransform | None:
    """The native equivalent of `reference`; None if it does not have the structure of `train_transform`."""
    steps = list(getattr(reference, "transforms", ()))
    indices = [i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor)]
    if len(indices) != 1 or indices[0] == 0 or len(steps) <= indices[0] + 1:
        return None
    return NativeTrainTransform(steps, indices[0]) if type(steps[indices[0] + 1]) is transforms.Normalize else None


def native_eval(reference: Transform) -> NativeEvalTransform | None:
    """The native equivalent of `reference`; None if there is no bit-equal one (resizing of tensors, other crops)."""
    if isinstance(reference, torchvision_eval_preset_type()):
        resize, crop, mode = reference.resize_size, reference.crop_size, reference.interpolation
        mean, std = reference.mean, reference.std
    else:
        steps = list(getattr(reference, "transforms", ()))
        kinds = [transforms.ToTensor if isinstance(step, transforms.ToTensor) else type(step) for step in steps]
        ends = [transforms.ToTensor, transforms.Normalize]
        if kinds not in ([transforms.Resize, *ends], [transforms.Resize, transforms.CenterCrop, *ends]):
            return None
        resize, crop, mode = steps[0].size, steps[1].size if len(kinds) == 4 else None, steps[0].interpolation
        mean, std = steps[-1].mean, steps[-1].std
    resize, crop = _one_if_single(resize), _one_if_single(crop)
    if isinstance(crop, tuple):
        if crop[0] != crop[1]:
            return None
        crop = crop[0]
    shortest = resize if isinstance(resize, int) else min(resize)
    if mode not in _FILTERS or (crop is not None and crop > shortest):  # a larger crop would need padding
        return None
    return NativeEvalTransform(resize, crop, _FILTERS[mode], mean, std)


def _one_if_single(size: Any) -> Any:
    if isinstance(size, list | tuple):
        return size[0] if len(size) == 1 else tuple(size)
    return size


def _is_geometry(step: Any) -> bool:
    return isinstance(step, transforms.Resize | transforms.RandomCrop | transforms.RandomHorizontalFlip)
