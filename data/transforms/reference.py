"""The transforms of the original recipe: from an RGB image to a normalised (3, S, S) float32 tensor."""

from collections.abc import Callable, Sequence
from typing import cast

from PIL import Image, ImageOps
from timm.data import auto_augment as timm_ops
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

Transform = Callable[[Image.Image], Tensor]

# Up to this size (CIFAR, digits) images are not resized, and the random crop has a padding instead of a random area.
SMALL = 32


def train_transform(
    size: int,
    *,
    hflip: float,
    color_jitter: float,
    auto_augment: str,
    re_prob: float,
    re_mode: str,
    re_count: int,
    interpolation: str,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Transform:
    """Random resized crop (area 0.08–1, ratio 3/4–4/3), flip, RandAugment or colour jitter, normalise, random erasing.

    At sizes up to 32 the first step is a random crop with a padding of 4; images of another size are resized first.
    Random numbers come from `random`, `numpy.random` and torch's CPU generator.

    Args:
        hflip: probability of a horizontal flip.
        color_jitter: 0 for none; without effect if there is an AutoAugment policy.
        auto_augment: timm's policy string, or "none".
        re_prob, re_mode, re_count: random erasing: probability; "const", "rand" or "pixel"; number of regions.
        interpolation: "random" samples bilinear or bicubic for each image.
        mean, std: for the normalisation of values between 0 and 1.
    """
    transform = create_transform(
        input_size=size,
        is_training=True,
        hflip=hflip,
        color_jitter=cast(float, color_jitter if color_jitter > 0 else None),  # timm takes None, undeclared
        auto_augment=auto_augment if auto_augment != "none" else None,
        re_prob=re_prob,
        re_mode=re_mode,
        re_count=re_count,
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )
    for step in transform.transforms:
        _use_own_posterize(step)
    if size <= SMALL:
        to_size = transforms.Resize(size, interpolation_mode(interpolation))  # does not change images of that size
        transform.transforms[:1] = [to_size, transforms.RandomCrop(size, padding=4)]
    return transform


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """timm's posterize with any Pillow: from version 13 on, Pillow refuses 0 bits, which turn an image black."""
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= 8 else ImageOps.posterize(image, bits_to_keep)


def _use_own_posterize(policy: object) -> None:
    """Replaces timm's posterize in the operations of a RandAugment, AutoAugment or AugMix."""
    ops = getattr(policy, "ops", None) or [op for ops in getattr(policy, "policy", []) for op in ops]
    for op in ops:
        if op.aug_fn is timm_ops.posterize:
            op.aug_fn = posterize


def eval_transform(
    size: int,
    crop: bool,
    interpolation: str,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Transform:
    """Resizes to 256/224 of `size` and crops the centre; without `crop`, resizes to `size` × `size`. Then normalises.

    At sizes up to 32, images are resized to `size` itself: an image of that size is not changed.
    """
    mode = interpolation_mode(interpolation)
    if size <= SMALL or crop:
        geometry = [transforms.Resize(original_resize(size), interpolation=mode), transforms.CenterCrop(size)]
    else:
        geometry = [transforms.Resize((size, size), interpolation=mode)]
    return transforms.Compose([*geometry, transforms.ToTensor(), transforms.Normalize(mean, std)])


def original_resize(size: int) -> int:
    """The length of the short side to which the original recipe resizes images before the centre crop."""
    return size if size <= SMALL else int(256 / 224 * size)


def interpolation_mode(interpolation: str) -> InterpolationMode:
    """torchvision's interpolation mode. "random" is for training only; here it means bilinear, as in the original."""
    return InterpolationMode.BILINEAR if interpolation == "random" else InterpolationMode(interpolation)
