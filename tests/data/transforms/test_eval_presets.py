"""TEST.PRESET: images are prepared as by the library that the weights are from, bit-equal, and the log names it."""

import logging
import os

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import create_transform, resolve_data_config
from torch import Tensor

from config import get_config
from data.build import build_datasets
from data.transforms.eval_presets import InputConfig, eval_preset, timm_inputs
from data.transforms.reference import eval_transform, train_transform
from tasks.build import val_batches
from tests._images import EVALUATE, data_config, draw, process, write_splits
from tests.data.transforms.test_reference import RECIPE
from utils.errors import UserError

os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import ViTImageProcessor  # noqa: E402

REGNET = ("MODEL.TYPE", "timm", "MODEL.NAME", "regnety_040")
SHAPES = [(500, 375), (97, 333), (224, 224), (40, 36), (256, 300)]


def noisy(seed: int, size: tuple[int, int]) -> Image.Image:
    """An image with edges everywhere, so that differences in filters and rounding show; another one for each seed."""
    width, height = size
    values = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.blend(draw(seed, size), Image.fromarray(values), 0.4)


def assert_same(ours, theirs) -> None:
    for seed, size in enumerate(SHAPES):
        image = noisy(seed, size)
        assert torch.equal(ours(image), theirs(image)), size


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swin_base_patch4_window12_384", "swinv2_tiny_window8_256"]
)
def test_timm_swins(name):
    cfg = timm.get_pretrained_cfg(name)
    theirs = create_transform(**resolve_data_config({}, pretrained_cfg=cfg.to_dict()), is_training=False)
    assert_same(eval_preset("timm", cfg.input_size[1]).transform, theirs)


def test_every_swin_of_timm_has_the_numbers_assumed_here():
    """The configuration is not looked up for Swins, because all of them have the same one."""
    names = [name for name in timm.list_models(["swin_*", "swinv2_*"]) if "_cr_" not in name and "_s3_" not in name]
    assert len(names) >= 15
    for name in names:
        size = timm.get_pretrained_cfg(name).input_size[-1]
        assert timm_inputs(name, size) == InputConfig(crop_pct=1.0 if size >= 384 else 0.9), name
        described = eval_preset("timm", size, inputs=timm_inputs(name, size)).description
        assert eval_preset("timm", size).description == described


@pytest.mark.parametrize(
    "name", ["regnety_040", "tf_efficientnet_b3.ns_jft_in1k", "resnetv2_101x3_bit", "vit_base_patch16_384"]
)
def test_other_models_of_timm(name):
    """Among them are another crop, another mean, and an evaluation size larger than the training size."""
    cfg = timm.get_pretrained_cfg(name)
    for use_test_size in (False, True):
        settings = resolve_data_config({}, pretrained_cfg=cfg.to_dict(), use_test_size=use_test_size)
        size = settings["input_size"][1]
        ours = eval_preset("timm", size, inputs=timm_inputs(name, size)).transform
        image = noisy(size, (500, 375))
        assert torch.equal(ours(image), create_transform(**settings, is_training=False)(image))


@pytest.mark.parametrize("name", ["swin_t", "swin_s", "swin_b", "swin_v2_t", "swin_v2_s", "swin_v2_b"])
def test_torchvision(name):
    theirs = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    assert_same(eval_preset("torchvision", theirs.crop_size[0], torchvision_name=name).transform, theirs)


def test_torchvision_at_another_size_keeps_the_proportion():
    chosen = eval_preset("torchvision", 112, torchvision_name="swin_t")
    assert chosen.description == "swin_t: resize to 116, centre crop 112, bicubic"  # of 232 and 224
    assert chosen.transform(noisy(0, (300, 200))).shape == (3, 112, 112)


@pytest.mark.parametrize("size", [224, 256, 384])
def test_hugging_face(size):
    """Settings as in the preprocessor_config.json of microsoft/swin-* and microsoft/swinv2-*."""
    processor = ViTImageProcessor(
        size={"height": size, "width": size},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )

    def theirs(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    assert_same(eval_preset("hf", size).transform, theirs)


@pytest.mark.parametrize("crop", [True, False])
def test_original(crop):
    chosen = eval_preset("original", 224, crop=crop)
    assert_same(chosen.transform, eval_transform(224, crop, "bicubic"))
    assert chosen.description == ("resize to 256, centre crop 224, bicubic" if crop else "resize to 224 x 224, bicubic")


def test_the_four_differ():
    image = noisy(7, (300, 260))
    results = [
        eval_preset(origin, 224, torchvision_name="swin_t").transform(image)
        for origin in ("original", "timm", "torchvision", "hf")
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    counts = {"n01440764": 1, "n01443537": 1}
    return write_splits(tmp_path_factory.mktemp("images"), counts, counts)


@pytest.mark.parametrize(
    ("layout", "opts", "message"),
    [
        ("original", (), "original: resize to 54, centre crop 48, bicubic"),
        ("unknown", (), "original: resize to 54, centre crop 48, bicubic"),
        ("timm", (), "timm: resize to 53, center crop 48 (0.9), bicubic"),
        ("torchvision", (), "torchvision: swin_t: resize to 50, centre crop 48, bicubic"),
        ("hf", (), "hf: resize to 48 x 48, bicubic on tensors"),
        ("timm", ("TEST.PRESET", "hf"), "hf: resize to 48 x 48, bicubic on tensors"),
        ("hf", ("TEST.PRESET", "original", "TEST.CROP", False), "original: resize to 48 x 48, bicubic"),
        ("torchvision", ("MODEL.TYPE", "swinv2"), "torchvision: swin_v2_t: resize to 49, centre crop 48, bicubic"),
        ("unknown", REGNET, "timm: resize to 50, center crop 48 (0.95), bicubic"),
    ],
)  # fmt: skip
def test_the_preset_is_logged_and_used(images, caplog, layout, opts, message):
    config = data_config(images, *opts, *EVALUATE)
    data = build_datasets(config, process())
    with caplog.at_level(logging.INFO, logger="data.build"):
        batches = val_batches(config, data, process(), layout)
    assert [r.getMessage() for r in caplog.records if r.name == "data.build"] == [
        "evaluation preset: {} ({})".format(*message.split(": ", 1))
    ]
    origin = message.partition(":")[0]
    inputs = timm_inputs("regnety_040", 48) if opts is REGNET else InputConfig()
    name = "swin_v2_t" if "swinv2" in opts else "swin_t"
    preset = eval_preset(origin, 48, crop=config.TEST.CROP, inputs=inputs, torchvision_name=name)
    (batch,) = batches
    expected = [preset.transform(Image.open(path).convert("RGB")) for path in sorted(images.glob("val/*/*.jpg"))]
    assert torch.equal(batch["image"], torch.stack(expected))


def test_a_crop_without_effect_is_logged(images, caplog):
    data = build_datasets(data_config(images, *EVALUATE), process())
    for origin, times in (("original", 0), ("hf", 1)):
        caplog.clear()
        val_batches(data_config(images, "TEST.CROP", False, "TEST.PRESET", origin, *EVALUATE), data, process())
        assert caplog.text.count("TEST.CROP False has no effect") == times


def test_torchvision_has_no_large_swin(images):
    config = data_config(images, "MODEL.SWIN.EMBED_DIM", 192, "TEST.PRESET", "torchvision", *EVALUATE)
    data = build_datasets(config, process())
    with pytest.raises(UserError, match="TEST.PRESET torchvision: .* set TEST.PRESET to"):
        val_batches(config, data, process())


def test_training_uses_the_models_mean_and_deviation():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    off = RECIPE | {"color_jitter": 0.0, "auto_augment": "none", "re_prob": 0.0}
    normalise = train_transform(224, **off, mean=mean, std=std).transforms[-1]
    assert tuple(normalise.mean.tolist()) == pytest.approx(mean) and tuple(normalise.std.tolist()) == pytest.approx(std)


def test_unknown_preset_and_model_are_refused():
    with pytest.raises(UserError, match="TEST.PRESET is 'imagenet' but must be one of auto, original, timm"):
        get_config(None, ["TEST.PRESET", "imagenet"])
    with pytest.raises(UserError, match="'swin_giant' is no model of timm"):
        timm_inputs("swin_giant", 224)
