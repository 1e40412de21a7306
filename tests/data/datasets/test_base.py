"""The choice of a data set, the checks before the first step, the demo, and what comes through timm."""

import io
import json
import os
import struct
import sys

import numpy as np
import pytest
from PIL import Image
from timm.data import ImageNetInfo

import data.datasets.digits
from data.build import build_datasets
from data.codecs.pillow_decode import BadImage, decode
from data.datasets import base as datasets
from tests._images import EVALUATE, data_config, process, write_folder, write_splits, write_zip
from utils.errors import UserError

CLASSES = {"ant": 2, "bee": 1}


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def build(root, *opts):
    return build_datasets(data_config(root, *opts), process())


def test_folder(tmp_path):
    found = build(write_splits(tmp_path, CLASSES, CLASSES))
    assert (len(found.train), len(found.val), found.num_classes, found.class_names) == (3, 3, 2, ["ant", "bee"])
    assert build(tmp_path, "MODEL.NUM_CLASSES", 2).num_classes == 2


def test_evaluation_needs_val_only(tmp_path):
    write_folder(tmp_path / "val", CLASSES)
    found = build(tmp_path, *EVALUATE)
    assert found.train is None and found.class_names == ["ant", "bee"]
    with pytest.raises(UserError, match="train is missing"):
        build(tmp_path)


def test_zip(tmp_path):
    write_zip(tmp_path, "train", ["ant/1.jpg", "bee/1.jpg"], [0, 1])
    write_zip(tmp_path, "val", ["v1.jpg", "v2.jpg"], [0, 1])
    for mode in ("no", "part", "full"):
        found = build(tmp_path, "DATA.ZIP_MODE", True, "DATA.CACHE_MODE", mode)
        assert found.class_names == ["ant", "bee"] and found.num_classes == 2


def test_wrong_number_of_classes(tmp_path):
    write_splits(tmp_path, CLASSES, CLASSES)
    with pytest.raises(UserError, match="has 2 classes, but MODEL.NUM_CLASSES is 1000.*--opts MODEL.NUM_CLASSES 0"):
        build(tmp_path, "MODEL.NUM_CLASSES", 1000)


def test_train_and_val_with_different_classes(tmp_path):
    write_splits(tmp_path / "a", CLASSES, {"ant": 1, "cow": 1})
    with pytest.raises(UserError, match="Only in train: bee; only in val: cow"):
        build(tmp_path / "a")
    write_zip(tmp_path / "b", "train", ["ant/1.jpg", "bee/1.jpg"], [0, 1])
    write_zip(tmp_path / "b", "val", ["ant/1.jpg", "bee/1.jpg"], [1, 0])
    with pytest.raises(UserError, match="label 0 means 'ant' in train but 'bee' in val"):
        build(tmp_path / "b", "DATA.ZIP_MODE", True)
    write_zip(tmp_path / "c", "train", ["1.jpg", "2.jpg"], [0, 1])
    write_zip(tmp_path / "c", "val", ["1.jpg"], [0])
    with pytest.raises(UserError, match="train has 2 classes and val has 1"):
        build(tmp_path / "c", "DATA.ZIP_MODE", True)


@pytest.mark.parametrize("name", ["imagenet", "imagenet22K", "demo", "torch/mnist"])
def test_no_data_path(name):
    with pytest.raises(UserError, match="DATA.DATA_PATH is empty: give --data-path"):
        build("", "DATA.DATASET", name)


def test_data_path_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=f"no folder {tmp_path}/gone. Expected {tmp_path}/gone/train/<class>"):
        build(tmp_path / "gone")


def test_imagenet_1k_order(tmp_path):
    synsets = ImageNetInfo("imagenet-1k").label_names()
    assert synsets == sorted(synsets) and len(synsets) == 1000
    for name in synsets:  # names are all that is checked
        (tmp_path / "right" / "val" / name).mkdir(parents=True)
        (tmp_path / "right" / "val" / name / "1.jpg").touch()
    assert build(tmp_path / "right", *EVALUATE).class_names == synsets
    (tmp_path / "right" / "val" / "n01440764").rename(tmp_path / "right" / "val" / "n01440765")
    with pytest.raises(UserError, match="val: label 0 is n01440765, where ImageNet-1K has n01440764"):
        build(tmp_path / "right", *EVALUATE)
    swapped = [synsets[1], synsets[0], *synsets[2:]]
    write_zip(tmp_path / "zip", "val", [f"{name}/1.jpg" for name in swapped], list(range(1000)))
    with pytest.raises(UserError, match="label 0 is n01443537"):
        build(tmp_path / "zip", *EVALUATE, "DATA.ZIP_MODE", True)


def test_imagenet_22k(tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jpg").write_bytes(b"x")
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(json.dumps([[f"{split}.jpg", 7]]))
    found = build(tmp_path, "DATA.DATASET", "imagenet22K")
    assert found.num_classes == 21841 and found.class_names is None
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="map_train.txt is missing"):
        build(empty, "DATA.DATASET", "imagenet22K")


@pytest.mark.parametrize("place", ["/dev/zero", "pipe"])
def test_what_is_listed_and_no_file_is_a_bad_image(tmp_path, place):
    """A pipe without a writer would keep the reader waiting, and a device would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.jpg").symlink_to(place)
    for split in ("train", "val"):
        (tmp_path / f"ILSVRC2011fall_whole_map_{split}.txt").write_text("a.jpg\t7\n")
    with pytest.raises(BadImage, match="a.jpg: is not a file"):
        build(tmp_path, "DATA.DATASET", "imagenet22K").train.read(0)


@pytest.mark.parametrize("line", ["../secret.jpg\t0", '[["a/../../secret.jpg", 0]]'])
def test_lists_do_not_lead_out_of_the_data(tmp_path, line):
    (tmp_path / "ILSVRC2011fall_whole_map_train.txt").write_text(line)
    with pytest.raises(UserError, match="map_train.txt.*leads out of the data"):
        build(tmp_path, "DATA.DATASET", "imagenet22K")


@pytest.mark.parametrize("name", ["torch/image_folder", "torch/folder", "torch/imagenet"])
def test_a_mistyped_path_makes_no_folder(tmp_path, name):
    with pytest.raises(UserError, match="no folder .*mistyped"):
        build(tmp_path / "mistyped", "DATA.DATASET", name)
    assert not (tmp_path / "mistyped").exists()


def _idx(array):
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.tobytes()


def test_mnist_through_timm(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    digits = np.random.RandomState(0).randint(0, 256, (12, 28, 28)).astype(np.uint8)
    for split, part in (("train", digits[:10]), ("t10k", digits[10:])):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(_idx(part))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(_idx(np.arange(len(part), dtype=np.uint8)))
    found = build(tmp_path, "DATA.DATASET", "torch/mnist")
    assert (len(found.train), len(found.val), found.num_classes) == (10, 2, 10)
    picture, label = found.train.read(3)
    rgb = np.asarray(decode(picture, found.train.path(3)))
    assert label == 3 and np.array_equal(rgb, np.stack([digits[3]] * 3, -1))


def test_torchvision_folders_are_decoded_here(tmp_path):
    """torchvision's own loader clips 16-bit images to white."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.array([[0x1234, 0x8000]], np.uint16)).save(tmp_path / split / "a" / "x.png")
    images = build(tmp_path, "DATA.DATASET", "torch/folder").train
    source, _ = images.read(0)
    assert np.asarray(decode(source, "x"))[0, :, 0].tolist() == [0x12, 0x80]


class FakeHugging:
    """Stands for timm's data set over Hugging Face's, whose package the tests do not need."""

    class reader:
        class_to_idx = {"no": 0, "yes": 1}

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return io.BytesIO(b"%d" % i), i

    def __init__(self):
        self.reader = FakeHugging.reader()


def test_hugging_face_sets_are_read_undecoded(tmp_path, monkeypatch):
    asked = []

    def create(name, root, split, **arguments):
        asked.append(split)
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split}")
        return FakeHugging()

    monkeypatch.setattr("timm.data.create_dataset", create)
    found = build(tmp_path, "DATA.DATASET", "hfds/someone/something")
    assert asked == ["train", "validation", "val", "test"]
    assert found.class_names == ["no", "yes"] and found.train.read(1) == (b"1", 1)
    with pytest.raises(BadImage, match="label is 2, not a number in 0…1"):
        found.train.read(2)


def test_timm_mistakes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)
    with pytest.raises(UserError, match="pip install datasets"):
        build(tmp_path, "DATA.DATASET", "hfds/someone/something")
    for name in ("hfids/x", "tfds/mnist", "wds/y"):
        with pytest.raises(UserError, match="only map-style"):
            build(tmp_path, "DATA.DATASET", name)
    with pytest.raises(UserError, match="cannot be opened.*Unknown torchvision dataset"):
        build(tmp_path, "DATA.DATASET", "torch/nonsense")


def test_missing_torchvision_data_are_downloaded(tmp_path, monkeypatch):
    asked = []

    def create(name, root, split, download=False):
        asked.append(download)
        raise RuntimeError("Dataset not found." if not download else "No network.")

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(UserError, match="cannot be opened in .*: No network"):
        build(tmp_path, "DATA.DATASET", "torch/mnist")
    assert asked == [False, True]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "digits"
    assert data.datasets.digits.main([str(root)]) == 0
    return root


def test_demo_split_has_no_overlap(demo):
    contents = {
        split: [path.read_bytes() for path in sorted((demo / split).rglob("*.jpg"))] for split in ("train", "val")
    }
    assert len(contents["train"]) + len(contents["val"]) == 1797
    assert abs(len(contents["val"]) / 1797 - 0.2) < 0.005
    assert not set(contents["train"]) & set(contents["val"])
    for digit in range(10):
        share = len(list((demo / "val" / str(digit)).iterdir()))
        assert abs(share / (share + len(list((demo / "train" / str(digit)).iterdir()))) - 0.2) < 0.005
    assert Image.open(next((demo / "val").rglob("*.jpg"))).size == (32, 32)


def test_demo_is_the_scans(demo):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for path in sorted(demo.rglob("*.jpg"))[::50]:
        small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX)) * (16 / 255)
        nearest = np.abs(digits.images - small).sum((1, 2)).argmin()
        assert nearest == int(path.stem) and digits.target[nearest] == int(path.parent.name)


def test_demo_is_written_once_and_is_a_folder_like_any_other(demo, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in demo.rglob("*")}
    monkeypatch.setattr(data.datasets.digits, "_write", None)
    found = build(demo, "DATA.DATASET", "demo")
    assert found.class_names == [str(digit) for digit in range(10)] and len(found.train) + len(found.val) == 1797
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not [path for path in demo.parent.iterdir() if path != demo]


def test_demo_mistakes(tmp_path, monkeypatch, caplog):
    (tmp_path / "mine.txt").write_text("")
    assert data.datasets.digits.main([str(tmp_path)]) == 2 and "holds something else" in caplog.text
    assert data.datasets.digits.main([]) == 2

    def fail(images, target, root):
        root.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(data.datasets.digits, "_write", fail)
    with pytest.raises(UserError, match="disk full"):
        data.datasets.digits.write_demo(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        data.datasets.digits.write_demo(tmp_path / "new")


def test_22k_class_count_is_the_published_one():
    assert datasets.IMAGENET_22K_CLASSES == ImageNetInfo("imagenet-22k").num_classes()
