"""The native augmentation against timm on Pillow's pictures: the same draws, the same pixels, to the bit."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torchvision import transforms

from data.native.library import library
from data.transforms import native_augment
from data.transforms.native_augment import NativeAugment, Normalise, Operation, OpRecord
from data.transforms.reference import train_transform
from tests._images import draw
from utils.compile_native import CannotBuild
from utils.seed import seed_cpu

try:
    library()
except CannotBuild as error:
    pytest.skip(f"no native library: {error}", allow_module_level=True)

FILL = (124, 116, 104)  # ImageNet's mean, as timm rounds it
FILTERS = {
    "bicubic": {"interpolation": Image.Resampling.BICUBIC},
    "bilinear": {"interpolation": Image.Resampling.BILINEAR},
    "nearest": {"interpolation": Image.Resampling.NEAREST},
    "random": {},
}
MOVING = [name for name in timm_ops.NAME_TO_OP if name.startswith(("Rotate", "Shear", "Translate"))]
EVERYTHING = list(timm_ops.NAME_TO_OP)
POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-mstd0.5",
    "rand-m5-n3-p0.9-mstd101",
    "rand-m20-mmax30-n4-inc1",
    "rand-m7-tweights-n3",
    "rand-m6-t3a-mstd1",
    "original-mstd0.5",
    "originalr",
    "v0",
    "v0r-mstd1",
    "3a",
]


def pictures(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Noise, smooth, uniform, black and white blocks, wrapping ramps, dark: (H, W, 3) uint8 of each size (H, W)."""
    drawn = np.random.RandomState(0)
    found = []
    for h, w in sizes:
        found.append(drawn.randint(0, 256, (h, w, 3)))
        found.append(np.asarray(draw(h, (w, h))))
        found.append(np.full((h, w, 3), (0, 128, 255)))
        found.append(255 * drawn.randint(0, 2, (h // 2 + 1, w // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)[:h, :w])
        found.append(np.add.outer(np.arange(h), np.arange(w))[..., None] * (1, 2, 3) % 256)
        found.append(drawn.randint(0, 3, (h, w, 3)))
    return [each.astype(np.uint8) for each in found]


def both(reference, fast: NativeAugment, image: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What the two make of `image` from one seed; what is left of the generators is the same."""
    results, states = [], []
    for run in (lambda: np.asarray(reference(Image.fromarray(image))), lambda: fast(image.copy())):
        seed_cpu(seed)
        results.append(run())
        kind, keys, *position = np.random.get_state()
        states.append((random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()))
    assert states[0] == states[1]
    return results[0], results[1]


def check_op(op: AugmentOp, images: list[np.ndarray]) -> None:
    reference = AutoAugment([[op]])
    fast = NativeAugment(reference)
    assert fast.draws_ahead
    for seed, image in enumerate(images):
        want, got = both(reference, fast, image, seed)
        assert np.array_equal(want, got), f"{op}: picture {seed} {image.shape}"


def op_of(name: str, magnitude: float, **hparams) -> AugmentOp:
    hparams = {"translate_const": 100, "img_mean": FILL, **hparams}
    return AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_operation_at_each_magnitude(name: str):
    images = pictures([(33, 40), (17, 5), (4, 3), (1, 2)])
    for magnitude in range(11):
        check_op(op_of(name, magnitude, interpolation=Image.Resampling.BICUBIC), images)


@pytest.mark.slow
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("noise", [0, 0.5, float("inf")])
@pytest.mark.parametrize("name", EVERYTHING)
def test_each_operation_at_full_size(name: str, noise: float, filter: str):
    if filter != "random" and name not in MOVING:
        pytest.skip("does not interpolate")
    images = pictures([(224, 224), (131, 97), (225, 223)])
    for magnitude in range(11):
        check_op(op_of(name, magnitude, magnitude_std=noise, **FILTERS[filter]), images)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("name", MOVING)
def test_moving_with_noise(name: str, filter: str):
    images = pictures([(31, 36), (24, 24)])
    for magnitude in (0, 3, 9, 10):
        check_op(op_of(name, magnitude, magnitude_std=0.5, **FILTERS[filter]), images)


@pytest.mark.parametrize("level", [-140, -100, -60, -30, 30, 60, 90, 120, 150])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "nearest"])
def test_large_moves_and_turns(level: float, filter: str):
    """Beyond timm's usual range, with MMAX: quarter and half turns, pictures that leave the frame altogether."""
    resample = FILTERS[filter]["interpolation"]
    for name, function in timm_ops.NAME_TO_OP.items():
        if name not in MOVING:
            continue
        argument = 3 * level if name == "Rotate" else level / 100
        note = native_augment.RECORDERS[function]
        for image in pictures([(40, 40), (21, 30)]):
            notes = native_augment.OpRecorder(image.shape[1], image.shape[0])
            note(notes, argument, resample=resample, fillcolor=FILL)
            got = NativeAugment(AutoAugment([])).apply(image.copy(), notes.steps)
            want = np.asarray(function(Image.fromarray(image), argument, resample=resample, fillcolor=FILL))
            assert np.array_equal(want, got), f"{name} {argument} {image.shape}"


@pytest.mark.parametrize("filter", [1, 2])
@pytest.mark.parametrize("share", [0.0, 1e-17, -1e-17, 1e-12, 0.5, 0.25, 1 / 3, 1 - 1e-16, 1.0 - 1e-12, 2.0, 31.999999])
def test_moves_that_end_near_whole_pixels(share: float, filter: int):
    """Where rounding alone decides which pixels are neighbours."""
    resample = {1: Image.Resampling.BILINEAR, 2: Image.Resampling.BICUBIC}[filter]
    for image in pictures([(32, 32), (19, 27)]):
        for sign in (1, -1):
            d = sign * share
            for matrix in ((1, 0, d, 0, 1, 0), (1, 0, 0, 0, 1, d), (1, d, 0, 0, 1, 0), (1, 0, 0, d, 1, 0),
                           (1, d, 0, d, 1, 0), (1, 0, d, 0, 1, d)):  # fmt: skip
                size = image.shape[1], image.shape[0]
                want = Image.fromarray(image).transform(size, Image.AFFINE, matrix, resample, fillcolor=FILL)
                got = NativeAugment(AutoAugment([])).apply(
                    image.copy(), [OpRecord(Operation.AFFINE, filter, FILL, matrix)]
                )
                assert np.array_equal(np.asarray(want), got), (matrix, image.shape)


def reference_of(policy: str, size: int, interpolation: str = "bicubic"):
    transform = train_transform(size, 0.0, 0.0, policy, 0.0, "const", 1, interpolation)
    return transform.transforms[-3]


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy: str, interpolation: str):
    """Whole policies, as `train_transform` makes them from the configuration."""
    reference = reference_of(policy, 48, interpolation)
    fast = NativeAugment(reference)
    assert fast.draws_ahead
    images = pictures([(48, 48), (37, 41)])
    for seed in range(60):
        want, got = both(reference, fast, images[seed % len(images)], seed)
        assert np.array_equal(want, got), seed


def test_the_generators_are_left_alike_over_thousands_of_draws():
    """One run of draws without seeding in between: any draw more or less would show in all that follow."""
    reference = reference_of("rand-m9-mstd0.5-inc1", 16, "random")
    fast = NativeAugment(reference)
    picture, pixels = Image.new("RGB", (16, 16)), np.zeros((16, 16, 3), np.uint8)
    states = []
    for run in (lambda: reference(picture), lambda: fast.draw(16, 16)):
        seed_cpu(5)
        for _ in range(3000):
            run()
        states.append((random.getstate(), np.random.get_state()[1].tolist()))
    assert states[0] == states[1]
    assert fast(pixels).shape == (16, 16, 3)


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4), (0.9, 0.0, 0.2), (0.0, 0.8, 0.0)])
def test_colour_jitter(jitter: tuple[float, ...]):
    reference = transforms.ColorJitter(*jitter)
    fast = NativeAugment(reference)
    assert fast.draws_ahead
    for seed, image in enumerate(pictures([(33, 40), (16, 16), (5, 4)])):
        want, got = both(reference, fast, image, seed)
        assert np.array_equal(want, got), seed


def test_what_is_not_known_is_left_to_the_reference():
    """AugMix, hue and operations of another's making: the reference's own code, with its draws."""

    def own(picture: Image.Image, **_) -> Image.Image:
        return picture.point(lambda value: value * random.random())

    op = op_of("Invert", 5)
    op.aug_fn = own
    references = [
        reference_of("augmix-m5-w4-d2", 32),
        transforms.ColorJitter(hue=0.2),
        RandAugment([op, op_of("Rotate", 5)], 3),
        AutoAugment([[op_of("Rotate", 5), op]]),
    ]
    for reference in references:
        fast = NativeAugment(reference)
        assert not fast.draws_ahead
        for seed, image in enumerate(pictures([(32, 32)])):
            want, got = both(reference, fast, image, seed)
            assert np.array_equal(want, got)


def test_every_operation_of_timm_is_known():
    """A new one in a later timm is not a fault, only slower; this says that it is there."""
    assert set(timm_ops.NAME_TO_OP.values()) <= set(native_augment.RECORDERS)


def test_drawing_ahead_is_the_same_as_drawing_in_place():
    fast = NativeAugment(reference_of("rand-m9-n4-p1.0-mstd0.5-inc1", 24))
    for seed, image in enumerate(pictures([(24, 24)])):
        seed_cpu(seed)
        at_once = fast(image.copy())
        seed_cpu(seed)
        steps = fast.draw(24, 24)
        seed_cpu(99)
        assert np.array_equal(fast.apply(image.copy(), steps), at_once)


@pytest.mark.parametrize("size", [(224, 224), (5, 7), (1, 1)])
def test_normalising(size: tuple[int, int]):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))])
    for image in pictures([size])[:2]:
        want = reference(Image.fromarray(image))
        assert torch.equal(Normalise(mean, std)(image), want)
        batch = torch.full((3, 3, *size), 7.0)
        Normalise(mean, std)(image, batch[1])
        assert torch.equal(batch[1], want) and (batch[0] == 7).all() and (batch[2] == 7).all()
