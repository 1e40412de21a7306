"""DATA.BACKEND fast: the transforms of `data/transforms/reference.py` and `data/transforms/eval_presets.py`, with the same draws from the same
generators and the same pixels, by native code.

A fast transform is made from its reference: what is recognised in it is replaced, and what is not is done as it was.
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
from torchvision.transforms._presets import ImageClassification

from data.codecs.crop_decode import CropResizeParams, Source, decode_crop_resize, has_jpeg_decoder
from data.codecs.pillow_decode import decode
from data.native.library import HOW_TO_INSTALL, library
from data.transforms.gpu_augment import GpuAugment, GpuAugParams
from data.transforms.native_augment import NativeAugment, Normalise
from data.transforms.reference import Transform
from utils.compile_native import CannotBuild
from utils.errors import UserError

log = logging.getLogger(__name__)

# An image, what messages call it, and memory to put the result into if that saves copying it → (3, S, S) float32; for
# the backend device (S, S, 3) uint8, and what is still to be done to it. Raises BadImage.
Prepare = Callable[[Source, str, Tensor | None], Tensor | tuple[Tensor, np.ndarray]]

_FILTERS = {InterpolationMode.BICUBIC: 1, InterpolationMode.BILINEAR: 0}


def choose(backend: str) -> str:
    """DATA.BACKEND without auto: reference, fast or device. What is used and why is said in the log once.

    Raises:
        UserError: fast or device was asked for, and the native library cannot be built.
    """
    if backend == "reference":
        return backend
    missing = _missing()
    if missing is None:
        return "fast" if backend == "auto" else backend
    if backend != "auto":
        advice = f"To have it, {HOW_TO_INSTALL}, or take DATA.BACKEND reference."
        raise UserError(f"DATA.BACKEND {backend}: {missing}. {advice}")
    _warn_once(
        "DATA.BACKEND auto: images are prepared by Pillow and timm, which takes about three times as long, for the "
        f"native library cannot be built: {missing}. To have it, {HOW_TO_INSTALL}."
    )
    return "reference"


@cache
def _warn_once(message: str) -> None:
    log.warning("%s", message)


@cache
def _missing() -> str | None:
    """Why there is no native library, None where there is one."""
    try:
        library()
    except CannotBuild as error:
        return str(error)
    if not has_jpeg_decoder():
        _warn_once(
            "JPEGs are decoded by Pillow, as a whole, which takes longer: its libjpeg has other pixels than the native "
            "decoder, which agrees with libjpeg-turbo."
        )
    return None


def prepare_train(backend: str, transform: Transform) -> Prepare:
    """How training images are prepared: by `transform`, or by what gives the same faster.

    Raises:
        UserError: as `choose`; or the backend is device, and something of the transform is not done on the device.
    """
    chosen = choose(backend)
    fast = None if chosen == "reference" else native_train(transform)
    if fast is None:
        return PillowTransform(transform)
    return GpuTrainTransform(fast) if chosen == "device" else fast


def prepare_eval(backend: str, transform: Transform) -> Prepare:
    """The same for evaluation."""
    fast = None if choose(backend) == "reference" else native_eval(transform)
    return PillowTransform(transform) if fast is None else fast


class PillowTransform:
    """Pillow's decoding, then a transform of timm's or torchvision's."""

    def __init__(self, transform: Transform):
        self.transform = transform

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> Tensor:
        return self.transform(decode(source, path))


class NativeTrainTransform:
    """The training transform: random resized crop and flip in one with decoding, then augmentation on arrays."""

    def __init__(self, steps: list[Any], to_tensor: int):
        """`steps` of the reference; `steps[to_tensor]` is ToTensor, with Normalize behind it."""
        before, normalise = steps[:to_tensor], steps[to_tensor + 1]
        self.crop: RandomResizedCropAndInterpolation | None = None
        self.flip = 0.0
        if isinstance(before[0], RandomResizedCropAndInterpolation):
            self.crop = before.pop(0)
            if before and type(before[0]) is transforms.RandomHorizontalFlip:
                self.flip = before.pop(0).p
        # Without that crop (at small sizes) all up to the augmentation is left to Pillow.
        self.pillow = [before.pop(0) for step in list(before) if self.crop is None and _is_geometry(step)]
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
            return decode_crop_resize(source, path, self._sample_params, out)
        picture = decode(source, path)
        for step in self.pillow:
            picture = step(picture)
        return np.array(picture)

    def _sample_params(self, width: int, height: int) -> CropResizeParams:
        crop = self.crop
        box = crop_box(width, height, crop.scale, crop.ratio)
        mode = crop.interpolation
        mode = random.choice(mode) if isinstance(mode, tuple) else mode
        flip = self.flip > 0 and bool(torch.rand(1) < self.flip)
        height, width = crop.size
        return CropResizeParams(*box, width, height, 0, 0, width, height, _FILTERS[mode], flip)


class GpuTrainTransform:
    """Crop, resize and flip here, as `NativeTrainTransform`; all the rest is only drawn here and done by `augment`, in batches."""

    def __init__(self, fast: NativeTrainTransform):
        """Raises UserError where one of the augmentations is not done on the device."""
        erasing = next((step for step in fast.after if isinstance(step, RandomErasing)), None)
        self.fast = fast
        self.aug_params = GpuAugParams(fast.augments, erasing)
        self.augment = GpuAugment(fast.mean, fast.std, erasing)

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> tuple[Tensor, np.ndarray]:
        pixels = self.fast.pixels(source, path, None if out is None else out.numpy())
        height, width, _ = pixels.shape
        return torch.from_numpy(pixels), self.aug_params(width, height)


class NativeEvalTransform:
    """Resize and centre crop, or resize alone, in one with decoding; then normalise."""

    def __init__(self, resize: int | tuple[int, int], crop: int | None, bicubic: int, mean: Any, std: Any):
        """`resize`: the short side, or (height, width); `crop`: side of the square cut out of the centre."""
        self.resize, self.crop, self.bicubic = resize, crop, bicubic
        self.normalise = Normalise(mean, std)

    def __call__(self, source: Source, path: str, out: Tensor | None = None) -> Tensor:
        return self.normalise(decode_crop_resize(source, path, self._sample_params), out)

    def _sample_params(self, width: int, height: int) -> CropResizeParams:
        if isinstance(self.resize, int):
            short, long = sorted((width, height))
            sides = self.resize, int(self.resize * long / short)
            out_width, out_height = sides if width <= height else sides[::-1]
        else:
            out_height, out_width = self.resize
        window_width, window_height = (out_width, out_height) if self.crop is None else (self.crop, self.crop)
        left, top = round((out_width - window_width) / 2), round((out_height - window_height) / 2)
        return CropResizeParams(
            0, 0, width, height, out_width, out_height, left, top, window_width, window_height, self.bicubic, 0
        )


def crop_box(
    width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """left, top, width, height of timm's random resized crop of an image of `width` × `height`: its draws, of `random`.

    Up to ten times an area (as a share within `scale`) and a ratio of sides (within `ratio`, uniform in its logarithm)
    are drawn; where no such crop fits, it is the largest one in the centre whose ratio is within bounds.
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
    """The fast transform with draws and pixels of `reference`; None where that is not of `train_transform`'s kind."""
    steps = list(getattr(reference, "transforms", ()))
    places = [i for i, step in enumerate(steps) if isinstance(step, transforms.ToTensor)]
    if len(places) != 1 or places[0] == 0 or len(steps) <= places[0] + 1:
        return None
    return NativeTrainTransform(steps, places[0]) if type(steps[places[0] + 1]) is transforms.Normalize else None


def native_eval(reference: Transform) -> NativeEvalTransform | None:
    """The same for evaluation; None where nothing here is equal to the bit (resizing of tensors, other crops)."""
    if isinstance(reference, ImageClassification):
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
    if mode not in _FILTERS or crop is not None and crop > shortest:  # what lies beyond the image would be padded
        return None
    return NativeEvalTransform(resize, crop, _FILTERS[mode], mean, std)


def _one_if_single(size: Any) -> Any:
    if isinstance(size, list | tuple):
        return size[0] if len(size) == 1 else tuple(size)
    return size


def _is_geometry(step: Any) -> bool:
    return isinstance(step, transforms.Resize | transforms.RandomCrop | transforms.RandomHorizontalFlip)
