"""Image folders and their cached index."""

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder

from data.datasets.base import open_folder
from data.datasets.index import Strings
from data.datasets.validate import check_num_workers
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
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    return listed


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
    again = open_folder(root, "train")
    assert scans == [] and listing(again) == first and again.class_names == ["ant-eater", "cat", "cat-b", "dog"]
    assert not list(root.glob("*.tmp"))


@pytest.mark.parametrize("change", ["add", "remove", "rename", "deep", "class"])
def test_changed_folder_is_noticed(root, change, scans):
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
    root.chmod(0o555)  # which root, who may run this, could ignore
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


def test_no_place_for_a_cache_is_said(root, monkeypatch, caplog):
    def refuse(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(open_folder(root, "train")) == 11
    assert "XDG_CACHE_HOME" in caplog.text and not list(root.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["truncated", "text", "pickle", "other format", "short labels"])
def test_damaged_cache_is_made_anew(root, damage, caplog):
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
            head = contents["head"].tobytes().replace(b'"format": 1', b'"format": 0')
            np.savez(cache, **contents | {"head": np.frombuffer(head, np.uint8)})
        case "short labels":
            np.savez(cache, **contents | {"labels": contents["labels"][1:]})
    with caplog.at_level(logging.WARNING):
        assert listing(open_folder(root, "train")) == first
    assert ("made anew" in caplog.text) == (damage != "other format")
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
    with pytest.raises(ValueError, match="do not fit"):
        Strings(packed.blob, packed.ends[:-1])


def test_other_files_are_counted(root, caplog):
    (root / "train" / "dog" / "readme.md").write_text("")
    open_folder(root, "train")
    assert "1 files are not images" in caplog.text and "readme.md" in caplog.text


def test_mistakes_are_said(tmp_path):
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


def test_hidden_files_are_left_out_and_counted(tmp_path, caplog):
    """Such as the twins that macOS puts beside each file, and what version control keeps."""
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
def test_a_cache_by_somebody_else_is_not_believed(root, head):
    known = listing(open_folder(root, "train"))
    place = root / ".swin_index_train.npz"
    with np.load(place) as arrays:
        found = dict(arrays)
    own = json.loads(found["head"].tobytes())
    found["labels"] = found["labels"][::-1]
    found["head"] = np.frombuffer(json.dumps({**own, **head}).encode(), np.uint8)
    np.savez(place, **found)
    age(root)
    assert listing(open_folder(root, "train")) == known


@pytest.mark.parametrize(("workers", "processes"), [(10**9, 1), (40, 10**6)])
def test_absurd_numbers_of_workers_are_refused(workers, processes):
    with pytest.raises(UserError, match="DATA.NUM_WORKERS .* are too many. Take fewer: --opts DATA.NUM_WORKERS"):
        check_num_workers(workers, processes)


def test_more_workers_than_cores_are_warned_of(caplog):
    cores = len(os.sched_getaffinity(0))
    check_num_workers(cores, 1)
    assert not caplog.messages
    check_num_workers(cores + 1, 1)
    assert "more than work at a time" in caplog.text
