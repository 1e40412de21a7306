"""The zip layout: members are read by position, safely from many processes, and mistakes are named."""

import multiprocessing
import pickle
import zipfile

import numpy as np
import pytest

from data.codecs.pillow_decode import BadImage
from data.datasets.base import open_imagenet_22k, open_zip
from tests._images import age, write_zip
from utils.errors import UserError

NAMES = [f"{c}/{i}.jpg" for c in ("ant", "bee") for i in range(6)]
LABELS = [0] * 6 + [1] * 6


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def open_train(root, mode="no", local_rank=0, local_world_size=1):
    return open_zip(root, "train", mode, local_rank, local_world_size)


def contents(root):
    with zipfile.ZipFile(root / "train.zip") as archive:
        return [(archive.read(name), label) for name, label in zip(NAMES, LABELS, strict=True)]


@pytest.mark.parametrize("mode", ["no", "part", "full"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_equal_zipfile(tmp_path, mode, method):
    write_zip(tmp_path, "train", NAMES, LABELS, method)
    images = open_train(tmp_path, mode, local_rank=1, local_world_size=2)
    assert [images.read(i) for i in range(len(images))] == contents(tmp_path)
    assert images.class_names == ["ant", "bee"] and images.num_classes == 2
    assert images.path(7) == f"{tmp_path}/train.zip:bee/1.jpg"


def _read_all(images, order, queue):
    queue.put([images.read(i) for i in order])


@pytest.mark.parametrize("mode", ["no", "part", "full"])
def test_forked_processes_do_not_disturb_each_other(tmp_path, mode):
    write_zip(tmp_path, "train", NAMES, LABELS)
    images, expected = open_train(tmp_path, mode), contents(tmp_path)
    fork = multiprocessing.get_context("fork")
    jobs = []
    for seed in range(3):
        order, queue = np.random.RandomState(seed).randint(0, len(NAMES), 300).tolist(), fork.Queue()
        jobs.append((order, queue, fork.Process(target=_read_all, args=(images, order, queue))))
        jobs[-1][2].start()
    for order, queue, worker in jobs:
        assert queue.get(timeout=30) == [expected[i] for i in order]
        worker.join()


@pytest.mark.parametrize("mode", ["no", "full"])
def test_a_spawned_worker_reads_the_file(tmp_path, mode):
    write_zip(tmp_path, "train", NAMES, LABELS)
    images = pickle.loads(pickle.dumps(open_train(tmp_path, mode)))
    assert [images.read(i) for i in range(len(images))] == contents(tmp_path)


def test_zip_with_a_prefix_and_extra_fields(tmp_path):
    write_zip(tmp_path, "train", NAMES, LABELS)
    expected = contents(tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for (content, _), name in zip(expected, NAMES, strict=True):
            member = zipfile.ZipInfo(name)
            member.extra = b"\x99\x99\x04\x00abcd"
            with archive.open(member, "w", force_zip64=True) as file:  # local and central extra fields differ
                file.write(content)
    (tmp_path / "train.zip").write_bytes(b"#!/bin/sh\n" + (tmp_path / "train.zip").read_bytes())
    images = open_train(tmp_path)
    assert [images.read(i) for i in range(len(images))] == expected


def test_index_is_cached_until_zip_or_map_change(tmp_path, monkeypatch):
    write_zip(tmp_path, "train", NAMES, LABELS)
    age(tmp_path)
    opened, original = [], zipfile.ZipFile

    def count(path, *args, **kwargs):
        opened.extend([path] * str(path).endswith("train.zip"))
        return original(path, *args, **kwargs)

    monkeypatch.setattr("data.datasets.zip_archive.zipfile.ZipFile", count)
    first = open_train(tmp_path)
    assert len(opened) == 1
    second = open_train(tmp_path)
    assert len(opened) == 1 and second.read(3) == first.read(3) and second.class_names == ["ant", "bee"]
    map_file = tmp_path / "train_map.txt"
    map_file.write_text("".join(map_file.read_text().splitlines(keepends=True)[1:]))
    assert len(open_train(tmp_path)) == 11


def test_flat_paths_have_no_class_names(tmp_path):
    write_zip(tmp_path, "val", ["a.jpg", "b.jpg"], [0, 1])
    images = open_zip(tmp_path, "val", "no", 0, 1)
    assert images.class_names is None and images.num_classes == 2


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (["b/1.jpg", "a/1.jpg"], [0, 1], ["b", "a"]),
        (["a/1.jpg", "a/2.jpg"], [0, 1], None),
        (["a/1.jpg", "b/1.jpg", "c/1.jpg"], [0, 1, 1], None),
    ],
)
def test_class_names_follow_the_labels(tmp_path, names, labels, expected):
    write_zip(tmp_path, "train", names, labels)
    assert open_train(tmp_path).class_names == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ant/1.jpg 0", "line 2: expected"),
        ("ant/1.jpg\tant", "line 2: expected"),
        ("ant/1.jpg\t-1", "line 2: expected"),
        ("ant/1.jpg\t1.0", "line 2: expected"),
        ("\t1", "line 2: expected"),
        ("ant/1.jpg\t" + "9" * 5000, "line 2: expected"),
        ("ant/missing.jpg\t0", "no member 'ant/missing.jpg'"),
        ("ant/1.jpg\t3", "no image has label 2"),
    ],
)
def test_bad_map_lines(tmp_path, line, message):
    write_zip(tmp_path, "train", NAMES, LABELS)
    lines = (tmp_path / "train_map.txt").read_text().splitlines()
    (tmp_path / "train_map.txt").write_text("\r\n".join([lines[0], line, *lines[2:], ""]))
    with pytest.raises(UserError, match=message) as caught:
        open_train(tmp_path)
    assert "train_map.txt" in str(caught.value)


def test_map_that_is_empty_or_not_utf8(tmp_path):
    write_zip(tmp_path, "train", NAMES, LABELS)
    (tmp_path / "train_map.txt").write_text("\n\n")
    with pytest.raises(UserError, match="lists no images"):
        open_train(tmp_path)
    (tmp_path / "train_map.txt").write_bytes(b"ant/\xff.jpg\t0\n")
    with pytest.raises(UserError, match="line 1: the path is not UTF-8"):
        open_train(tmp_path)


def _set_header(path, offset, value):
    """Writes `value` to the two bytes at `offset` in each header of the central directory."""
    content, start = bytearray(path.read_bytes()), 0
    while (start := content.find(b"PK\x01\x02", start + 1)) > 0:
        content[start + offset : start + offset + 2] = value.to_bytes(2, "little")
    path.write_bytes(content)


def test_unreadable_zips(tmp_path):
    with pytest.raises(UserError, match=r"train.zip is missing.*train_map.txt"):
        open_train(tmp_path)
    write_zip(tmp_path, "train", NAMES, LABELS)
    archive = tmp_path / "train.zip"
    content = archive.read_bytes()
    archive.write_bytes(content[:-50])
    with pytest.raises(UserError, match="cannot be read as a zip"):
        open_train(tmp_path)
    archive.write_bytes(content)
    _set_header(archive, 8, 1)
    with pytest.raises(UserError, match="'ant/0.jpg' is encrypted"):
        open_train(tmp_path)
    archive.write_bytes(content)
    _set_header(archive, 10, 14)
    with pytest.raises(UserError, match="compression method 14"):
        open_train(tmp_path)


@pytest.mark.parametrize("mode", ["no", "full"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_member_is_a_bad_image(tmp_path, method, mode):
    write_zip(tmp_path, "train", NAMES, LABELS, method)
    with zipfile.ZipFile(tmp_path / "train.zip") as archive:
        offset = archive.getinfo(NAMES[2]).header_offset
    content = bytearray((tmp_path / "train.zip").read_bytes())
    content[offset + 200] ^= 1
    (tmp_path / "train.zip").write_bytes(content)
    images = open_train(tmp_path, mode)
    with pytest.raises(BadImage, match="train.zip:ant/2.jpg: damaged zip"):
        images.read(2)
    images.read(3)


def test_zip_truncated_during_training_is_a_bad_image(tmp_path):
    write_zip(tmp_path, "train", NAMES, LABELS)
    images = open_train(tmp_path)
    (tmp_path / "train.zip").write_bytes((tmp_path / "train.zip").read_bytes()[:500])
    with pytest.raises(BadImage, match="bee/5.jpg"):
        images.read(11)


def test_full_cache_refuses_a_zip_larger_than_memory(tmp_path):
    write_zip(tmp_path, "train", NAMES, LABELS)
    with pytest.raises(UserError, match="--cache-mode part"):
        open_train(tmp_path, "full", local_world_size=10**9)


def _write_22k(root, split, text):
    for name in ("n01/a.jpg", "n02/b.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(name.encode())
    (root / f"ILSVRC2011fall_whole_map_{split}.txt").write_text(text)


@pytest.mark.parametrize("text", ['[["n01/a.jpg", 5], ["n02/b.jpg", 21840]]', "n01/a.jpg\t5\nn02/b.jpg\t21840\n"])
def test_imagenet_22k_reads_json_and_lines(tmp_path, text):
    _write_22k(tmp_path, "train", text)
    images = open_imagenet_22k(tmp_path, "train")
    assert [images.read(i) for i in range(2)] == [(b"n01/a.jpg", 5), (b"n02/b.jpg", 21840)]
    assert images.num_classes == 21841 and images.class_names is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[["n01/a.jpg", 21841]]', "entry 1: label 21841"),
        ("n01/a.jpg\t21841", "line 1: label 21841"),
        ('[["n01/a.jpg", 1], ["n02/b.jpg"]]', "entry 2: expected"),
        ('[["n01/a.jpg", true]]', "entry 1: expected"),
        ('[["n01/a.jpg", 1]', "not valid JSON"),
        ("[" * 100000, "not valid JSON"),
        ("[]", "lists no images"),
    ],
)
def test_imagenet_22k_bad_maps(tmp_path, text, message):
    _write_22k(tmp_path, "val", text)
    with pytest.raises(UserError, match=message) as caught:
        open_imagenet_22k(tmp_path, "val")
    assert "map_val.txt" in str(caught.value)


def test_imagenet_22k_without_map_or_image(tmp_path):
    with pytest.raises(UserError, match="map_train.txt is missing"):
        open_imagenet_22k(tmp_path, "train")
    _write_22k(tmp_path, "train", "n01/gone.jpg\t1\nbad\0name.jpg\t2\n")
    images = open_imagenet_22k(tmp_path, "train")
    for i in range(2):
        with pytest.raises(BadImage, match="cannot be read"):
            images.read(i)
