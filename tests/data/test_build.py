"""Batches: pure functions of (seed, position) in any process, exact evaluation, bad images, dead workers."""

import hashlib
import io
import logging
import multiprocessing
import os
import random
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from config import differences
from data.build import (
    Data,
    TrainBatches,
    ValBatches,
    build_datasets,
    build_eval_preset,
    build_mixup,
    build_train_transform,
)
from data.loader.loader import explain_worker_crash
from tasks.build import train_batches, val_batches
from tests._images import EVALUATE, age, data_config, draw, encode, process, write_splits
from tools import pack_dataset
from utils.errors import UserError

N = 14


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = write_splits(tmp_path_factory.mktemp("images"), {"ant": 9, "bee": 5}, {"ant": 4, "bee": 3})
    age(folder)
    return folder


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def train(root, start, stop, *opts, rank=0, world_size=1):
    config = data_config(root, *opts)
    return train_batches(config, build_datasets(config, process()), process(rank, world_size), start, stop)


def digests(batches):
    """position → digest of pixels and targets, of all batches."""
    return {
        batch["position"]: hashlib.sha256(batch["image"].numpy().tobytes() + batch["target"].numpy().tobytes()).digest()
        for batch in batches
    }


def test_shapes_and_positions(root):
    batches = train(root, 0, 8)
    received = list(batches)
    assert len(batches) == 2 and [batch["position"] for batch in received] == [0, 4]
    for batch in received:
        assert batch["image"].shape == (4, 3, 48, 48) and batch["image"].dtype == torch.float32
        assert batch["target"].shape == (4, 2) and batch["target"].dtype == torch.float32
    assert batches.bad_images == 0 and 0 < batches.wait_seconds < 60


def test_without_mixing_targets_are_labels(root):
    no_mix = ("AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    targets = torch.cat([batch["target"] for batch in train(root, 0, 2 * 28, *no_mix)])
    assert targets.dtype == torch.int64
    assert targets[:N].sum() == targets[N : 2 * N].sum() == 5  # each of the five bees once per epoch
    odd = ("DATA.BATCH_SIZE", 7)
    assert next(iter(train(root, 0, 7, *no_mix, *odd)))["image"].shape[0] == 7
    with pytest.raises(UserError, match="must be even"):
        train(root, 0, 7, *odd)


def test_workers_world_size_and_resuming_change_no_pixel(root):
    """Over three and a half epochs: more workers, more ranks, a start in the middle of an epoch."""
    expected = digests(train(root, 0, 48))
    assert len(set(expected.values())) == 12
    assert digests(train(root, 0, 48, "DATA.NUM_WORKERS", 2)) == expected
    pair = [digests(train(root, 0, 48, rank=rank, world_size=2)) for rank in (0, 1)]
    assert len(pair[0]) == len(pair[1]) == 6 and pair[0] | pair[1] == expected
    resumed = digests(train(root, 24, 48, "DATA.NUM_WORKERS", 2))
    assert resumed == {position: digest for position, digest in expected.items() if position >= 24}


def test_another_seed_is_another_stream(root):
    assert not set(digests(train(root, 0, 16)).values()) & set(digests(train(root, 0, 16, "SEED", 1)).values())


def test_generators_of_the_main_process_are_restored(root):
    def next_numbers():
        return random.random(), np.random.rand(), torch.rand(1).item()

    numbers = []
    for use_batches in (False, True):
        random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if use_batches:
            list(train(root, 0, 8)), list(train(root, 0, 8, "DATA.NUM_WORKERS", 1))
        numbers.append(next_numbers())
    assert numbers[0] == numbers[1]


def test_zip_gives_the_same_pixels_as_the_folder(root, tmp_path):
    for split in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            files = sorted((root / split).rglob("*.jpg"))
            for file in files:
                archive.write(file, file.relative_to(root / split))
        lines = [f"{f.relative_to(root / split)}\t{int(f.parent.name == 'bee')}\n" for f in files]
        (tmp_path / f"{split}_map.txt").write_text("".join(lines))
    expected = digests(train(root, 0, 16))
    for mode in ("no", "part", "full"):
        opts = ("DATA.ZIP_MODE", True, "DATA.CACHE_MODE", mode, "DATA.NUM_WORKERS", 2)
        assert digests(train(tmp_path, 0, 16, *opts)) == expected


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 3)])
def test_evaluation_counts_each_image_once(root, workers, world_size):
    config = data_config(root, "DATA.NUM_WORKERS", workers)
    data = build_datasets(config, process())
    reference = {
        tuple(batch["image"][i].flatten()[::97].tolist())
        for batch in val_batches(config, data, process())
        for i in range(len(batch["image"]))
    }
    assert len(reference) == 7
    images, targets = [], []
    for rank in range(world_size):
        batches = val_batches(config, data, process(rank, world_size))
        first, second = list(batches), list(batches)  # they can be iterated again
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(first, second, strict=True))
        images += [image for batch in first for image in batch["image"]]
        targets += [target for batch in first for target in batch["target"].tolist()]
    assert len(images) == 7 and sum(targets) == 3
    assert {tuple(image.flatten()[::97].tolist()) for image in images} == reference


def test_more_ranks_than_validation_images(root):
    config = data_config(root, "DATA.NUM_WORKERS", 2)
    batches = val_batches(config, build_datasets(config, process()), process(8, 9))
    assert len(batches) == 0 and list(batches) == []


def with_truncated(tmp_path, *names):
    """A new data set of 14 and 7 images, of which those in `names` are truncated."""
    root = write_splits(tmp_path, {"ant": 9, "bee": 5}, {"ant": 4, "bee": 3})
    for name in names:
        (root / name).write_bytes((root / name).read_bytes()[:300])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_image_stops_by_default(tmp_path, workers):
    root = with_truncated(tmp_path, "train/bee/002.jpg", "val/ant/001.jpg")
    opts = ("DATA.NUM_WORKERS", workers)
    with pytest.raises(UserError, match=r"train/bee/002.jpg: .*DATA.MAX_BAD_IMAGES allows 0.*--opts") as caught:
        list(train(root, 0, 16, *opts))
    assert "Traceback" not in str(caught.value)
    config = data_config(root, *opts)
    with pytest.raises(UserError, match="val/ant/001.jpg"):
        list(val_batches(config, build_datasets(config, process()), process()))


def mean_color(image):
    """A transform that keeps the mean colour only, which identifies the image."""
    return torch.tensor(np.asarray(image).mean((0, 1))).float()


def test_bad_image_is_replaced_by_the_next_with_its_own_label(tmp_path, caplog):
    """The last two ants are bad: the first bee replaces them, labelled as a bee."""
    root = with_truncated(tmp_path, "train/ant/007.jpg", "train/ant/008.jpg")
    config = data_config(root, "DATA.MAX_BAD_IMAGES", 2)
    data = build_datasets(config, process())
    batches = TrainBatches(config, data, process(), 0, 3 * 28, transform=mean_color, mixer=None)
    received = list(batches)
    colours = torch.cat([batch["image"] for batch in received])
    targets = torch.cat([batch["target"] for batch in received])
    assert len(targets) == 84 and targets.sum() == 6 * (5 + 2)
    assert [len(set(map(tuple, colours[targets == label].tolist()))) for label in (0, 1)] == [7, 5]
    assert batches.bad_images == 2
    assert [record.message.count("ant/00") for record in caplog.records if "replaced" in record.message] == [1, 1]


def test_more_bad_images_than_allowed(tmp_path):
    root = with_truncated(tmp_path, *(f"train/bee/00{i}.jpg" for i in range(3)))
    with pytest.raises(UserError, match="bad image 3, and DATA.MAX_BAD_IMAGES allows 2"):
        list(train(root, 0, 16, "DATA.MAX_BAD_IMAGES", 2))


def test_only_bad_images(tmp_path):
    names = [f"train/ant/00{i}.jpg" for i in range(9)] + [f"train/bee/00{i}.jpg" for i in range(5)]
    root = with_truncated(tmp_path, *names)
    with pytest.raises(UserError, match="none of the training images"):
        list(train(root, 0, 16, "DATA.MAX_BAD_IMAGES", 100))


def test_bad_image_is_left_out_of_evaluation(tmp_path, caplog):
    root = with_truncated(tmp_path, "val/ant/000.jpg", "val/bee/002.jpg")
    config = data_config(root, "DATA.MAX_BAD_IMAGES", 2, "DATA.BATCH_SIZE", 1, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0)
    batches = val_batches(config, build_datasets(config, process()), process())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            targets = torch.cat([batch["target"] for batch in batches])
            assert targets.tolist() == [0, 0, 0, 1, 1] and batches.bad_images == 2
    assert caplog.text.count("bad image left out") == 2


def test_vanished_file_is_a_bad_image(tmp_path):
    root = with_truncated(tmp_path)
    batches = train(root, 0, 16)
    (root / "train" / "bee" / "000.jpg").unlink()
    with pytest.raises(UserError, match=r"bee/000.jpg: cannot be read: .*No such file"):
        list(batches)


class KillingImages:
    """Images that kill the process that reads them."""

    num_classes, class_names = 2, None

    def __len__(self):
        return 8

    def path(self, i):
        return str(i)

    def read(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_worker_is_named():
    config = data_config("x", "DATA.NUM_WORKERS", 2)
    data = Data(KillingImages(), KillingImages(), 2, None)
    for batches in (train_batches(config, data, process(), 0, 8), val_batches(config, data, process())):
        with pytest.raises(UserError, match=r"DataLoader worker.*DATA.NUM_WORKERS \(\d\).*--opts DATA.NUM_WORKERS"):
            list(batches)


@pytest.mark.parametrize("end", ["bad image", "break", "exhausted"])
def test_workers_end_at_once_however_the_loop_ends(tmp_path, end):
    root = with_truncated(tmp_path, *["train/ant/000.jpg"] * (end == "bad image"))
    batches = iter(train(root, 0, 28, "DATA.NUM_WORKERS", 2))
    start = time.perf_counter()
    kept = None  # a traceback keeps the frames of the loop, and so the iterator, alive
    if end == "bad image":
        with pytest.raises(UserError) as kept:
            list(batches)
    elif end == "break":
        next(batches)
        assert len(multiprocessing.active_children()) == 2
        batches.close()
    else:
        list(batches)
    assert multiprocessing.active_children() == [] and time.perf_counter() - start < 4
    assert (kept is not None) == (end == "bad image")


def test_other_errors_are_not_explained_as_a_dead_worker():
    with pytest.raises(RuntimeError, match="^shape$"), explain_worker_crash(2):
        raise RuntimeError("shape")


def test_training_needs_training_data(root):
    config = data_config(root, *EVALUATE)
    with pytest.raises(ValueError, match="evaluation only"):
        train_batches(config, build_datasets(config, process()), process(), 0, 4)


def test_a_task_chooses_transform_mixing_and_preset(root):
    """Given explicitly, what the configuration implies makes the same batches; a transform alone means no mixing."""
    config = data_config(root)
    data = build_datasets(config, process())
    transform, mixer = build_train_transform(config), build_mixup(config, data.num_classes)
    chosen = TrainBatches(config, data, process(), 0, 16, transform=transform, mixer=mixer)
    assert digests(chosen) == digests(train(root, 0, 16))
    unmixed = TrainBatches(config, data, process(), 0, 16, transform=transform, mixer=None)
    assert digests(unmixed) == digests(train(root, 0, 16, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0))
    chosen = ValBatches(config, data, process(), build_eval_preset(config, "hf"))
    for a, b in zip(chosen, val_batches(config, data, process(), "hf"), strict=True):
        assert torch.equal(a["image"], b["image"])


def worker_ids(batches: ValBatches) -> list[tuple[int, ...]]:
    """The children of this process during each of three passes; the first pass is abandoned after one batch."""
    seen = []
    for number in range(3):
        for _ in batches:
            if number == 0:
                break
        seen.append(tuple(sorted(child.pid for child in multiprocessing.active_children())))
    return seen


def test_validation_workers_are_kept_between_passes(root, monkeypatch):
    config = data_config(root, "DATA.NUM_WORKERS", 2, "DATA.BATCH_SIZE", 4)
    data = build_datasets(config, process())
    batches = val_batches(config, data, process())
    reference = [batch["image"].clone() for batch in batches]
    with batches.keep_workers():
        first, *later = worker_ids(batches)
        assert len(first) == 2 and all(ids == first for ids in later)
        kept = [batch["image"].clone() for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(reference, kept, strict=True))
    assert not multiprocessing.active_children()
    monkeypatch.setattr("data.build.available_memory", lambda: 0)  # too little memory: new workers for each pass
    with batches.keep_workers():
        assert [len(batch["image"]) for batch in batches] == [len(image) for image in reference]
        assert not multiprocessing.active_children()


def test_exif_orientation_in_all_backends(tmp_path):
    """Off as in the original; on, the images are those of files that were turned before. Packed data as well."""
    names = ("as shot", "turned")
    for split, count in (("train", 4), ("val", 4)):
        for i in range(count):
            exif, image = Image.Exif(), draw(i, (90, 70))
            exif[ExifTags.Base.Orientation] = 6
            contents = encode(image, "PNG", exif=exif), encode(ImageOps.exif_transpose(decode_exif(image, exif)), "PNG")
            for name, content in zip(names, contents, strict=True):
                (tmp_path / name / split / f"class {i % 2}").mkdir(parents=True, exist_ok=True)
                (tmp_path / name / split / f"class {i % 2}" / f"{i}.png").write_bytes(content)

    def images(name, backend, *opts):
        config = data_config(tmp_path / name, "DATA.BACKEND", backend, *opts)
        data = build_datasets(config, process())
        batches = [*train_batches(config, data, process(), 0, 8), *val_batches(config, data, process())]
        return torch.cat([batch["image"].float() for batch in batches])

    turn = ("DATA.EXIF_ORIENTATION", True)
    for backend in ("reference", "auto", "gpu"):
        expected = images("turned", backend)
        assert torch.equal(images("as shot", backend, *turn), expected)
        assert not torch.equal(images("as shot", backend), expected)
    for name, flags in (("as shot", ["--exif-orientation"]), ("turned", [])):
        arguments = [str(tmp_path / f"{name} packed"), "--data-path", str(tmp_path / name), "--workers", "1", *flags]
        assert pack_dataset.main(arguments) == 0
    packed = ("DATA.DATASET", "packed")
    expected = images("turned packed", "auto", *packed)
    assert torch.equal(images("as shot packed", "auto", *packed, *turn), expected)
    with pytest.raises(UserError, match="was packed with --exif-orientation.*Set it to True"):
        images("as shot packed", "auto", *packed)
    with pytest.raises(UserError, match="was packed without --exif-orientation.*Set it to False"):
        images("turned packed", "auto", *packed, *turn)


def decode_exif(image, exif):
    return Image.open(io.BytesIO(encode(image, "PNG", exif=exif)))


def test_exif_orientation_is_part_of_the_run(root):
    before, after = data_config(root), data_config(root, "DATA.EXIF_ORIENTATION", True)
    assert [key for key, *_ in differences(before, after)] == ["DATA.EXIF_ORIENTATION"]
