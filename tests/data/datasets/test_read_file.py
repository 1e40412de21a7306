"""One encoded image may have at most 1 GiB, wherever it lies, and is refused before it is read."""

import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from data.build import build_datasets
from data.codecs.pillow_decode import BadImage
from data.datasets import read_file as limits
from data.datasets.base import open_zip
from data.datasets.packed import open_packed
from data.datasets.read_file import MAX_IMAGE_BYTES, read_at_most, read_file
from data.datasets.timm_datasets import open_timm
from tests._images import data_config, process, write_splits, write_zip
from tools import pack_dataset


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_files(tmp_path):
    (tmp_path / "good.jpg").write_bytes(b"bytes")
    assert read_file(str(tmp_path / "good.jpg")) == b"bytes"
    os.truncate(tmp_path / "good.jpg", MAX_IMAGE_BYTES + 1)  # sparse
    with pytest.raises(BadImage, match="good.jpg: is larger than 1 GiB"):
        read_file(str(tmp_path / "good.jpg"))
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, reason in (("pipe.jpg", "is not a file"), ("gone.jpg", "cannot be read"), ("a\0.jpg", "cannot be read")):
        with pytest.raises(BadImage, match=reason):
            read_file(str(tmp_path / path))


@pytest.mark.parametrize("mode", ["no", "full"])
def test_a_zip_member_that_would_become_too_large_is_not_unpacked(tmp_path, mode, monkeypatch):
    write_zip(tmp_path, "train", ["ant/0.jpg"], [0])
    with zipfile.ZipFile(tmp_path / "train.zip", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bee/1.jpg", bytes(5_000_000))
    (tmp_path / "train_map.txt").write_text("ant/0.jpg\t0\nbee/1.jpg\t1\n")
    images = open_zip(tmp_path, "train", mode, 0, 1)
    assert len(images.read(1)[0]) == 5_000_000
    monkeypatch.setattr(limits, "MAX_IMAGE_BYTES", 4_000_000)
    tracemalloc.start()
    with pytest.raises(BadImage, match="train.zip:bee/1.jpg: is larger than"):
        images.read(1)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    images.read(0)


def test_packed_and_timm_images_have_the_same_limit(tmp_path, monkeypatch):
    write_splits(tmp_path, {"ant": 1, "bee": 1}, {"ant": 1, "bee": 1})
    assert pack_dataset.main([str(tmp_path / "packed"), "--data-path", str(tmp_path), "--workers", "1"]) == 0
    sources = [open_packed(tmp_path / "packed", "val"), open_timm("torch/image_folder", tmp_path, is_training=False)]
    sources.append(build_datasets(data_config(tmp_path), process()).val)
    assert [np.shape(images.read(1)[0]) for images in sources] == [()] * 3
    monkeypatch.setattr(limits, "MAX_IMAGE_BYTES", 100)
    for images in sources:
        with pytest.raises(BadImage, match="bee/000.jpg: is larger than"):
            images.read(1)
    with (
        open(tmp_path / "val" / "bee" / "000.jpg", "rb") as file,
        pytest.raises(BadImage, match="hfds/x, sample 3: is"),
    ):
        read_at_most(file, "hfds/x, sample 3")
