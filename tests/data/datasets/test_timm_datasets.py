"""Data sets that timm's `create_dataset` makes: read undecoded, downloaded when missing, mistakes are named."""

import io
import struct
import sys

import numpy as np
import pytest
from PIL import Image

from data.build import build_datasets
from data.codecs.pillow_decode import BadImage, decode
from tests._images import data_config, process
from utils.errors import UserError


def build(root, *opts):
    return build_datasets(data_config(root, *opts), process())


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
    data = build(tmp_path, "DATA.DATASET", "torch/mnist")
    assert (len(data.train), len(data.val), data.num_classes) == (10, 2, 10)
    image, label = data.train.read(3)
    rgb = np.asarray(decode(image, data.train.path(3)))
    assert label == 3 and np.array_equal(rgb, np.stack([digits[3]] * 3, -1))


def test_torchvision_folders_are_decoded_here(tmp_path):
    """torchvision's own loader clips 16-bit images to white."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.array([[0x1234, 0x8000]], np.uint16)).save(tmp_path / split / "a" / "x.png")
    images = build(tmp_path, "DATA.DATASET", "torch/folder").train
    source, _ = images.read(0)
    assert np.asarray(decode(source, "x"))[0, :, 0].tolist() == [0x12, 0x80]


def test_torchvision_folders_have_the_endings_of_ours(tmp_path, caplog):
    """torchvision would leave out .jfif and .gif without a word."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for name in ("1.jpg", "2.jfif", "3.GIF", "4.txt", "5.txt"):
            (tmp_path / split / "a" / name).write_bytes(b"")
    data = build(tmp_path, "DATA.DATASET", "torch/image_folder")
    assert len(data.train) == len(data.val) == 3
    assert f"{tmp_path}, train: 2 files are not read as images: 2 .txt" in caplog.text


class HuggingFaceStub:
    """A stub of timm's data set over Hugging Face's, whose package the tests do not need."""

    class reader:
        class_to_idx = {"no": 0, "yes": 1}

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return io.BytesIO(b"%d" % i), i

    def __init__(self):
        self.reader = HuggingFaceStub.reader()


def test_hugging_face_sets_are_read_undecoded(tmp_path, monkeypatch):
    requested = []

    def create(name, root, split, **arguments):
        requested.append(split)
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split {split}")
        return HuggingFaceStub()

    monkeypatch.setattr("timm.data.create_dataset", create)
    data = build(tmp_path, "DATA.DATASET", "hfds/someone/something")
    assert requested == ["train", "validation", "val", "test"]
    assert data.class_names == ["no", "yes"] and data.train.read(1) == (b"1", 1)
    with pytest.raises(BadImage, match="label is 2, not a number in 0…1"):
        data.train.read(2)


def test_mistakes(tmp_path, monkeypatch):
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
    requested = []

    def create(name, root, split, download=False):
        requested.append(download)
        raise RuntimeError("Dataset not found." if not download else "No network.")

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(UserError, match="cannot be opened in .*: No network"):
        build(tmp_path, "DATA.DATASET", "torch/mnist")
    assert requested == [False, True]
