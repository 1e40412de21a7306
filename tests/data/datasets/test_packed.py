"""Packed data: a region decodes to the pixels of the whole image, packs are read as written, damage is detected."""

import io
import json
import pickle
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.build import build_datasets
from data.codecs.crop_decode import OpenedImage
from data.codecs.pillow_decode import BadImage
from data.codecs.tiled_jpeg import TiledJpeg, encode
from data.datasets.packed import INDEX, Pack, open_packed
from tasks.build import train_batches, val_batches
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


def test_a_region_in_the_last_columns():
    """The last tile may be so narrow that alone its chroma would not be interpolated."""
    for width in range(96, 113):
        jpeg = TiledJpeg(encode(grainy(width, (width, 20)), 50))
        part, x, y = jpeg.part(width - 1, 3, 1, 9)
        assert np.array_equal(pixels(part)[y : y + 9, x], pixels(jpeg)[3:12, width - 1])


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
    for height in (1100, 1055):  # more than the table may have; then the frame header begins too late
        with pytest.raises(ValueError, match="too many tiles"):
            encode(Image.new("RGB", (31 * 16, 16 * height)), 90)


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
        return list(train_batches(full, build_datasets(full, process()), process(), 0, 24))

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


# Data by a stranger --------------------------------------------------------------------------------------------------


def change_index(path, **changes) -> None:
    """Writes the index again with other arrays; those of the head are entries of its JSON."""
    with np.load(path) as arrays:
        contents = dict(arrays)
    head = json.loads(contents["head"].tobytes())
    head |= {key: changes.pop(key) for key in list(changes) if key in head}
    contents["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    np.savez(path, **(contents | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"labels": np.array(0)}, "labels is not a list of whole numbers"),
        ({"labels": np.full(12, np.nan)}, "labels is not a list of whole numbers"),
        ({"labels": np.zeros((12, 1), np.int32)}, "labels is not a list of whole numbers"),
        ({"labels": np.full(12, 2, np.int32)}, "label 2, and num_classes is 2"),
        ({"labels": np.full(12, -1, np.int32)}, "labels has numbers outside 0"),
        ({"labels": np.full(12, 2**40)}, "labels has numbers outside 0"),
        ({"shard": np.full(12, -1, np.int32)}, "shard has numbers outside 0"),
        ({"shard": np.array(["0"] * 12)}, "shard is not a list of whole numbers"),
        ({"offset": np.full(12, -1)}, "offset has numbers outside 0"),
        ({"offset": np.full(12, 2**63 - 1)}, "an offset beyond the end of any file"),
        ({"size": np.full(12, 2**31)}, "size has numbers outside 0"),
        ({"size": np.zeros(11, np.int32)}, "its columns differ in length"),
        ({"crc": np.full(12, 2**32)}, "crc has numbers outside 0"),
        ({"ends": np.array(5)}, "ends is not a list of whole numbers"),
        ({"ends": np.arange(12)[::-1].copy()}, "the ends of the strings do not match"),
        ({"blob": np.zeros(3, "S1")}, "blob is not a list of whole numbers"),
        ({"num_classes": 10**12}, "num_classes is 1000000000000, not a number in 1"),
        ({"num_classes": float("inf")}, "num_classes is inf"),
        ({"num_classes": True}, "num_classes is True"),
        ({"class_names": ["ant"]}, "class_names is not a list of 2 names"),
        ({"class_names": [1, 2]}, "class_names is not a list of 2 names"),
        ({"settings": 5}, "is damaged"),
        ({"shard": np.full(12, 2**31 - 1, np.int32)}, "00001.pack is missing"),
        ({"size": np.full(12, 2**31 - 1, np.int32)}, "00000.pack has .* and should have"),
    ],
)
def test_an_index_by_a_stranger_is_refused(copy, changes, reason):
    change_index(copy / "train" / INDEX, **changes)
    with pytest.raises(UserError, match=f"train.*{reason}"):
        open_packed(copy, "train")


def test_an_index_without_images_is_refused(copy):
    empty = {name: np.zeros(0, np.int32) for name in ("labels", "shard", "offset", "size", "crc", "ends", "blob")}
    change_index(copy / "train" / INDEX, **empty)
    with pytest.raises(UserError, match="it lists no images"):
        open_packed(copy, "train")


def test_an_index_is_not_expanded(copy):
    """It is stored as it is. A compressed one of a megabyte could become a gigabyte."""
    with np.load(copy / "train" / INDEX) as arrays:
        contents = dict(arrays)
    np.savez_compressed(copy / "train" / INDEX, **contents)
    with pytest.raises(UserError, match=r"npy is compressed\)"):
        open_packed(copy, "train")


def test_a_shard_that_cannot_be_opened_is_named(copy, monkeypatch):
    monkeypatch.setattr("data.datasets.packed._OpenShards", lambda *_: open("/nowhere/00000.pack"))
    with pytest.raises(UserError, match="/nowhere/00000.pack.*ulimit"):
        open_packed(copy, "train")


def rewrite_header(jpeg: bytes, at: int, new: bytes) -> bytes:
    """The JPEG with other bytes: at 15 width, 17 height, 19 blocks in a tile, 21 frame, 23 tiles, 27 their lengths."""
    return jpeg[:at] + new + jpeg[at + len(new) :]


JPEG = encode(grainy(0, (16, 16)), 90)
UNSOUND = {
    "width 0": rewrite_header(JPEG, 15, b"\0\0"),
    "height 0": rewrite_header(JPEG, 17, b"\0\0"),
    "no blocks in a tile": rewrite_header(JPEG, 19, b"\0\0"),
    "another width": rewrite_header(JPEG, 15, b"\0\x0f"),
    "a width of more tiles": rewrite_header(JPEG, 15, b"\x03\xe7"),
    "frame elsewhere": rewrite_header(JPEG, 21, b"\xff\xff"),
    "tiles elsewhere": rewrite_header(JPEG, 23, b"\xff\xff\xff\xff"),
    "another length of a tile": rewrite_header(JPEG, 27, b"\0\0"),
    "a table of another length": JPEG[:4] + b"\0\x1e" + JPEG[6:],
    "header cut off": JPEG[:20],
    "cut off": JPEG[:-5],
    "grey": JPEG.replace(b"\x08\0\x10\0\x10\x03", b"\x08\0\x10\0\x10\x01"),
    "other sampling": JPEG.replace(b"\x03\x01\x22", b"\x03\x01\x11"),
}


@pytest.mark.parametrize("content", UNSOUND.values(), ids=UNSOUND)
def test_an_unsound_table_of_tiles_is_a_bad_image(copy, content):
    """With a right CRC: the file is as a stranger wrote it."""
    assert content != JPEG and TiledJpeg.recognises(content)
    (copy / "val" / "00000.pack").write_bytes(content)
    columns = {"offset": [0], "size": [len(content)], "crc": [zlib.crc32(content)], "shard": [0], "labels": [0]}
    change_index(
        copy / "val" / INDEX, **{name: np.array(values) for name, values in columns.items()},
        blob=np.frombuffer(b"a.jpg", np.uint8), ends=np.array([5]),
    )  # fmt: skip
    with pytest.raises(BadImage, match="00000.pack:a.jpg: damaged table of tiles: "):
        open_packed(copy, "val").read(0)


def test_tiled_bombs_are_left_to_pillow(monkeypatch):
    """Pillow refuses them, or warns; the header of the tiles must not get around that."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="decompression bomb"):
        OpenedImage(TiledJpeg.checked(encode(grainy(0, (40, 30)), 90)), "x")


def test_the_index_of_an_unfinished_pack_is_checked(copy, original):
    (copy / "train" / INDEX).rename(copy / "train" / "00000.npz")
    with pytest.raises(UserError, match="00000.npz is damaged: it does not say where to continue"):
        pack_dataset.pack(pack_dataset.PackOptions(copy, str(original), size=160))
