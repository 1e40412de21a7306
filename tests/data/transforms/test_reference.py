"""Transforms are those of the original recipe, bit-equal; Mixup and CutMix are timm's for the same random numbers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import Mixup
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from data.transforms.mixup import Mixer
from data.transforms.reference import eval_transform, posterize, train_transform
from tests._images import draw
from utils.errors import UserError
from utils.seed import derive, seed_cpu

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
RECIPE = {
    "hflip": 0.5,
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "re_count": 1,
    "interpolation": "bicubic",
}
MIX = {
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": None,
    "prob": 1.0,
    "switch_prob": 0.5,
    "mode": "batch",
    "label_smoothing": 0.1,
}


def normalised(image: Image.Image) -> torch.Tensor:
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32) / 255
    return (values - MEAN) / STD


@pytest.mark.parametrize("size", [(500, 375), (100, 333), (224, 224), (31, 900)])
@pytest.mark.parametrize(("name", "filter"), [("bicubic", 3), ("bilinear", 2), ("random", 2)])
def test_eval_is_resize_and_centre_crop_to_the_bit(size, name, filter):
    image = draw(1, size)
    result = eval_transform(224, crop=True, interpolation=name)(image)
    width, height = size
    short, long = 256, int(256 * max(size) / min(size))
    resized = image.resize((short, long) if width <= height else (long, short), filter)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    assert torch.equal(result, normalised(resized.crop((left, top, left + 224, top + 224))))


def test_eval_size_is_rounded_down_and_without_crop_resized_as_a_whole():
    image = draw(2, (300, 200))
    resized = image.resize((384, int(256 / 224 * 256)), Image.Resampling.BICUBIC)
    assert eval_transform(256, True, "bicubic").transforms[0].size == resized.height == 292
    whole = image.resize((384, 384), Image.Resampling.BICUBIC)
    assert torch.equal(eval_transform(384, crop=False, interpolation="bicubic")(image), normalised(whole))


def test_small_images_pass_eval_unchanged():
    image = draw(3, (32, 32))
    assert torch.equal(eval_transform(32, True, "bicubic")(image), normalised(image))


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (20, 64), (64, 64)])
def test_small_size_takes_images_of_any_size(size):
    assert eval_transform(32, True, "bicubic")(draw(4, size)).shape == (3, 32, 32)
    assert train_transform(32, **RECIPE)(draw(4, size)).shape == (3, 32, 32)


def original_recipe(size: int) -> transforms.Compose:
    """The recipe of the published runs, written out with its numbers."""
    crop = RandomResizedCropAndInterpolation(size, (0.08, 1.0), (3 / 4, 4 / 3), "bicubic")
    policy = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104), "interpolation": Image.BICUBIC}
    return transforms.Compose(
        [
            crop if size > 32 else transforms.RandomCrop(size, padding=4),
            transforms.RandomHorizontalFlip(0.5),
            rand_augment_transform("rand-m9-mstd0.5-inc1", policy),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            RandomErasing(0.25, min_area=0.02, max_area=1 / 3, min_aspect=0.3, mode="pixel", max_count=1, device="cpu"),
        ]
    )


@pytest.mark.parametrize(("size", "source"), [(224, (300, 260)), (32, (32, 32))])
def test_train_is_the_original_recipe_for_the_same_random_numbers(size, source):
    ours, original = train_transform(size, **RECIPE), original_recipe(size)
    image = draw(5, source)
    results = []
    for seed in range(25):
        pair = []
        for transform in (ours, original):
            seed_cpu(derive("test", seed))
            pair.append(transform(image))
        assert torch.equal(*pair)
        results.append(pair[0])
    assert len({result.sum().item() for result in results}) == 25


def test_crop_has_the_papers_distribution():
    """Area and log ratio are uniform in their ranges if the crop always fits, as it does here."""
    crop = train_transform(224, **RECIPE).transforms[0]
    seed_cpu(0)
    scale, ratio, image = [], [], draw(0, (400, 400))
    for _ in range(4000):
        _, _, height, width = crop.get_params(image, (0.08, 0.5), crop.ratio)
        scale.append(height * width / 400**2)
        ratio.append(math.log(width / height))
    assert crop.scale == (0.08, 1.0) and crop.ratio == (3 / 4, 4 / 3)
    # Standard errors of the two means: 0.0019 and 0.0026; four of them.
    assert abs(np.mean(scale) - 0.29) < 0.0077 and abs(np.mean(ratio)) < 0.0105


def test_rand_augment_and_erasing_have_the_originals_parameters():
    steps = train_transform(224, **RECIPE).transforms
    augment = next(step for step in steps if isinstance(step, RandAugment))
    assert augment.num_layers == 2 and augment.choice_weights is None and len(augment.ops) == 15
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in augment.ops} == {(0.5, 9, 0.5)}
    assert {op.name for op in augment.ops} == {
        "AutoContrast",
        "Equalize",
        "Invert",
        "Rotate",
        "PosterizeIncreasing",
        "SolarizeIncreasing",
        "SolarizeAdd",
        "ColorIncreasing",
        "ContrastIncreasing",
        "BrightnessIncreasing",
        "SharpnessIncreasing",
        "ShearX",
        "ShearY",
        "TranslateXRel",
        "TranslateYRel",
    }
    assert augment.ops[0].kwargs == {"fillcolor": (124, 116, 104), "resample": Image.BICUBIC}
    erasing = steps[-1]
    assert (erasing.probability, erasing.max_count, erasing.per_pixel, erasing.device) == (0.25, 1, True, "cpu")


def test_disabled_augmentations_are_absent():
    off = RECIPE | {"auto_augment": "none", "color_jitter": 0.0, "re_prob": 0.0, "interpolation": "random"}
    kinds = [type(step).__name__ for step in train_transform(224, **off).transforms]
    assert kinds == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    jitter = train_transform(224, **off | {"color_jitter": 0.4}).transforms[2]
    assert isinstance(jitter, transforms.ColorJitter) and jitter.brightness == (0.6, 1.4) and jitter.hue is None
    assert train_transform(32, **off).transforms[0].interpolation is InterpolationMode.BILINEAR


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("minmax", [None, (0.2, 0.8)])
def test_mixing_equals_timm_for_the_same_random_numbers(mode, minmax):
    options = {"cutmix_minmax": minmax, "prob": 1.0, "switch_prob": 0.5, "mode": mode, "label_smoothing": 0.1}
    mixer = Mixer(7, 6, 5, mixup=0.8, cutmix=1.0, **options)
    image, target = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    results = []
    for position in (0, 6, 12, 600):
        mixed, soft = mixer(image.clone(), target, position)
        np.random.seed(derive(7, "mix", position) & 0xFFFFFFFF)
        expected = Mixup(0.8, 1.0, num_classes=5, **options)(image.clone(), target)
        assert torch.equal(mixed, expected[0]) and torch.equal(soft, expected[1])
        assert torch.allclose(soft.sum(1), torch.ones(6))
        results.append(tuple(mixed[:, 0, 8].flatten().tolist()))
    assert len(set(results)) == 4


def test_mixing_leaves_numpys_generator_alone():
    np.random.seed(3)
    expected = np.random.rand(3)
    np.random.seed(3)
    Mixer(0, 2, 5, **MIX)(torch.zeros(2, 3, 4, 4), torch.zeros(2).long(), 0)
    assert np.array_equal(np.random.rand(3), expected)


def test_odd_batches_are_refused():
    with pytest.raises(UserError, match="DATA.BATCH_SIZE must be even, not 5"):
        Mixer(0, 5, 5, **MIX)


@pytest.mark.parametrize("policy", ["rand-m10-n3", "rand-m10-inc1", "original", "v0", "3a", "augmix-m5-w3"])
def test_posterize_to_zero_bits_works_with_pillow_13(monkeypatch: pytest.MonkeyPatch, policy: str):
    """Pillow 13 refuses 0 bits; earlier versions make the image black."""
    plain = ImageOps.posterize

    def refusing(image: Image.Image, bits: int) -> Image.Image:
        if not 1 <= bits <= 8:
            raise ValueError("bits must be between or equal to 1 and 8")
        return plain(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", refusing)
    transform = train_transform(
        40,
        hflip=0,
        color_jitter=0,
        auto_augment=policy,
        re_prob=0,
        re_mode="pixel",
        re_count=1,
        interpolation="bicubic",
    )
    functions = {op.aug_fn for step in transform.transforms for op in getattr(step, "ops", [])}
    functions |= {op.aug_fn for step in transform.transforms for ops in getattr(step, "policy", []) for op in ops}
    assert timm_ops.posterize not in functions
    for function in functions & {posterize}:
        assert not np.asarray(function(Image.new("RGB", (40, 40), "white"), 0)).any()
