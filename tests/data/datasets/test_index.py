"""Image folders and their cached index."""

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from data.codecs.pillow_decode import EXTENSIONS, FORMATS
from data.datasets.base import open_folder
from data.datasets.index import FORMAT, Strings
from tests._images import age, write_folder
from utils.errors import UserError


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def root(tmp_path):
    write_folder(tmp_path / "train", {"dog": 3, "cat": 2, "ant-eater": 1})
    write_folder(tmp_path / "train" / "cat" / "b", {"x": 2, "a": 1})
    write_folder(tmp_path / "train" / "cat-b", {"deep": 1})
    (tmp_path / "train" / "dog" / "PHOTO.JPeG").write_bytes(b"")
    (tmp_path / "train" / "notes.txt").write_text("no class")
    age(tmp_path)
    return tmp_path


@pytest.fixture
def scans(monkeypatch):
    """The directories that were listed."""
    scanned, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scanned.append(path) or scandir(path))
    return scanned


def listing(images):
    return [(images.path(i), int(images.index.labels[i])) for i in range(len(images))]


def test_same_classes_and_order_as_torchvision(root):
    images, reference = open_folder(root, "train"), ImageFolder(root / "train")
    assert listing(images) == reference.samples
    assert images.class_names == reference.classes == ["ant-eater", "cat", "cat-b", "dog"]
    assert images.num_classes == 4
    assert images.read(0) == (Path(reference.samples[0][0]).read_bytes(), 0)


def test_second_start_walks_nothing(root, scans):
    first = listing(open_folder(root, "train"))
    assert len(scans) == 9
    scans.clear()
    second = open_folder(root, "train")
    assert scans == [] and listing(second) == first and second.class_names == ["ant-eater", "cat", "cat-b", "dog"]
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("change", ["add", "remove", "rename", "deep", "class"])
def test_changed_folder_is_indexed_again(root, change, scans):
    before = open_folder(root, "train")
    train = root / "train"
    match change:
        case "add":
            (train / "dog" / "999.png").write_bytes(b"")
        case "remove":
            (train / "dog" / "000.jpg").unlink()
        case "rename":
            (train / "dog" / "000.jpg").rename(train / "dog" / "zzz.jpg")
        case "deep":
            (train / "cat" / "b" / "x" / "9.jpg").write_bytes(b"")
        case "class":
            write_folder(train, {"eel": 1})
    assert listing(before) != listing(open_folder(root, "train")) == ImageFolder(train).samples


def test_folder_changed_just_now_is_not_cached(root, scans):
    (root / "train" / "dog" / "999.png").write_bytes(b"")  # a change in the same clock tick would go unnoticed
    open_folder(root, "train")
    assert not list(root.glob(".swin_index*"))


def test_folder_marked_read_only_is_cached_for_the_user(root, user_cache, scans):
    root.chmod(0o555)  # the user root, who may run this test, can write there nevertheless
    first = listing(open_folder(root, "train"))
    assert not list(root.glob(".swin_index*")) and len(list(user_cache.glob("swin/*_train.npz"))) == 1
    scans.clear()
    assert listing(open_folder(root, "train")) == first and scans == []


def test_folder_that_refuses_writing_is_cached_for_the_user(root, user_cache, monkeypatch, scans):
    replace = os.replace

    def refuse(source, target):
        if Path(target).parent == root:
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    first = listing(open_folder(root, "train"))
    assert not list(root.glob(".swin_index*")) and len(list(user_cache.glob("swin/*_train.npz"))) == 1
    scans.clear()
    assert listing(open_folder(root, "train")) == first and scans == []


def test_warning_when_no_folder_takes_the_cache(root, monkeypatch, caplog):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(open_folder(root, "train")) == 11
    assert "XDG_CACHE_HOME" in caplog.text and not list(root.glob("*.tmp"))


def test_user_without_a_home_caches_with_the_data_or_not_at_all(homeless, root, caplog):
    assert len(open_folder(root, "train")) == 11 and (root / ".swin_index_train.npz").exists()
    (root / ".swin_index_train.npz").unlink()
    root.chmod(0o555)
    assert len(open_folder(root, "train")) == 11
    root.chmod(0o755)
    assert "could not be cached" in caplog.text and not (root / ".swin_index_train.npz").exists()


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "other format", "short labels"])
def test_damaged_cache_is_rebuilt(root, damage, caplog):
    first = listing(open_folder(root, "train"))
    cache = root / ".swin_index_train.npz"
    with np.load(cache) as arrays:
        contents = dict(arrays)
    match damage:
        case "truncated":
            cache.write_bytes(cache.read_bytes()[:-100])
        case "text":
            cache.write_text("not an archive")
        case "pickle":
            cache.write_bytes(pickle.dumps({"labels": 1}))
        case "other format":
            head = contents["head"].tobytes().replace(b'"format": %d' % FORMAT, b'"format": 0')
            assert head != contents["head"].tobytes()
            np.savez(cache, **contents | {"head": np.frombuffer(head, np.uint8)})
        case "short labels":
            np.savez(cache, **contents | {"labels": contents["labels"][1:]})
    with caplog.at_level(logging.WARNING):
        assert listing(open_folder(root, "train")) == first
    assert ("is rebuilt" in caplog.text) == (damage != "other format")
    with np.load(cache) as arrays:
        assert len(arrays["labels"]) == len(first)


def test_index_is_flat_buffers(root):
    index = open_folder(root, "train").index
    assert index.labels.dtype == np.int32 and index.paths.blob.dtype == np.uint8 and index.paths.ends.dtype == np.int64


def test_strings():
    names = ["", "a/ü.jpg", "b\udcff.png", "", "c"]  # the third: a file name that is not UTF-8
    packed = Strings.pack(names)
    assert [packed[i] for i in range(len(packed))] == names
    for i in (-1, 5):
        with pytest.raises(IndexError):
            packed[i]
    with pytest.raises(ValueError, match="do not match"):
        Strings(packed.blob, packed.ends[:-1])


def test_other_files_are_counted_by_ending(root, caplog):
    for name in ("readme.md", "b.TXT", "c.txt", "d.txt", "noending", "e.heic"):
        (root / "train" / "dog" / name).write_text("")
    (root / "train" / "dog" / "f.jpg").symlink_to("gone")
    open_folder(root, "train")
    assert (
        "train: 7 files are not read as images: 3 .txt, 1 without an ending, 1 .heic, "
        "1 .jpg (a broken link, a pipe or a device), 1 .md. Images end in .jpg .jpeg .jpe .jfif"
    ) in caplog.text


def test_all_endings_of_the_formats_that_are_decoded_count_as_images(tmp_path, caplog):
    """Those that Pillow has for these formats, except .dib (another format) and .pfm (values of unknown range)."""
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in (*FORMATS, "MPO")}
    assert set(EXTENSIONS) == endings - {".dib", ".pfm"}
    for i, name in enumerate(EXTENSIONS):
        (tmp_path / "train" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / "a" / f"{i}{name.upper()}").write_bytes(b"")
    assert len(open_folder(tmp_path, "train")) == len(EXTENSIONS) == 24
    assert "not read as images" not in caplog.text


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="train is missing.*<class>/<image>"):
        open_folder(tmp_path, "train")
    (tmp_path / "train.zip").write_bytes(b"")
    with pytest.raises(UserError, match="--zip"):
        open_folder(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        open_folder(tmp_path, "train")
    write_folder(tmp_path / "train", {"a": 1, "empty": 0})
    with pytest.raises(UserError, match="train/empty has no images"):
        open_folder(tmp_path, "train")
    (tmp_path / "train" / "empty" / "loop").symlink_to(tmp_path / "train" / "empty")
    with pytest.raises(UserError, match="empty/loop is a link"):
        open_folder(tmp_path, "train")


def test_hidden_files_are_ignored_and_counted(tmp_path, caplog):
    """Such as the `._` files of macOS and the folders of version control."""
    write_folder(tmp_path / "train", {"a": 2, "b": 1, ".git": 1})
    image = (tmp_path / "train" / "a" / sorted(os.listdir(tmp_path / "train" / "a"))[0]).read_bytes()
    for hidden in ("a/._0.jpg", "a/.hidden.jpg"):
        (tmp_path / "train" / hidden).write_bytes(image)
    with caplog.at_level(logging.INFO):
        images = open_folder(tmp_path, "train")
    assert len(images) == 3 and images.class_names == ["a", "b"]
    assert "2 hidden files or folders" in caplog.text


@pytest.mark.parametrize(
    "head",
    [{"stamps": {}}, {"stamps": {"train": [1]}, "class_names": 5}, {"format": 99}],
)
def test_a_forged_cache_is_not_used(root, head):
    expected = listing(open_folder(root, "train"))
    cache = root / ".swin_index_train.npz"
    with np.load(cache) as arrays:
        forged = dict(arrays)
    genuine = json.loads(forged["head"].tobytes())
    forged["labels"] = forged["labels"][::-1]
    forged["head"] = np.frombuffer(json.dumps({**genuine, **head}).encode(), np.uint8)
    np.savez(cache, **forged)
    age(root)
    assert listing(open_folder(root, "train")) == expected
