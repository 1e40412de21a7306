"""Native augmentation against timm on Pillow images: the same random numbers and bit-equal pixels."""

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
from tests.data.transforms.test_reference import RECIPE
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


def make_images(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Noise, smooth, uniform, black and white blocks, wrapping ramps, dark: (H, W, 3) uint8 of each size (H, W)."""
    rng = np.random.RandomState(0)
    images = []
    for h, w in sizes:
        images.append(rng.randint(0, 256, (h, w, 3)))
        images.append(np.asarray(draw(h, (w, h))))
        images.append(np.full((h, w, 3), (0, 128, 255)))
        images.append(255 * rng.randint(0, 2, (h // 2 + 1, w // 2 + 1, 3)).repeat(2, 0).repeat(2, 1)[:h, :w])
        images.append(np.add.outer(np.arange(h), np.arange(w))[..., None] * (1, 2, 3) % 256)
        images.append(rng.randint(0, 3, (h, w, 3)))
    return [image.astype(np.uint8) for image in images]


def both(reference, native: NativeAugment, image: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The results of both for `image` from one seed. Asserts that they leave the generators in the same state."""
    results, states = [], []
    for run in (lambda: np.asarray(reference(Image.fromarray(image))), lambda: native(image.copy())):
        seed_cpu(seed)
        results.append(run())
        kind, keys, *position = np.random.get_state()
        states.append((random.getstate(), keys.tolist(), position, torch.get_rng_state().tolist()))
    assert states[0] == states[1]
    return results[0], results[1]


def check_op(op: AugmentOp, images: list[np.ndarray]) -> None:
    reference = AutoAugment([[op]])
    native = NativeAugment(reference)
    assert native.recordable
    for seed, image in enumerate(images):
        want, got = both(reference, native, image, seed)
        assert np.array_equal(want, got), f"{op}: image {seed} {image.shape}"


def op_of(name: str, magnitude: float, **hparams) -> AugmentOp:
    hparams = {"translate_const": 100, "img_mean": FILL, **hparams}
    return AugmentOp(name, prob=1.0, magnitude=magnitude, hparams=hparams)


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_operation_at_each_magnitude(name: str):
    images = make_images([(33, 40), (17, 5), (4, 3), (1, 2)])
    for magnitude in range(11):
        check_op(op_of(name, magnitude, interpolation=Image.Resampling.BICUBIC), images)


@pytest.mark.slow
@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("noise", [0, 0.5, float("inf")])
@pytest.mark.parametrize("name", EVERYTHING)
def test_each_operation_at_full_size(name: str, noise: float, filter: str):
    if filter != "random" and name not in MOVING:
        pytest.skip("does not interpolate")
    images = make_images([(224, 224), (131, 97), (225, 223)])
    for magnitude in range(11):
        check_op(op_of(name, magnitude, magnitude_std=noise, **FILTERS[filter]), images)


@pytest.mark.parametrize("filter", FILTERS)
@pytest.mark.parametrize("name", MOVING)
def test_moving_with_noise(name: str, filter: str):
    images = make_images([(31, 36), (24, 24)])
    for magnitude in (0, 3, 9, 10):
        check_op(op_of(name, magnitude, magnitude_std=0.5, **FILTERS[filter]), images)


@pytest.mark.parametrize("level", [-140, -100, -60, -30, 30, 60, 90, 120, 150])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear", "nearest"])
def test_large_moves_and_turns(level: float, filter: str):
    """Beyond timm's usual range, with MMAX: quarter and half turns, images shifted out of the frame."""
    resample = FILTERS[filter]["interpolation"]
    for name, function in timm_ops.NAME_TO_OP.items():
        if name not in MOVING:
            continue
        argument = 3 * level if name == "Rotate" else level / 100
        record = native_augment.RECORDERS[function]
        for image in make_images([(40, 40), (21, 30)]):
            recorder = native_augment.OpRecorder(image.shape[1], image.shape[0])
            record(recorder, argument, resample=resample, fillcolor=FILL)
            got = NativeAugment(AutoAugment([])).apply(image.copy(), recorder.ops)
            want = np.asarray(function(Image.fromarray(image), argument, resample=resample, fillcolor=FILL))
            assert np.array_equal(want, got), f"{name} {argument} {image.shape}"


@pytest.mark.parametrize("filter", [1, 2])
@pytest.mark.parametrize(
    "fraction", [0.0, 1e-17, -1e-17, 1e-12, 0.5, 0.25, 1 / 3, 1 - 1e-16, 1.0 - 1e-12, 2.0, 31.999999]
)
def test_shifts_near_integer_pixels(fraction: float, filter: int):
    """Rounding alone decides which pixels are neighbours."""
    resample = {1: Image.Resampling.BILINEAR, 2: Image.Resampling.BICUBIC}[filter]
    for image in make_images([(32, 32), (19, 27)]):
        for sign in (1, -1):
            d = sign * fraction
            for matrix in ((1, 0, d, 0, 1, 0), (1, 0, 0, 0, 1, d), (1, d, 0, 0, 1, 0), (1, 0, 0, d, 1, 0),
                           (1, d, 0, d, 1, 0), (1, 0, d, 0, 1, d)):  # fmt: skip
                size = image.shape[1], image.shape[0]
                want = Image.fromarray(image).transform(size, Image.AFFINE, matrix, resample, fillcolor=FILL)
                got = NativeAugment(AutoAugment([])).apply(
                    image.copy(), [OpRecord(Operation.AFFINE, filter, FILL, matrix)]
                )
                assert np.array_equal(np.asarray(want), got), (matrix, image.shape)


def reference_of(policy: str, size: int, interpolation: str = "bicubic"):
    changes = {"color_jitter": 0.0, "auto_augment": policy, "re_prob": 0.0, "interpolation": interpolation}
    transform = train_transform(size, **RECIPE | changes)
    return transform.transforms[-3]


@pytest.mark.parametrize("interpolation", ["bicubic", "random"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy: str, interpolation: str):
    """Whole policies, as `train_transform` makes them from the configuration."""
    reference = reference_of(policy, 48, interpolation)
    native = NativeAugment(reference)
    assert native.recordable
    images = make_images([(48, 48), (37, 41)])
    for seed in range(60):
        want, got = both(reference, native, images[seed % len(images)], seed)
        assert np.array_equal(want, got), seed


def test_generators_have_the_same_state_after_thousands_of_samples():
    """Without seeding in between: one random number more or less would change all that follow."""
    reference = reference_of("rand-m9-mstd0.5-inc1", 16, "random")
    native = NativeAugment(reference)
    image, pixels = Image.new("RGB", (16, 16)), np.zeros((16, 16, 3), np.uint8)
    states = []
    for run in (lambda: reference(image), lambda: native.sample(16, 16)):
        seed_cpu(5)
        for _ in range(3000):
            run()
        states.append((random.getstate(), np.random.get_state()[1].tolist()))
    assert states[0] == states[1]
    assert native(pixels).shape == (16, 16, 3)


@pytest.mark.parametrize("jitter", [(0.4, 0.4, 0.4), (0.9, 0.0, 0.2), (0.0, 0.8, 0.0)])
def test_colour_jitter(jitter: tuple[float, ...]):
    reference = transforms.ColorJitter(*jitter)
    native = NativeAugment(reference)
    assert native.recordable
    for seed, image in enumerate(make_images([(33, 40), (16, 16), (5, 4)])):
        want, got = both(reference, native, image, seed)
        assert np.array_equal(want, got), seed


def test_unknown_operations_run_in_the_reference():
    """AugMix, hue and custom operations run the reference's own code, with its random numbers."""

    def own(image: Image.Image, **_) -> Image.Image:
        return image.point(lambda value: value * random.random())

    op = op_of("Invert", 5)
    op.aug_fn = own
    references = [
        reference_of("augmix-m5-w4-d2", 32),
        transforms.ColorJitter(hue=0.2),
        RandAugment([op, op_of("Rotate", 5)], 3),
        AutoAugment([[op_of("Rotate", 5), op]]),
    ]
    for reference in references:
        native = NativeAugment(reference)
        assert not native.recordable
        for seed, image in enumerate(make_images([(32, 32)])):
            want, got = both(reference, native, image, seed)
            assert np.array_equal(want, got)


def test_every_operation_of_timm_is_known():
    """An operation that a later timm adds would only be slower; this test reports it."""
    assert set(timm_ops.NAME_TO_OP.values()) <= set(native_augment.RECORDERS)


def test_sampling_before_applying_gives_the_same():
    native = NativeAugment(reference_of("rand-m9-n4-p1.0-mstd0.5-inc1", 24))
    for seed, image in enumerate(make_images([(24, 24)])):
        seed_cpu(seed)
        at_once = native(image.copy())
        seed_cpu(seed)
        ops = native.sample(24, 24)
        seed_cpu(99)
        assert np.array_equal(native.apply(image.copy(), ops), at_once)


@pytest.mark.parametrize("size", [(224, 224), (5, 7), (1, 1)])
def test_normalising(size: tuple[int, int]):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    reference = transforms.Compose([transforms.ToTensor(), transforms.Normalize(torch.tensor(mean), torch.tensor(std))])
    for image in make_images([size])[:2]:
        want = reference(Image.fromarray(image))
        assert torch.equal(Normalise(mean, std)(image), want)
        batch = torch.full((3, 3, *size), 7.0)
        Normalise(mean, std)(image, batch[1])
        assert torch.equal(batch[1], want) and (batch[0] == 7).all() and (batch[2] == 7).all()


@pytest.mark.parametrize("filter", FILTERS.values())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300, 3e9])
def test_positions_that_are_no_number_or_too_large_are_outside(filter: dict, bad: float):
    """Such a matrix once read out of bounds, or converted a double that does not fit into an integer."""
    image = make_images([(19, 23)])[0]
    if "interpolation" not in filter:
        return
    for element in range(6):
        matrix = [1.0, 0.25, 2.0, 0.125, 1.0, 3.0]
        matrix[element] = bad
        op = OpRecord(Operation.AFFINE, native_augment.FILTERS[filter["interpolation"]], FILL, tuple(matrix))
        assert (NativeAugment(AutoAugment([])).apply(image.copy(), [op]) == FILL).all()


@pytest.mark.parametrize("bits", range(-9, 10))
def test_posterize_with_any_number_of_bits(bits: int):
    """RandAugment with MMAX above 10 asks for less than 0."""
    image = make_images([(9, 8)])[0]
    recorder = native_augment.OpRecorder(8, 9)
    native_augment.RECORDERS[timm_ops.posterize](recorder, bits)
    got = NativeAugment(AutoAugment([])).apply(image.copy(), recorder.ops)
    assert np.array_equal(got, np.asarray(timm_ops.posterize(Image.fromarray(image), bits)))


@pytest.mark.parametrize("threshold", [-512, -100, -1, 0, 1, 128, 255, 256, 600])
def test_solarize_with_any_threshold(threshold: int):
    image = make_images([(9, 8)])[0]
    got = NativeAugment(AutoAugment([])).apply(image.copy(), [OpRecord(Operation.SOLARIZE, a=(threshold, *[0.0] * 5))])
    assert np.array_equal(got, np.asarray(timm_ops.solarize(Image.fromarray(image), threshold)))


@pytest.mark.parametrize(
    "op",
    [
        OpRecord(Operation.POSTERIZE, a=(float("nan"), *[0.0] * 5)),
        OpRecord(Operation.COLOR, a=(1e30, *[0.0] * 5)),
        OpRecord(Operation.AFFINE, fill=(0, 256, 0)),
        OpRecord(Operation.AFFINE, filter=3),
        OpRecord(99),
    ],
)
def test_numbers_that_no_operation_has_are_refused(op: OpRecord):
    with pytest.raises(ValueError, match="numbers that an operation cannot have"):
        NativeAugment(AutoAugment([])).apply(np.zeros((4, 4, 3), np.uint8), [op])


@pytest.mark.parametrize(
    "pixels", [np.zeros((0, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros(3, np.uint8)]
)
def test_arrays_that_are_no_images_are_refused(pixels: np.ndarray):
    native, normalise = NativeAugment(AutoAugment([])), Normalise([0.5] * 3, [0.5] * 3)
    for call in (lambda: native.apply(pixels, [OpRecord(Operation.INVERT)]), lambda: normalise(pixels)):
        with pytest.raises(ValueError, match="needs a contiguous array of uint8"):
            call()


def test_a_result_that_does_not_fit_is_refused():
    normalise, pixels = Normalise([0.5] * 3, [0.5] * 3), np.zeros((4, 5, 3), np.uint8)
    for out in (torch.empty(3, 5, 4), torch.empty(3, 4, 5, dtype=torch.float64), torch.empty(3, 5, 4).transpose(1, 2)):
        with pytest.raises(ValueError, match="needs a contiguous array of float32"):
            normalise(pixels, out)


def test_a_read_only_image_stays_as_it_is():
    pixels = np.frombuffer(bytes(48), np.uint8).reshape(4, 4, 3)
    inverted = NativeAugment(AutoAugment([])).apply(pixels, [OpRecord(Operation.INVERT)])
    assert inverted.min() == 255 and not pixels.any()
