"""Native transforms take the reference's random numbers and give its pixels, bit-equal, from the file to the batch."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from config import differences
from data.build import build_datasets
from data.codecs.pillow_decode import BadImage
from data.native.library import library
from data.transforms.eval_presets import InputConfig, eval_preset
from data.transforms.native_transforms import (
    NativeEvalTransform,
    NativeTrainTransform,
    PillowTransform,
    crop_box,
    native_eval,
    native_train,
    prepare_eval,
    prepare_train,
)
from data.transforms.reference import eval_transform, train_transform
from tasks.build import train_batches, val_batches
from tests._images import EVALUATE, data_config, draw, encode, process, write_splits
from tests.data.transforms.test_reference import RECIPE
from utils.compile_native import CannotBuild
from utils.seed import derive, seed_cpu

try:
    library()
except CannotBuild as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)


def sources(size: tuple[int, int]) -> dict[str, object]:
    """One image in all forms in which data sets provide images."""
    values = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.blend(draw(1, size), Image.fromarray(values), 0.3)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "JPEG": encode(image),
        "4:4:4": encode(image, subsampling=0),
        "progressive": encode(image, progressive=True),
        "grey": encode(image.convert("L")),
        "CMYK": encode(image.convert("CMYK")),
        "EXIF": encode(image, exif=exif),
        "PNG": encode(image, "PNG"),
        "opened": image,
        "palette": image.quantize(16),
        "array": np.asarray(image),
    }


def prepare_from_seed(prepare, source: object, seed: int) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """The result of `prepare` from the seed, and the next number of each of the three generators."""
    seed_cpu(derive("test", seed))
    image = prepare(source, "x")
    return image, (random.random(), np.random.rand(), torch.rand(1).item())


def assert_same(native, reference, source: object, seeds: range) -> None:
    for seed in seeds:
        (image, left), (expected, expected_left) = (
            prepare_from_seed(each, source, seed) for each in (native, reference)
        )
        assert image.dtype == torch.float32 and torch.equal(image, expected)
        assert left == expected_left


def train_pair(size: int, **changes) -> tuple[NativeTrainTransform, PillowTransform]:
    transform = train_transform(size, **RECIPE | changes)
    native = prepare_train("native", transform)
    assert type(native) is NativeTrainTransform
    return native, prepare_train("reference", transform)


@pytest.mark.parametrize("kind", list(sources((8, 8))))
def test_training_from_every_kind_of_source(kind):
    native, reference = train_pair(64)
    for size in ((150, 117), (40, 300), (1, 1), (9, 5)):
        assert_same(native, reference, sources(size)[kind], range(12))


@pytest.mark.parametrize(
    "changes",
    [
        {"hflip": 0.0},
        {"hflip": 1.0},
        {"interpolation": "random"},
        {"interpolation": "bilinear"},
        {"auto_augment": "none"},
        {"auto_augment": "none", "color_jitter": 0.0, "re_prob": 0.0},
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "3a"},
        {"auto_augment": "augmix-m5"},
        {"re_prob": 1.0, "re_mode": "const"},
        {"re_prob": 1.0, "re_mode": "rand", "re_count": 3},
        {"re_prob": 1.0},
        {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [32, 96])
def test_training_recipes(size, changes):
    native, reference = train_pair(size, **changes)
    for kind in ("JPEG", "opened"):
        assert_same(native, reference, sources((120, 90))[kind], range(8))


def test_small_images_are_not_enlarged():
    native, reference = train_pair(32)
    for size in ((32, 32), (28, 28), (20, 64)):
        assert_same(native, reference, sources(size)["opened"], range(10))


@pytest.mark.slow
def test_the_papers_recipe_at_length():
    native, reference = train_pair(224)
    for kind, source in sources((430, 350)).items():
        assert_same(native, reference, source, range(100 if kind == "JPEG" else 20))


def test_crop_boxes_are_timms_for_the_same_random_numbers():
    shapes = [(500, 375), (224, 224), (1, 1), (3, 900), (900, 3), (17, 40)]
    for seed in range(400):
        width, height = shapes[seed % len(shapes)]
        random.seed(seed)
        top, left, h, w = RandomResizedCropAndInterpolation.get_params(
            torch.empty(1).expand(3, height, width), (0.08, 1.0), (3 / 4, 4 / 3)
        )
        expected = random.random()
        random.seed(seed)
        assert crop_box(width, height, (0.08, 1.0), (3 / 4, 4 / 3)) == (left, top, w, h)
        assert random.random() == expected


@pytest.mark.parametrize(
    ("origin", "size", "crop"),
    [
        ("original", 224, True),
        ("original", 96, False),
        ("original", 32, True),
        ("timm", 224, True),
        ("timm", 384, True),
        ("torchvision", 224, True),
    ],
)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation(origin, size, crop, interpolation):
    inputs = InputConfig(interpolation=interpolation)
    transform = eval_preset(
        origin, size, crop=crop, interpolation=interpolation, inputs=inputs, torchvision_name="swin_t"
    ).transform
    native, reference = prepare_eval("native", transform), prepare_eval("reference", transform)
    assert type(native) is NativeEvalTransform
    for shape in ((250, 187), (187, 251), (60, 61), (40, 333)):
        for source in sources(shape).values():
            assert torch.equal(native(source, "x"), reference(source, "x")), shape


def test_transforms_without_a_bit_equal_one_run_in_the_reference():
    hugging_face = eval_preset("hf", 224).transform
    border = eval_preset("timm", 224, inputs=InputConfig(crop_mode="border")).transform
    for transform in (hugging_face, border):
        assert native_eval(transform) is None and type(prepare_eval("native", transform)) is PillowTransform
    assert native_train(lambda image: image) is None
    assert native_train(eval_transform(224, True, "bicubic").transforms[-1]) is None


def test_unusable_images_are_refused_alike():
    native, reference = train_pair(64)
    good = sources((100, 80))
    for source in (b"", b"\xff\xd8\xff", good["JPEG"][:-40], good["progressive"][:500], good["PNG"][:200], b"words"):
        errors = []
        for prepare in (native, reference):
            with pytest.raises(BadImage) as caught:
                prepare(source, "x")
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = write_splits(tmp_path_factory.mktemp("images"), {"ant": 9, "bee": 5}, {"ant": 4, "bee": 3})
    (root / "train" / "ant" / "003.jpg").write_bytes(sources((90, 70))["CMYK"])
    (root / "train" / "ant" / "004.jpg").write_bytes(sources((90, 70))["PNG"])
    return root


def train_images(root, backend, start, *opts) -> list[torch.Tensor]:
    config = data_config(root, "DATA.BACKEND", backend, *opts)
    batches = train_batches(config, build_datasets(config, process()), process(), start, 48)
    return [batch["image"].clone() for batch in batches]


def test_batches_are_the_references_for_any_workers_and_start(images):
    expected = train_images(images, "reference", 0)
    for backend, start, workers in (("native", 0, 0), ("native", 0, 2), ("auto", 24, 1), ("reference", 24, 2)):
        found = train_images(images, backend, start, "DATA.NUM_WORKERS", workers)
        assert len(found) == len(expected) - start // 4
        assert all(torch.equal(a, b) for a, b in zip(found, expected[start // 4 :], strict=True))
    batches = []
    for backend in ("reference", "native"):
        config = data_config(images, "DATA.BACKEND", backend, *EVALUATE)
        found = val_batches(config, build_datasets(config, process()), process())
        batches.append(torch.cat([batch["image"] for batch in found]))
    assert torch.equal(*batches)


@pytest.mark.parametrize("size", [32, 48])
def test_gpu_pixels_are_the_references_except_affine_ones(images, size):
    """Equal for any number of workers and any start. test_gpu_augment.py tests the single operations."""
    opts = ("DATA.IMG_SIZE", size, "AUG.REPROB", 0.0, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    expected = torch.cat(train_images(images, "reference", 0, *opts))
    found = train_images(images, "gpu", 0, *opts)
    for start, workers in ((0, 2), (24, 1)):
        again = train_images(images, "gpu", start, *opts, "DATA.NUM_WORKERS", workers)
        assert all(torch.equal(a, b) for a, b in zip(again, found[start // 4 :], strict=True))
    assert (torch.cat(found) != expected).float().mean() < 1e-3
    erased = torch.cat(train_images(images, "gpu", 0, *opts[:2], "AUG.REPROB", 1.0, *opts[4:])) != torch.cat(found)
    assert 0.02 < erased.float().mean() < 1 / 3


def test_a_run_may_change_between_backends_that_give_the_same(images):
    def changed_keys(old: str, new: str) -> list[str]:
        a, b = (data_config(images, "DATA.BACKEND", backend) for backend in (old, new))
        return [key for key, *_ in differences(a, b)]

    same = ("auto", "reference", "native")
    assert all(changed_keys(a, b) == [] for a in same for b in same)
    assert changed_keys("gpu", "gpu") == []
    assert all(changed_keys(a, "gpu") == changed_keys("gpu", a) == ["DATA.BACKEND"] for a in same)
