"""The demo data: every digit of the shipped scans once, in a fixed split, written once as an image folder."""

import errno
import hashlib

import numpy as np
import pytest
from PIL import Image

from data.build import build_datasets
from data.datasets import digits
from tests._images import data_config, process
from utils.errors import UserError


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "digits"
    assert digits.main([str(root)]) == 0
    return root


def shipped():
    with np.load(digits.DIGITS, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


def test_scans_and_split_never_change():
    """Pinned: reported accuracies are for these images and this split."""
    images, labels = shipped()
    assert images.shape == (1797, 8, 8) and images.dtype == labels.dtype == np.uint8 and images.max() == 16
    digest = hashlib.sha256(images.tobytes() + labels.tobytes() + digits.val_indices(labels).tobytes()).hexdigest()
    assert digest == "6ca57fe73e88b04cdcc334aabc885391074e6baaf694c4e7f315f05ea3e10fc7"


def test_split_has_no_overlap(demo):
    contents = {
        split: [path.read_bytes() for path in sorted((demo / split).rglob("*.jpg"))] for split in ("train", "val")
    }
    assert len(contents["train"]) + len(contents["val"]) == 1797
    assert abs(len(contents["val"]) / 1797 - 0.2) < 0.005
    assert not set(contents["train"]) & set(contents["val"])
    for digit in range(10):
        train, val = (len(list((demo / split / str(digit)).iterdir())) for split in ("train", "val"))
        assert abs(val / (val + train) - 0.2) < 0.005
    with Image.open(next((demo / "val").rglob("*.jpg"))) as image:
        assert image.size == (32, 32)


def test_written_images_are_the_scans(demo):
    images, labels = shipped()
    for path in sorted(demo.rglob("*.jpg"))[::50]:
        small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
        nearest = np.abs(images - small).sum((1, 2)).argmin()
        assert nearest == int(path.stem) and labels[nearest] == int(path.parent.name)


def test_demo_is_written_once_and_read_as_a_folder(demo, monkeypatch):
    times = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    monkeypatch.setattr(digits, "_write", None)
    data = build_datasets(data_config(demo, "DATA.DATASET", "demo"), process())
    assert data.class_names == [str(digit) for digit in range(10)] and len(data.train) + len(data.val) == 1797
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert not [path for path in demo.parent.iterdir() if path != demo]


def test_mistakes(tmp_path, monkeypatch, caplog):
    (tmp_path / "mine.txt").write_text("")
    assert digits.main([str(tmp_path)]) == 2 and "something other than the demo data" in caplog.text
    assert digits.main([]) == 2

    def fail(images, labels, root):
        root.mkdir()
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(digits, "_write", fail)
    with pytest.raises(UserError, match="disk full"):
        digits.write_demo(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
