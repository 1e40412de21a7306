"""The fast transforms take the reference's draws and give its pixels, to the bit, from the file to the batch."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

from config import differences
from data.build import TrainBatches, build_datasets, val_batches
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
from tests._images import EVALUATE, data_config, draw, encode, process, write_splits
from utils.compile_native import CannotBuild
from utils.seed import derive, seed_cpu

try:
    library()
except CannotBuild as error:
    pytest.skip(f"no native library here: {error}", allow_module_level=True)

RECIPE = {
    "hflip": 0.5,
    "color_jitter": 0.4,
    "auto_augment": "rand-m9-mstd0.5-inc1",
    "re_prob": 0.25,
    "re_mode": "pixel",
    "re_count": 1,
    "interpolation": "bicubic",
}


def sources(size: tuple[int, int]) -> dict[str, object]:
    """One picture in all the ways in which data sets hand pictures over."""
    values = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    picture = Image.blend(draw(1, size), Image.fromarray(values), 0.3)
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "JPEG": encode(picture),
        "4:4:4": encode(picture, subsampling=0),
        "progressive": encode(picture, progressive=True),
        "grey": encode(picture.convert("L")),
        "CMYK": encode(picture.convert("CMYK")),
        "EXIF": encode(picture, exif=exif),
        "PNG": encode(picture, "PNG"),
        "picture": picture,
        "palette": picture.quantize(16),
        "array": np.asarray(picture),
    }


def drawn_and_left(prepare, source: object, seed: int) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """What `prepare` makes of `source` from the seed, and where it leaves the three generators."""
    seed_cpu(derive("test", seed))
    image = prepare(source, "x")
    return image, (random.random(), np.random.rand(), torch.rand(1).item())


def assert_same(fast, reference, source: object, seeds: range) -> None:
    for seed in seeds:
        (image, left), (expected, expected_left) = (drawn_and_left(each, source, seed) for each in (fast, reference))
        assert image.dtype == torch.float32 and torch.equal(image, expected)
        assert left == expected_left


def train_pair(size: int, **changes) -> tuple[NativeTrainTransform, PillowTransform]:
    transform = train_transform(size, **RECIPE | changes)
    fast = prepare_train("fast", transform)
    assert type(fast) is NativeTrainTransform
    return fast, prepare_train("reference", transform)


@pytest.mark.parametrize("kind", list(sources((8, 8))))
def test_training_from_every_kind_of_source(kind):
    fast, reference = train_pair(64)
    for size in ((150, 117), (40, 300), (1, 1), (9, 5)):
        assert_same(fast, reference, sources(size)[kind], range(12))


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
    fast, reference = train_pair(size, **changes)
    for kind in ("JPEG", "picture"):
        assert_same(fast, reference, sources((120, 90))[kind], range(8))


def test_small_images_are_not_enlarged():
    fast, reference = train_pair(32)
    for size in ((32, 32), (28, 28), (20, 64)):
        assert_same(fast, reference, sources(size)["picture"], range(10))


@pytest.mark.slow
def test_the_papers_recipe_at_length():
    fast, reference = train_pair(224)
    for kind, source in sources((430, 350)).items():
        assert_same(fast, reference, source, range(100 if kind == "JPEG" else 20))


def test_crop_boxes_are_timms_for_the_same_draws():
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
    chosen = eval_preset(
        origin, size, crop, interpolation, InputConfig(interpolation=interpolation), "swin_t"
    ).transform
    fast, reference = prepare_eval("fast", chosen), prepare_eval("reference", chosen)
    assert type(fast) is NativeEvalTransform
    for shape in ((250, 187), (187, 251), (60, 61), (40, 333)):
        for source in sources(shape).values():
            assert torch.equal(fast(source, "x"), reference(source, "x")), shape


def test_what_is_not_equal_to_the_bit_is_left_to_the_reference():
    hugging_face = eval_preset("hf", 224, True, "bicubic", InputConfig(), "").transform
    border = eval_preset("timm", 224, True, "bicubic", InputConfig(crop_mode="border"), "").transform
    for transform in (hugging_face, border):
        assert native_eval(transform) is None and type(prepare_eval("fast", transform)) is PillowTransform
    assert native_train(lambda picture: picture) is None
    assert native_train(eval_transform(224, True, "bicubic").transforms[-1]) is None


def test_unusable_images_are_refused_alike():
    fast, reference = train_pair(64)
    good = sources((100, 80))
    for source in (b"", b"\xff\xd8\xff", good["JPEG"][:-40], good["progressive"][:500], good["PNG"][:200], b"words"):
        errors = []
        for prepare in (fast, reference):
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
    batches = TrainBatches(config, build_datasets(config, process()), process(), start, 48)
    return [batch["image"].clone() for batch in batches]


def test_batches_are_the_references_whatever_the_workers_and_the_start(images):
    expected = train_images(images, "reference", 0)
    for backend, start, workers in (("fast", 0, 0), ("fast", 0, 2), ("auto", 24, 1), ("reference", 24, 2)):
        found = train_images(images, backend, start, "DATA.NUM_WORKERS", workers)
        assert len(found) == len(expected) - start // 4
        assert all(torch.equal(a, b) for a, b in zip(found, expected[start // 4 :], strict=True))
    batches = []
    for backend in ("reference", "fast"):
        config = data_config(images, "DATA.BACKEND", backend, *EVALUATE)
        found = val_batches(config, build_datasets(config, process()), process())
        batches.append(torch.cat([batch["image"] for batch in found]))
    assert torch.equal(*batches)


@pytest.mark.parametrize("size", [32, 48])
def test_on_the_device_pixels_are_the_references_but_for_affine_ones(images, size):
    """The same whatever the workers and the start. (Single operations: tests/data/transforms/test_gpu_augment.py.)"""
    opts = ("DATA.IMG_SIZE", size, "AUG.REPROB", 0.0, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    expected = torch.cat(train_images(images, "reference", 0, *opts))
    found = train_images(images, "device", 0, *opts)
    for start, workers in ((0, 2), (24, 1)):
        again = train_images(images, "device", start, *opts, "DATA.NUM_WORKERS", workers)
        assert all(torch.equal(a, b) for a, b in zip(again, found[start // 4 :], strict=True))
    assert (torch.cat(found) != expected).float().mean() < 1e-3
    erased = torch.cat(train_images(images, "device", 0, *opts[:2], "AUG.REPROB", 1.0, *opts[4:])) != torch.cat(found)
    assert 0.02 < erased.float().mean() < 1 / 3


def test_a_run_may_change_between_backends_that_give_the_same(images):
    def between(old: str, new: str) -> list[str]:
        a, b = (data_config(images, "DATA.BACKEND", backend) for backend in (old, new))
        return [key for key, *_ in differences(a, b)]

    same = ("auto", "reference", "fast")
    assert all(between(a, b) == [] for a in same for b in same)
    assert between("device", "device") == []
    assert all(between(a, "device") == between("device", a) == ["DATA.BACKEND"] for a in same)
