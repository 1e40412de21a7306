"""Images so long and thin that resizing them would take gigabytes are bad images, in every backend and preset."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import resize

from data.build import build_datasets
from data.codecs.pillow_decode import BadImage
from data.transforms.eval_presets import InputConfig, eval_preset
from data.transforms.native_transforms import prepare_eval, prepare_train
from data.transforms.reference import train_transform
from data.transforms.resize_limit import check_resized, scale_short_side
from tasks.build import train_batches, val_batches
from tests._images import EVALUATE, data_config, encode, process, write_splits
from tests.data.transforms.test_reference import RECIPE
from utils.errors import UserError

BACKENDS = ("reference", "auto", "gpu")
PRESETS = {
    "original": eval_preset("original", 224),
    "timm": eval_preset("timm", 224),
    "timm, border": eval_preset("timm", 224, inputs=InputConfig(crop_mode="border")),
    "torchvision": eval_preset("torchvision", 224, torchvision_name="swin_t"),
}


def thin(length: int, kind: str = "PNG") -> list[bytes]:
    """A tall and a wide image."""
    return [encode(Image.new("RGB", size, 9), kind) for size in ((1, length), (length, 1))]


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_evaluation(backend, preset, kind):
    prepare = prepare_eval(backend, PRESETS[preset].transform)
    for source in thin(20_000, kind):
        with pytest.raises(BadImage, match=r"^x: is too long and thin \((1 x 20000|20000 x 1) pixels\): resized,"):
            prepare(source, "x")
    for source in thin(8, kind):
        assert prepare(source, "x").shape == (3, 224, 224)


@pytest.mark.parametrize("preset", [eval_preset("hf", 224), eval_preset("original", 224, crop=False)])
def test_presets_with_a_fixed_size_take_any_shape(preset):
    for backend in BACKENDS[:2]:
        for source in thin(20_000):
            assert prepare_eval(backend, preset.transform)(source, "x").shape == (3, 224, 224)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training(backend):
    """At small sizes images are resized first; otherwise, the random crop is."""
    small = prepare_train(backend, train_transform(32, **RECIPE))
    for source in thin(300_000):
        with pytest.raises(BadImage, match="x: is too long.* resized, it would have 307 million pixels, and 179"):
            small(source, "x")
    large = prepare_train(backend, train_transform(64, **RECIPE))
    for source in thin(20_000):
        assert large(source, "x") is not None


def test_the_limit_is_that_of_decompression_bombs(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    check_resized((1, 20), (10, 200), "x")
    with pytest.raises(BadImage, match="0 million pixels, and 0 are"):
        check_resized((1, 21), (10, 210), "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    check_resized((1, 21), (10, 10**9), "x")


def test_sizes_are_torchvisions():
    noise = np.random.RandomState(0)
    for _ in range(200):
        width, height, side = noise.randint(1, 90, 3).tolist()
        resized = resize(torch.zeros(1, height, width), [side])
        assert scale_short_side(width, height, side) == tuple(resized.shape[:0:-1])


def test_the_run_names_the_file(tmp_path):
    write_splits(tmp_path, {"ant": 2, "bee": 2}, {"ant": 2, "bee": 2})
    (tmp_path / "val" / "bee" / "thin.png").write_bytes(thin(2_000_000)[0])
    config = data_config(tmp_path, *EVALUATE)
    with pytest.raises(UserError, match="val/bee/thin.png: is too long and thin.*DATA.MAX_BAD_IMAGES"):
        list(val_batches(config, build_datasets(config, process()), process()))
    config = data_config(tmp_path)
    assert next(iter(train_batches(config, build_datasets(config, process()), process(), 0, 4)))["image"].shape[0] == 4
