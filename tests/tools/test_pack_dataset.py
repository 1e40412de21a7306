"""tools/pack_dataset.py: packing continues after an interruption, and errors name the cause and the way out."""

import errno
import fcntl
import hashlib
import logging
import os

import numpy as np
import pytest
from PIL import Image

from data.build import build_datasets
from data.codecs.pillow_decode import decode
from data.codecs.tiled_jpeg import TiledJpeg
from data.datasets import pack_writer
from data.datasets.pack_writer import ImageEncoder, downscale
from data.datasets.packed import INDEX, open_packed
from tests._images import age, data_config, encode, process, write_splits, write_zip
from tests.data.datasets.test_packed import grainy
from tools import pack_dataset


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """40 training images; with SHARD_BYTES lowered, several shards."""
    root = tmp_path_factory.mktemp("source")
    for split, count in (("train", 20), ("val", 2)):
        for c, name in enumerate(("ant", "bee")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i:02d}.jpg").write_bytes(encode(grainy(100 * c + i, (90, 70))))
    age(root)
    return root


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pack_writer, "SHARD_BYTES", 20_000)


def run(output, source, *words):
    return pack_dataset.main([str(output), "--data-path", str(source), "--workers", "1", *words])


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.pack")}


def test_pack_continues_after_an_interruption(source, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    assert run(tmp_path / "uninterrupted", source) == 0
    expected = digests(tmp_path / "uninterrupted" / "train")
    assert len(expected) > 3

    class Fails(ImageEncoder):
        def __call__(self, i):
            if i == 25:
                raise KeyboardInterrupt
            return super().__call__(i)

    folder = tmp_path / "parts" / "train"
    with monkeypatch.context() as patch:
        patch.setattr(pack_dataset, "ImageEncoder", Fails)
        patch.setattr(pack_dataset, "CHUNK", 1)
        assert run(tmp_path / "parts", source) == 130
    done = digests(folder)
    assert 0 < len(done) < len(expected) and not (folder / INDEX).exists()
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    mtimes = {path: path.stat().st_mtime_ns for path in folder.glob("*.pack")}

    assert run(tmp_path / "parts", source) == 0
    assert "of 40 images are packed already" in caplog.text
    assert digests(folder) == expected
    assert all(path.stat().st_mtime_ns == time for path, time in mtimes.items())  # finished shards are not rewritten
    assert sorted(path.name for path in folder.iterdir()) == [*sorted(expected), INDEX]
    assert len(open_packed(tmp_path / "parts", "train")) == 40
    assert run(tmp_path / "parts", source) == 0 and "already complete" in caplog.text
    assert pack_dataset.main([str(tmp_path / "parts"), "--verify", "--workers", "1"]) == 0


def test_pack_logs_no_key_that_it_does_not_use(source, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert run(tmp_path, source) == 0
    assert "NUM_WORKERS" not in caplog.text


def test_continuing_with_other_settings_is_refused(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pack_writer.ShardWriter, "finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(tmp_path, source) == 130
    assert run(tmp_path, source, "--size", "80") == 2
    assert "begun with another size: size 500, now 80" in capsys.readouterr().err


def test_bad_images_stop_the_packing_or_are_left_out(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    root = write_splits(tmp_path / "data", {"ant": 4, "bee": 3}, {"ant": 1, "bee": 1})
    for name in ("ant/001.jpg", "bee/000.jpg"):
        (root / "train" / name).write_bytes(b"no image")
    assert run(tmp_path / "packed", root) == 2
    assert "train/ant/001.jpg: not an image. That is bad image 1" in capsys.readouterr().err
    assert run(tmp_path / "packed", root, "--max-bad-images", "1") == 2
    assert run(tmp_path / "packed", root, "--max-bad-images", "2") == 0
    assert "2 left out" in caplog.text
    images = open_packed(tmp_path / "packed", "train")
    assert [images.read(i)[1] for i in range(len(images))] == [0, 0, 0, 1, 1]


def test_a_dataset_of_bad_images_is_refused(tmp_path, capsys):
    root = write_splits(tmp_path / "data", {"ant": 1}, {"ant": 1})
    (root / "train" / "ant" / "000.jpg").write_bytes(b"no image")
    assert run(tmp_path / "packed", root, "--max-bad-images", "5") == 2
    assert "none of its images can be decoded" in capsys.readouterr().err


def test_a_full_disk_is_reported(source, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pack_writer, "write_atomically", full)
    assert run(tmp_path, source) == 2
    message = capsys.readouterr().err
    assert "No space left on device. Finished files are kept" in message and "same command again" in message


def test_two_processes_cannot_pack_into_one_folder(source, tmp_path, capsys):
    (tmp_path / "train").mkdir()
    lock = os.open(tmp_path / "train", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert run(tmp_path, source) == 2
    assert "another process is packing into it" in capsys.readouterr().err
    os.close(lock)


def test_a_killed_worker_is_reported(source, tmp_path, monkeypatch, capsys):
    class Dies(ImageEncoder):
        def __call__(self, i):
            os.kill(os.getpid(), 9)

    monkeypatch.setattr(pack_dataset, "ImageEncoder", Dies)
    assert run(tmp_path, source) == 2
    assert "packing processes died" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--size", "64"], "--size: '64' is no number from 65 to 2048"),
        (["--quality", "101"], "--quality: '101' is no number"),
        (["--workers", "0"], "--workers: '0' is no number"),
        (["--dataset", "imagnet"], "Did you mean imagenet"),
        (["--sise", "100"], "--sise"),
        (["--quality", "high"], "'high' is no number from 50 to 100"),
    ],
)
def test_errors_on_the_command_line(source, tmp_path, capsys, words, expected):
    assert pack_dataset.main([str(tmp_path / "packed"), "--data-path", str(source), *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error


def test_errors_in_the_folders(source, tmp_path, capsys):
    assert pack_dataset.main([str(tmp_path)]) == 2 and "--data-path DIR is missing" in capsys.readouterr().err
    assert (
        run(source, source) == 2 and "cannot be written into the folder they are made from" in capsys.readouterr().err
    )
    assert run(tmp_path, tmp_path / "nowhere") == 2 and "no folder" in capsys.readouterr().err
    assert pack_dataset.main([str(tmp_path), "--verify"]) == 2 and "index.npz is missing" in capsys.readouterr().err


def test_small_images_are_stored_losslessly(tmp_path):
    write_zip(tmp_path / "data", "train", ["ant/1.jpg", "bee/1.jpg"], [0, 1])  # 40 × 36 pixels
    write_zip(tmp_path / "data", "val", ["ant/1.jpg", "bee/1.jpg"], [0, 1])
    assert run(tmp_path / "packed", tmp_path / "data", "--zip") == 0
    before = build_datasets(data_config(tmp_path / "data", "DATA.ZIP_MODE", True), process()).train
    after = build_datasets(data_config(tmp_path / "packed", "DATA.DATASET", "packed"), process()).train
    for i in range(2):
        (jpeg, label), (stored, same_label) = before.read(i), after.read(i)
        assert not isinstance(stored, TiledJpeg) and label == same_label
        assert np.array_equal(np.asarray(decode(jpeg, "")), np.asarray(decode(stored, "")))


def test_downscale_never_enlarges_and_keeps_the_aspect_ratio():
    for size, expected in (((90, 70), (90, 70)), ((1000, 400), (500, 200)), ((3, 2000), (1, 500))):
        assert downscale(Image.new("RGB", size), 500).size == expected
