"""Checks before the first step: number of classes, the same ones in train and val, ImageNet's order, workers."""

import os

import pytest
from timm.data import ImageNetInfo

from data.build import build_datasets
from data.datasets.validate import check_num_workers
from tests._images import EVALUATE, data_config, process, write_folder, write_splits, write_zip
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


def test_data_one_level_too_deep_are_refused_with_the_folder_of_the_classes(tmp_path):
    deep = tmp_path / "train" / "images"
    write_folder(deep, {"ant": 2, "bee": 1, "cow": 1})
    write_folder(tmp_path / "val" / "images", {"ant": 1, "bee": 1})
    with pytest.raises(UserError, match="one class only, 'images'. Are the classes its folders ant, bee, cow"):
        build(tmp_path)
    with pytest.raises(UserError, match=rf"val has one class.*are in {tmp_path}/val/images: move them.*--data-path"):
        build(tmp_path, *EVALUATE)
    (tmp_path / "train" / "images").rename(tmp_path / "train" / "more")
    (tmp_path / "train" / "more").rename(tmp_path / "more")
    (tmp_path / "train" / "x" / "y").mkdir(parents=True)
    (tmp_path / "more").rename(tmp_path / "train" / "x" / "y" / "z")
    with pytest.raises(UserError, match=f"and are in {tmp_path}/train/x/y/z: move"):
        build(tmp_path)


def test_several_folders_of_class_folders_are_warned_about(tmp_path, caplog):
    for split in ("train", "val"):
        write_folder(tmp_path / split / "part 1", {"ant": 1, "bee": 1})
        write_folder(tmp_path / split / "part 2", {"cow": 1, "dog": 1})
    assert build(tmp_path).class_names == ["part 1", "part 2"]
    assert "train: its 2 folders are the classes (part 1, part 2), and none has images itself" in caplog.text
    caplog.clear()
    for split in ("train", "val"):  # one folder in each class, as in Tiny ImageNet
        write_folder(tmp_path / "tiny" / split / "n01" / "images", {"": 2})
        write_folder(tmp_path / "tiny" / split / "n02" / "images", {"": 2})
    assert build(tmp_path / "tiny").class_names == ["n01", "n02"]
    assert "folders are the classes" not in caplog.text


def test_a_single_class_is_one_if_its_folder_has_images_or_is_known(tmp_path, caplog):
    write_splits(tmp_path / "one", {"ant": 2}, {"ant": 1})
    assert build(tmp_path / "one").num_classes == 1
    assert caplog.text.count("has one class only") == 1
    write_folder(tmp_path / "known" / "train", {"ant": 2, "bee": 2})
    write_folder(tmp_path / "known" / "val" / "bee", {"a": 2, "b": 2})
    assert build(tmp_path / "known").num_classes == 2


def test_a_data_path_one_level_off_names_the_right_one(tmp_path):
    write_splits(tmp_path / "data", CLASSES, CLASSES)
    with pytest.raises(UserError, match=f"train is missing.* a level deeper: give --data-path {tmp_path}/data"):
        build(tmp_path)
    with pytest.raises(UserError, match=f"train is missing.* one level higher: give --data-path {tmp_path}/data"):
        build(tmp_path / "data" / "train")


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
