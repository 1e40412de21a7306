"""Checks before the first step: number of classes, the same ones in train and val, ImageNet's order, workers."""

import os

import pytest
from timm.data import ImageNetInfo

from data.build import build_datasets
from data.datasets.validate import check_num_workers
from tests._images import EVALUATE, data_config, process, write_splits, write_zip
from utils.errors import UserError

CLASSES = {"ant": 2, "bee": 1}


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def build(root, *opts):
    return build_datasets(data_config(root, *opts), process())


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


def test_imagenet_1k_order(tmp_path):
    synsets = ImageNetInfo("imagenet-1k").label_names()
    assert synsets == sorted(synsets) and len(synsets) == 1000
    for name in synsets:  # only the names are checked
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


@pytest.mark.parametrize(("workers", "processes"), [(10**9, 1), (40, 10**6)])
def test_absurd_numbers_of_workers_are_refused(workers, processes):
    with pytest.raises(UserError, match="DATA.NUM_WORKERS .* are too many. Take fewer: --opts DATA.NUM_WORKERS"):
        check_num_workers(workers, processes)


def test_warning_about_more_workers_than_cores(caplog):
    cores = len(os.sched_getaffinity(0))
    check_num_workers(cores, 1)
    assert not caplog.messages
    check_num_workers(cores + 1, 1)
    assert "more than can run at a time" in caplog.text
