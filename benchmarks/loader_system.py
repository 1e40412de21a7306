"""What shows only in a whole run: scaling over workers, memory, the start with 1.28 million files, waiting for data."""

import itertools
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from yacs.config import CfgNode

from benchmarks.loader_pipelines import PROCESS, Opening, cpu_seconds, own_config
from benchmarks.pictures import write_folder
from benchmarks.runs import run_main
from config import get_config
from data.build import Data, TrainBatches, build_datasets
from data.datasets.base import FolderImages
from data.datasets.index import Index, Strings, cached
from data.loader.sampler import epoch_permutation
from data.transforms.gpu_augment import measure_seconds
from data.transforms.native_transforms import prepare_train
from data.transforms.reference import train_transform
from engine import train_step
from engine.setup import build_components
from engine.train_step import TrainComponents, TrainState
from utils.distributed.process_group import DistInfo
from utils.paths import REPO_ROOT
from utils.table import Column, Table
from utils.tracking.run_dir import hardware

log = logging.getLogger(__name__)

SWIN_TINY = REPO_ROOT / "configs" / "swin_tiny.yaml"
IMAGENET = 1_281_167  # training images of ImageNet-1K
IMAGENET_CLASSES = 1000


def scaling(opening: Opening, batch_size: int, batches: int, rounds: int, most: int) -> Table:
    """Images per second with 1, 2, 4, … `most` workers."""
    counts = sorted({*(2**k for k in range(most.bit_length()) if 2**k <= most), most})
    walls: dict[int, list[float]] = {count: [] for count in counts}
    costs: dict[int, list[float]] = {count: [] for count in counts}
    for number in range(rounds):
        for count in counts[:: -1 if number % 2 else 1]:
            wall, cost = _rates(opening, batch_size, batches * count, count)
            walls[count].append(wall)
            costs[count].append(cost)
    columns = [
        Column("workers"), Column("images/s", ".0f"), Column("share of linear", ".1%"),
        Column("images per second of processor time", ".0f"),
    ]  # fmt: skip
    table = Table("scaling", "Scaling over workers", columns)
    for count in counts:
        linear = statistics.median(a / (count * b) for a, b in zip(walls[count], walls[1], strict=True))
        table.rows.append([count, statistics.median(walls[count]), linear, statistics.median(costs[count])])
    return table


def _rates(opening: Opening, batch_size: int, batches: int, workers: int) -> tuple[float, float]:
    """Images per second of wall-clock time, and of processor time, between batches that arrive."""
    with opening(batch_size, workers) as arriving:
        for _ in range(3 * workers + 1):  # what is ready before anybody asks
            next(arriving)
        pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        begun, used = time.perf_counter(), sum(map(cpu_seconds, pids))
        for _ in range(batches):
            next(arriving)
        images = batches * batch_size
        return images / (time.perf_counter() - begun), images / (sum(map(cpu_seconds, pids)) - used)


def memory(root: Path, batch_size: int, workers: int) -> Table:
    """What each worker has for itself (USS), and all processes together (PSS), for a small and for a large index."""
    columns = [
        Column("images in the index", ",d"), Column("index, MB", ".1f"), Column("processes"),
        Column("each worker's own, MB", ".1f"), Column("all together, MB", ".1f"),
    ]  # fmt: skip
    table = Table("memory", "Memory of loader processes", columns)
    config = own_config(root, batch_size, workers, "native")
    data = build_datasets(config, PROCESS)
    small = data.train
    for repeat in (1, -(-IMAGENET // len(small))):
        images = _repeated(small, repeat)
        index = images.index
        batches = TrainBatches(config, Data(images, images, images.num_classes, None), PROCESS, 0, 10**6 * batch_size)
        with batches.loader.started() as arriving:
            for _ in range(4 * workers):
                next(arriving)
            children = [child.pid for child in multiprocessing.active_children()]
            own = statistics.mean(_kilobytes(pid, "Private_Clean", "Private_Dirty") for pid in children) / 1e3
            together = sum(_kilobytes(pid, "Pss") for pid in [os.getpid(), *children]) / 1e3
        size = index.paths.blob.nbytes + index.paths.ends.nbytes + index.labels.nbytes
        table.rows.append([len(index), size / 1e6, 1 + workers, own, together])
    return table


def _repeated(images: FolderImages, times: int) -> FolderImages:
    index = images.index
    ends = np.concatenate([index.paths.ends + k * len(index.paths.blob) for k in range(times)])
    paths = Strings(np.tile(index.paths.blob, times), ends)
    return FolderImages(images.root, Index(paths, np.tile(index.labels, times), index.class_names), images.num_classes)


def _kilobytes(pid: int, *fields: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields)


_START = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.loader_pipelines import PROCESS, own_config
from data.build import TrainBatches, build_datasets
imported = time.time()
config = own_config({data!r}, {batch_size}, {workers}, "native")
data = build_datasets(config, PROCESS)
opened = time.time()
batches = iter(TrainBatches(config, data, PROCESS, 0, 100 * {batch_size}))
next(batches)
arrived = time.time()
print(len(data.train), imported, opened, arrived)
batches.close()
"""


def start(image: bytes, batch_size: int, workers: int, rounds: int) -> Table:
    """Seconds from a new process to its first batch, with as many files as ImageNet's and a cached index."""
    columns = [
        Column("training files", ",d"), Column("imports, s", ".2f"), Column("index, s", ".2f"),
        Column("first batch, s", ".2f"), Column("index and first batch, s", ".2f"), Column("all, s", ".2f"),
    ]  # fmt: skip
    table = Table("start", f"From a cached index to the first batch of {batch_size}, {workers} workers", columns)
    times = []
    with many_files(image, batch_size * (3 * workers + 1)) as root:
        code = _START.format(root=str(REPO_ROOT), data=str(root), batch_size=batch_size, workers=workers)
        for _ in range(rounds):
            begun = time.time()
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True, check=True
            )
            count, imported, opened, arrived = (float(word) for word in done.stdout.split()[-4:])
            times.append((imported - begun, opened - imported, arrived - opened, arrived - imported, arrived - begun))
    table.rows.append([int(count), *np.median(times, axis=0).tolist()])
    table.notes.append("The folders and the cached index are as they would be; of the files, those that are asked for.")
    return table


@contextmanager
def many_files(image: bytes, asked: int) -> Iterator[Path]:
    """A folder whose cached index lists ImageNet's number of files. The first `asked` of the stream exist."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        labels = np.sort(np.arange(IMAGENET, dtype=np.int64) % IMAGENET_CLASSES).astype(np.int32)
        names = [f"class{label:04d}" for label in range(IMAGENET_CLASSES)]
        index = Index(
            Strings.pack(f"{names[label]}/{names[label]}_{i}.JPEG" for i, label in enumerate(labels.tolist())),
            labels, names,
        )  # fmt: skip
        for split in ("train", "val"):
            for name in names:
                (root / split / name).mkdir(parents=True)
        first = root / "image.jpg"
        first.write_bytes(image)
        for i in epoch_permutation(IMAGENET, 0, 0)[:asked].tolist():
            os.link(first, root / "train" / index.paths[i])
        for name in names:
            os.link(first, root / "val" / name / "0.jpg")
        folders = [root / "train", *(root / "train" / name for name in names)]
        long_ago = time.time() - 1000
        for path in [*folders, *(root / "val" / name for name in names), root / "val"]:
            os.utime(path, (long_ago, long_ago))
        cached(root, "train", lambda: (index, folders))
        yield root


def waiting(images: list[bytes], workers: int) -> Table:
    """The share of waiting for data that a run of main.py reports: Swin-T, on what this machine has."""
    columns = [Column("update"), Column("images/s", ".1f"), Column("waiting for data", ".3%")]
    table = Table("waiting", "Waiting for data, as main.py reports it", columns)
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder, "data"), images)
        run_main([
            "--cfg", str(SWIN_TINY), "--data-path", str(root), "--batch-size", "8",
            "--output", f"{folder}/runs", "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "PRINT_FREQ", "3",
            "DATA.NUM_WORKERS", str(workers), "MODEL.NUM_CLASSES", "0",
        ])  # fmt: skip
        (lines,) = [path.read_text().splitlines() for path in Path(folder, "runs").rglob("metrics.jsonl")]
    for record in map(json.loads, lines):
        if record["kind"] == "train":
            table.rows.append([record["step"], record["images_per_second"], record["data_wait"]])
    table.notes.append("The first line holds the start of the workers.")
    return table


def train_throughput(root: Path, backends: Sequence[str], workers: int, updates: int = 40, *opts: object) -> Table:
    """Swin-T trained on the device from files, beside the same steps on one batch that is there already."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist_info = DistInfo.single(device)
    columns = [
        Column("backend"), Column("images/s, fed from files", ".0f"), Column("images/s, one batch again", ".0f"),
        Column("device idle for want of data", ".1%"), Column("waiting for data", ".2%"),
        Column("device's part of the augmentation, ms", ".2f"), Column("share of a step", ".1%"),
    ]  # fmt: skip
    table = Table("device", f"Training Swin-T from files on {hardware()}, {workers} workers", columns)
    for backend in backends:
        words = ["DATA.DATA_PATH", str(root), "DATA.NUM_WORKERS", workers, "DATA.BACKEND", backend]
        config = get_config(SWIN_TINY, [*words, "MODEL.NUM_CLASSES", 0, *opts])
        batch_size = config.DATA.BATCH_SIZE
        data = build_datasets(config, dist_info)
        components = build_components(config, dist_info, data.num_classes)
        batches = TrainBatches(config, data, dist_info, 0, 10**6 * batch_size)
        stream = iter(batches)
        kept = next(stream)
        waited_for = partial(getattr, batches, "wait_seconds")
        seconds, waited = _seconds_for_update(components, stream, updates, batch_size, waited_for)
        kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in kept.items()}
        again, _ = _seconds_for_update(components, itertools.repeat(kept), updates, batch_size, lambda: 0.0)
        stream.close()
        part = _augmentation_seconds(config, device) if backend == "gpu" else None
        table.rows.append([
            backend, batch_size / seconds, batch_size / again, max(0.0, 1 - again / seconds), waited / seconds,
            part and part * 1e3, part and part / again,
        ])  # fmt: skip
    return table


def _seconds_for_update(
    components: TrainComponents, stream: Iterator[dict], updates: int, batch_size: int, waited: Callable[[], float]
) -> tuple[float, float]:
    """Seconds for an update, and those of them spent waiting for data."""
    steps = train_step.train(components, stream, TrainState(), lambda update: 1e-6, batch_size)
    train_step.seconds_for(lambda: next(steps), 5, components.device)
    before = waited()
    seconds = train_step.seconds_for(lambda: next(steps), updates, components.device)
    return seconds / updates, (waited() - before) / updates


def _augmentation_seconds(config: CfgNode, device: torch.device) -> float:
    """Seconds of the device for the augmentation of one batch, by itself."""
    aug, size = config.AUG, config.DATA.IMG_SIZE
    transform = train_transform(
        size, hflip=aug.HFLIP, color_jitter=aug.COLOR_JITTER, auto_augment=aug.AUTO_AUGMENT, re_prob=aug.REPROB,
        re_mode=aug.REMODE, re_count=aug.RECOUNT, interpolation=config.DATA.INTERPOLATION,
    )  # fmt: skip
    prepare = prepare_train("gpu", transform)
    return measure_seconds(prepare.augment, prepare.sample_params, config.DATA.BATCH_SIZE, size, device)
