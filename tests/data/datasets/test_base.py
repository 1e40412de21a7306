"""Which data set the configuration opens, and lists of images that point elsewhere."""

import json
import os

import pytest
from timm.data import ImageNetInfo

from data.build import build_datasets
from data.codecs.pillow_decode import BadImage
from data.datasets.base import dataset_digest, open_folder
from tests._images import EVALUATE, data_config, draw, encode, process, write_folder, write_splits, write_zip
from utils.config.rules import IMAGENET_22K_CLASSES
from utils.errors import UserError

CLASSES = {"ant": 2, "bee": 1}


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def build(root, *opts):
    return build_datasets(data_config(root, *opts), process())


def test_folder(tmp_path):
    data = build(write_splits(tmp_path, CLASSES, CLASSES))
    assert (len(data.train), len(data.val), data.num_classes, data.class_names) == (3, 3, 2, ["ant", "bee"])
    assert build(tmp_path, "MODEL.NUM_CLASSES", 2).num_classes == 2


def test_evaluation_needs_val_only(tmp_path):
    write_folder(tmp_path / "val", CLASSES)
    data = build(tmp_path, *EVALUATE)
    assert data.train is None and data.class_names == ["ant", "bee"]
    with pytest.raises(UserError, match="train is missing"):
        build(tmp_path)


def test_zip(tmp_path):
    write_zip(tmp_path, "train", ["ant/1.jpg", "bee/1.jpg"], [0, 1])
    write_zip(tmp_path, "val", ["v1.jpg", "v2.jpg"], [0, 1])
    for mode in ("no", "part", "full"):
        data = build(tmp_path, "DATA.ZIP_MODE", True, "DATA.CACHE_MODE", mode)
        assert data.class_names == ["ant", "bee"] and data.num_classes == 2


@pytest.mark.parametrize("name", ["imagenet", "imagenet22K", "demo", "torch/mnist"])
def test_no_data_path(name):
    with pytest.raises(UserError, match="DATA.DATA_PATH is empty: give --data-path"):
        build("", "DATA.DATASET", name)


def test_missing_data_path(tmp_path):
    with pytest.raises(UserError, match=f"no folder {tmp_path}/gone. Expected {tmp_path}/gone/train/<class>"):
        build(tmp_path / "gone")


def test_imagenet_22k(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jpg").write_bytes(b"x")
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps([[f"{split}.jpg", 7]]))
    data = build(tmp_path, "DATA.DATASET", "imagenet22K")
    assert data.num_classes == 21841 and data.class_names is None
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="map_train.txt is missing"):
        build(empty, "DATA.DATASET", "imagenet22K")


def test_22k_class_count_is_the_published_one():
    assert IMAGENET_22K_CLASSES == ImageNetInfo("imagenet-22k").num_classes()


@pytest.mark.parametrize("target", ["/dev/zero", "pipe"])
def test_listed_pipe_or_device_is_a_bad_image(tmp_path, target):
    """Opening a pipe without a writer would block, and reading a device would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jpg").symlink_to(target)
    for split in ("train", "val"):
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text("a.jpg\t7\n")
    with pytest.raises(BadImage, match="a.jpg: is not a file"):
        build(tmp_path, "DATA.DATASET", "imagenet22K").train.read(0)


@pytest.mark.parametrize("line", ["../secret.jpg\t0", '[["a/../../secret.jpg", 0]]'])
def test_lists_do_not_point_outside_the_data(tmp_path, line):
    (tmp_path / "ILSVRC2011fall_whole_map_train.txt").write_text(line)
    with pytest.raises(UserError, match="map_train.txt.*points outside the data"):
        build(tmp_path, "DATA.DATASET", "imagenet22K")


def test_digest_depends_on_paths_and_labels_alone(tmp_path):
    def digest(name, counts):
        write_folder(tmp_path / name / "train", counts)
        return dataset_digest(open_folder(tmp_path / name, "train"))

    first = digest("a", {"ant": 2, "bee": 1})
    assert digest("b", {"ant": 2, "bee": 1}) == first
    assert len({first, digest("c", {"ant": 1, "bee": 2}), digest("d", {"ant": 2, "cow": 1})}) == 3
    (tmp_path / "a" / "train" / "ant" / "000.jpg").write_bytes(encode(draw(99)))  # another image of the same name
    assert dataset_digest(open_folder(tmp_path / "a", "train")) == first
