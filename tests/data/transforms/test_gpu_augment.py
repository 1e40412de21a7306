"""Augmentation of batches against the reference: exact, except affine values next to integers."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import AutoAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from data.transforms import gpu_ops
from data.transforms.gpu_augment import GpuAugment, GpuAugParams
from data.transforms.native_augment import NativeAugment
from tests.data.transforms.test_native_augment import EVERYTHING, MOVING, make_images, op_of, reference_of
from utils.errors import UserError
from utils.seed import seed_cpu

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLURS = ("GaussianBlur", "GaussianBlurRand")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def erasing(mode: str, count: int = 1, prob: float = 0.5) -> RandomErasing:
    return RandomErasing(prob, mode=mode, max_count=count, device="cpu")


def run(reference, images: list[np.ndarray], erase: RandomErasing | None = None, device: str = "cpu") -> Tensor:
    """The augmented `images`, all of one size; the parameters of image i are sampled from seed i."""
    sample_params = GpuAugParams([NativeAugment(reference)] if reference is not None else [], erase)
    aug_params = []
    for seed, image in enumerate(images):
        seed_cpu(seed)
        aug_params.append(sample_params(image.shape[1], image.shape[0]))
    pixels = torch.from_numpy(np.stack(images)).to(device)
    return GpuAugment(MEAN, STD, erase)(pixels, torch.from_numpy(np.stack(aug_params))).cpu()


def expected(reference, images: list[np.ndarray], erase: RandomErasing | None = None) -> Tensor:
    """The same with Pillow and timm."""
    steps = [transforms.ToTensor(), transforms.Normalize(torch.tensor(MEAN), torch.tensor(STD))]
    transform = transforms.Compose([reference or (lambda image: image), *steps, erase or (lambda tensor: tensor)])
    results = []
    for seed, image in enumerate(images):
        seed_cpu(seed)
        results.append(transform(Image.fromarray(image)))
    return torch.stack(results)


def levels(difference: Tensor) -> Tensor:
    """In 1/255 of the range before normalising."""
    return difference.abs() * torch.tensor(STD).view(3, 1, 1) * 255


def check(got: Tensor, want: Tensor, most: float, fraction: float) -> None:
    off = levels(got - want)
    assert off.max() <= most + 0.01
    assert (off > 0.01).double().mean() <= fraction


def psnr(got: Tensor, want: Tensor) -> float:
    return float(10 * torch.log10(255**2 / levels(got - want).double().square().mean()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [name for name in EVERYTHING if name not in BLURS])
def test_each_operation_at_each_magnitude(name: str, device: str):
    """Shifts by short decimals (no noise on the magnitude, or clipped at 10) give values that are integers but for
    rounding: there a level is lost more often."""
    for magnitude in range(11):
        noise = 0.3 if magnitude % 2 else 0
        reference = AutoAugment([[op_of(name, magnitude, magnitude_std=noise)]])
        images = make_images([(33, 40)])
        got, want = run(reference, images, device=device), expected(reference, images)
        if name in MOVING:
            check(got, want, 1.0, 1e-3 if noise else 0.05)
        elif device == "cpu":
            assert torch.equal(got, want)
        else:  # the normalisation's division may round in another way
            check(got, want, 0.0, 0.0)


@pytest.mark.parametrize(
    "policy", ["rand-m9-mstd0.5-inc1", "rand-m9-n3-p0.9-mstd0.5", "rand-m5-n3-p1.0-mstd0.5", "original-mstd0.5"]
)
def test_policies(policy: str):
    """A later operation may amplify a difference of one level (equalise, contrast); the PSNR stays high."""
    reference = reference_of(policy, 48, "random")
    images = make_images([(48, 48)])[:2] * 24
    got, want = run(reference, images), expected(reference, images)
    check(got, want, 4.0, 1e-3)
    assert psnr(got, want) > 75


@pytest.mark.parametrize("mode", ["const", "pixel", "rand"])
@pytest.mark.parametrize("count", [1, 3])
def test_rectangles_are_those_of_the_reference(mode: str, count: int):
    reference = reference_of("rand-m9-mstd0.5-inc1", 48)
    images = [make_images([(48, 48)])[1]] * 24
    got = run(reference, images, erasing(mode, count))
    want = expected(reference, images, erasing("const", count))
    assert ((levels(got - want) > 1.01).any(1) <= (want == 0).all(1)).all()  # only erased pixels differ
    erased = (want == 0).all(1)
    assert erased.float().mean() > 0.02
    if mode == "const":
        assert (got.transpose(1, 3)[erased.transpose(1, 2)] == 0).all()
    else:
        assert (got.transpose(1, 3)[erased.transpose(1, 2)] != 0).all()


def test_random_numbers_are_those_of_the_reference():
    """Policy and rectangles leave the generators in the same state; the seed of the noise is sampled after both."""
    reference, erase = reference_of("rand-m9-mstd0.5-inc1", 24, "random"), erasing("const", 3)
    sample_params = GpuAugParams([NativeAugment(reference)], erase)
    image, tensor = Image.new("RGB", (24, 24)), torch.zeros(3, 24, 24)
    for seed in range(300):
        seed_cpu(seed)
        aug_params = sample_params(24, 24)
        state = random.getstate(), np.random.get_state()[1].tobytes()
        seed_cpu(seed)
        reference(image)
        erase(tensor)
        for _ in range(int((aug_params[:, 0] == -2).sum())):
            random.getrandbits(48)
        assert (random.getstate(), np.random.get_state()[1].tobytes()) == state


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_does_not_depend_on_its_batch(device: str):
    reference, erase = reference_of("rand-m9-n3-p0.9-mstd0.5-inc1", 32, "random"), erasing("pixel", 2)
    sample_params, augment = GpuAugParams([NativeAugment(reference)], erase), GpuAugment(MEAN, STD, erase)
    images, aug_params = make_images([(32, 32)]) * 4, []
    for seed in range(len(images)):
        seed_cpu(seed)
        aug_params.append(sample_params(32, 32))
    pixels, aug_params = torch.from_numpy(np.stack(images)).to(device), torch.from_numpy(np.stack(aug_params))
    batch = augment(pixels.clone(), aug_params)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(pixels[order.to(device)], aug_params[order]), batch[order.to(device)])
    for i in (0, 7, 23):
        assert torch.equal(augment(pixels[i : i + 1].clone(), aug_params[i : i + 1])[0], batch[i])


def test_the_noise_is_standard_normal():
    """Kolmogorov-Smirnov at p = 0.001 over 200,000 values of one seed and over the first values of 20,000 seeds; the
    correlations of neighbouring pixels, channels and seeds within 4 standard errors of 0."""
    counter = torch.arange(200_000)
    one_seed = gpu_ops.normal(torch.tensor(7), counter).double()
    seeds = gpu_ops.normal(torch.arange(20_000)[:, None], torch.arange(3)).double()
    for values in (one_seed, *seeds.unbind(1)):
        ordered, count = values.sort().values, len(values)
        cumulative = torch.special.ndtr(ordered)
        steps = torch.arange(count + 1).double() / count
        distance = torch.maximum((steps[1:] - cumulative).max(), (cumulative - steps[:-1]).max())
        assert distance * count**0.5 < 1.95
    for first, second in (
        (one_seed[:-1], one_seed[1:]),
        (one_seed[:-3], one_seed[3:]),
        (one_seed[:-672], one_seed[672:]),
        (seeds[:-1, 0], seeds[1:, 0]),
        (seeds[:, 0], seeds[:, 1]),
    ):
        assert abs((first * second).mean()) < 4 / len(first) ** 0.5


def test_erased_share_and_noise_after_the_pipeline():
    """Values written by "pixel" erasing: mean 0 and variance 1 within 4 standard errors; "rand" has one per channel."""
    images = [np.zeros((40, 40, 3), np.uint8)] * 120
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    got = run(None, images, erasing("pixel", prob=1.0))
    values = got[(got - black.view(3, 1, 1)).abs() > 1e-5].double()
    assert len(values) > 40_000
    assert abs(values.mean()) < 4 / len(values) ** 0.5
    assert abs(values.var() - 1) < 4 * (2 / len(values)) ** 0.5
    got = run(None, images, erasing("rand", prob=1.0))
    assert all(len(image[c].unique()) <= 2 for image in got for c in range(3))
    assert len(got.unique()) > 300


@pytest.mark.parametrize("policy", ["3a", "rand-m6-t3a", "augmix-m5-w4-d2"])
def test_unsupported_policies_are_refused(policy: str):
    with pytest.raises(UserError, match="Set DATA.BACKEND native"):
        GpuAugParams([NativeAugment(reference_of(policy, 32))], None)


def test_colour_jitter():
    reference = transforms.ColorJitter(0.4, 0.4, 0.4)
    images = make_images([(33, 40)])
    assert torch.equal(run(reference, images), expected(reference, images))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_quarter_turns(degrees: int):
    op = op_of("Rotate", 10)
    op.level_fn = lambda level, hparams: (float(degrees),)
    reference = AutoAugment([[op]])
    images = make_images([(24, 24)])
    assert torch.equal(run(reference, images), expected(reference, images))


@pytest.mark.gpu
def test_the_host_never_waits_for_the_device():
    reference, erase = reference_of("rand-m9-n3-p0.9-mstd0.5-inc1", 64), erasing("pixel", 2)
    sample_params, augment = GpuAugParams([NativeAugment(reference)], erase), GpuAugment(MEAN, STD, erase)
    seed_cpu(0)
    aug_params = torch.from_numpy(np.stack([sample_params(64, 64) for _ in range(48)]))
    pixels = torch.randint(0, 256, (48, 64, 64, 3), dtype=torch.uint8, device="cuda")
    augment(pixels.clone(), aug_params)  # one-time initialisation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        augment(pixels, aug_params)
    finally:
        torch.cuda.set_sync_debug_mode("default")
