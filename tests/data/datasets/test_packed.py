"""Packed data: a region decodes to the pixels of the whole image, packs are read as written, damage is detected."""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.build import TrainBatches, build_datasets, val_batches
from data.codecs.pillow_decode import BadImage
from data.codecs.tiled_jpeg import TiledJpeg, encode
from data.datasets.packed import INDEX, Pack, open_packed
from tests._images import age, data_config, draw, process
from tests._images import encode as encode_plain
from tools import pack_dataset
from utils.errors import UserError

NO_MIX = ("AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)


def grainy(seed: int, size: tuple[int, int]) -> Image.Image:
    noise = np.random.RandomState(seed).normal(0, 12, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(draw(seed, size)) + noise, 0, 255).astype(np.uint8))


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


# Tiles ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_region_has_the_pixels_of_the_whole_image(given_data):
    width, height = (given_data.draw(st.integers(1, 180)) for _ in range(2))
    jpeg = TiledJpeg(encode(grainy(width + 1000 * height, (width, height)), given_data.draw(st.sampled_from([50, 90]))))
    whole = pixels(jpeg)
    assert jpeg.size == (width, height) == whole.shape[1::-1]
    for _ in range(5):
        w, h = given_data.draw(st.integers(1, width)), given_data.draw(st.integers(1, height))
        left, top = given_data.draw(st.integers(0, width - w)), given_data.draw(st.integers(0, height - h))
        part, x, y = jpeg.part(left, top, w, h)
        assert np.array_equal(pixels(part)[y : y + h, x : x + w], whole[top : top + h, left : left + w])


def test_a_region_is_no_larger_than_its_tiles():
    jpeg = TiledJpeg(encode(grainy(0, (500, 375)), 90))
    part, x, y = jpeg.part(200, 100, 40, 30)
    assert pixels(part).shape == (48, 64, 3) and (x, y) == (200 - 192, 100 - 96)  # tiles of 32 × 16 pixels
    assert len(part) < len(jpeg) / 20
    assert len(jpeg.part(0, 0, 500, 375)[0]) < len(jpeg)  # all of it, without the table


@pytest.mark.parametrize("width", [16, 17, 31 * 16, 25 * 16, 37 * 16, 2048])
def test_any_number_of_blocks_can_be_divided(width):
    """31 and 37 are prime: a tile is one block; 25 blocks are tiles of five."""
    image = grainy(width, (width, 40))
    jpeg = TiledJpeg(encode(image, 90))
    part, x, y = jpeg.part(width // 2, 9, width // 2, 20)
    assert np.array_equal(pixels(part)[y : y + 20, x : x + width // 2], pixels(jpeg)[9:29, width // 2 : width // 2 * 2])


def test_only_own_jpegs_are_recognised():
    image = grainy(0, (100, 80))
    assert TiledJpeg.recognises(encode(image, 90))
    assert not TiledJpeg.recognises(encode_plain(image)) and not TiledJpeg.recognises(b"")
    ordinary = encode_plain(image, quality=90, subsampling="4:2:0", optimize=True)
    assert np.array_equal(pixels(encode(image, 90)), pixels(ordinary))  # the same JPEG otherwise


def test_an_image_with_too_many_tiles_is_refused():
    with pytest.raises(ValueError, match="too many tiles"):
        encode(Image.new("RGB", (31 * 16, 16 * 1100)), 90)


# Packs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    for split, count in (("train", 6), ("val", 3)):
        for c, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = grainy(100 * c + i, (150 + 10 * i, 130))
                (root / split / name / f"{i}.jpg").write_bytes(encode_plain(image, quality=92))
    age(root)
    return root


@pytest.fixture(scope="module")
def packed(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "at 160"
    pack_dataset.pack(pack_dataset.PackOptions(folder, str(original), size=160))
    return folder


@pytest.fixture
def copy(packed, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for path in (packed / split).iterdir():
            (tmp_path / split / path.name).write_bytes(path.read_bytes())
    return tmp_path


def config(root, *opts):
    return data_config(root, "DATA.DATASET", "packed", *opts)


def test_a_pack_contains_the_packed_images(original, packed):
    data = build_datasets(config(packed), process())
    assert (len(data.train), len(data.val), data.class_names) == (12, 6, ["ant", "bee"])
    for i in range(12):
        content, label = data.train.read(i)
        assert isinstance(content, TiledJpeg) and label == i // 6
        assert max(content.size) == min(160, 150 + 10 * (i % 6))
    names = sorted(str(path.relative_to(original)) for path in (original / "val").rglob("*.jpg"))
    for i, name in enumerate(names):  # validation images are unchanged
        assert data.val.read(i) == ((original / name).read_bytes(), i // 3)
        assert data.val.path(i) == f"{packed}/val/00000.pack:{name}"


def test_training_images_lose_little(original, packed):
    images = open_packed(packed, "train")
    source = pixels((original / "train/ant/0.jpg").read_bytes()).astype(float)
    error = np.mean((source - pixels(images.read(0)[0])) ** 2)
    assert 10 * np.log10(255**2 / error) > 35  # dB


def test_evaluation_batches_equal_those_of_the_source(original, packed):
    def batches(config):
        return val_batches(config, build_datasets(config, process()), process())

    for a, b in zip(batches(data_config(original)), batches(config(packed)), strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])


@pytest.mark.parametrize("workers", [0, 2])
def test_backends_and_workers_give_the_same_pixels(packed, workers):
    def batches(*opts):
        full = config(packed, *NO_MIX, *opts)
        return list(TrainBatches(full, build_datasets(full, process()), process(), 0, 24))

    expected = batches("DATA.BACKEND", "reference")
    for a, b in zip(expected, batches("DATA.BACKEND", "auto", "DATA.NUM_WORKERS", workers), strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["target"], b["target"])


def test_images_can_be_sent_to_spawned_workers(packed):
    images = open_packed(packed, "train")
    copy = pickle.loads(pickle.dumps(images))
    assert copy.read(3) == images.read(3) and isinstance(copy.read(3)[0], TiledJpeg)


# Damage --------------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_a_bad_image(copy):
    shard = copy / "train" / "00000.pack"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    images = open_packed(copy, "train")
    bad = []
    for i in range(len(images)):
        try:
            images.read(i)
        except BadImage as error:
            bad.append(str(error))
    assert len(bad) == 1 and "CRC" in bad[0] and "00000.pack:train/" in bad[0]
    with pytest.raises(UserError, match="1 of 12 images of .*train are damaged"):
        pack_dataset.verify(copy, 1)


@pytest.mark.parametrize("change", ["shorter", "longer", "missing"])
def test_a_shard_of_another_size_is_refused(copy, change):
    shard = copy / "val" / "00000.pack"
    content = shard.read_bytes()
    shard.unlink()
    if change != "missing":
        shard.write_bytes(content[:-1] if change == "shorter" else content + b"x")
    with pytest.raises(UserError, match="00000.pack is missing" if change == "missing" else "should have"):
        open_packed(copy, "val")


def test_a_damaged_or_missing_index_is_named(copy):
    index = copy / "train" / INDEX
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="index.npz is damaged"):
        open_packed(copy, "train")
    index.unlink()
    with pytest.raises(UserError, match="has not finished"):
        open_packed(copy, "train")
    (copy / "train" / "00000.pack").unlink()
    with pytest.raises(UserError, match="tools.pack_dataset makes them"):
        open_packed(copy, "train")
    with pytest.raises(UserError, match="no folder"):
        build_datasets(config(copy / "nowhere"), process())


def test_an_index_of_another_format_is_named(copy, monkeypatch):
    monkeypatch.setattr("data.datasets.packed.FORMAT", 2)
    with pytest.raises(UserError, match="has pack format 1, and this program reads 2"):
        open_packed(copy, "train")


def test_the_index_contains_no_pickle(copy):
    index = copy / "train" / INDEX
    with np.load(index, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
        head = json.loads(arrays["head"].tobytes())
    assert head["class_names"] == ["ant", "bee"] and head["settings"]["size"] == 160
    assert len(Pack.load(index).index) == 12
