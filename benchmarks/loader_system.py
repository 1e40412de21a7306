"""Measures whole runs: scaling over workers, memory, start-up with 1.28 million files, waiting for data."""

import itertools
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

from benchmarks.jpegs import write_folder
from benchmarks.loader_pipelines import DIST_INFO, ENDLESS, OpenPipeline, child_pids, cpu_seconds, own_config
from benchmarks.runs import run_main
from benchmarks.timing import interleave
from config import get_config
from data.build import Data, build_datasets
from data.datasets.base import FolderImages, open_folder
from data.datasets.index import Index, Strings, cached
from data.loader.sampler import epoch_permutation
from data.transforms.native_transforms import GpuTrainTransform, prepare_train
from data.transforms.reference import train_transform
from engine.setup import build_components
from engine.throughput import images_per_second, seconds_for
from engine.train_step import TrainComponents, TrainState, train_steps
from tasks.build import train_batches
from utils.distributed.process_group import DistInfo
from utils.paths import REPO_ROOT
from utils.table import Column, Table
from utils.tracking.metric_writer import read_records
from utils.tracking.run_dir import hardware

SWIN_TINY = REPO_ROOT / "configs" / "swin_tiny.yaml"
IMAGENET = 1_281_167  # training images of ImageNet-1K
IMAGENET_CLASSES = 1000


def scaling_table(open_pipeline: OpenPipeline, batch_size: int, batches: int, rounds: int, max_workers: int) -> Table:
    """Images per second with 1, 2, 4, … `max_workers` workers."""
    counts = sorted({*(2**k for k in range(max_workers.bit_length())), max_workers})
    turns = {count: partial(_rates, open_pipeline, batch_size, batches * count, count) for count in counts}
    rates = interleave(turns, rounds)
    columns = [
        Column("workers"), Column("images/s", ".0f"), Column("share of linear", ".1%"),
        Column("images per second of CPU time", ".0f"),
    ]  # fmt: skip
    table = Table("scaling", "Scaling over workers", columns)
    for count in counts:
        wall, cpu = (statistics.median(values) for values in zip(*rates[count], strict=True))
        linear = statistics.median(
            many / (count * one) for (many, _), (one, _) in zip(rates[count], rates[1], strict=True)
        )
        table.rows.append([count, wall, linear, cpu])
    return table


def _rates(open_pipeline: OpenPipeline, batch_size: int, batches: int, workers: int) -> tuple[float, float]:
    """Images per second of wall-clock time, and of CPU time, once the prefetched batches are used up."""
    with open_pipeline(batch_size, workers) as iterator:
        for _ in range(3 * workers + 1):  # more than are prefetched
            next(iterator)
        pids = [os.getpid(), *child_pids()]
        start, used = time.perf_counter(), sum(map(cpu_seconds, pids))
        for _ in range(batches):
            next(iterator)
        images = batches * batch_size
        return images / (time.perf_counter() - start), images / (sum(map(cpu_seconds, pids)) - used)


def memory_table(root: Path, batch_size: int, workers: int) -> Table:
    """Private memory of each worker (USS) and the total of all processes (PSS), for a small and a large index."""
    columns = [
        Column("images in the index", ",d"), Column("index, MB", ".1f"), Column("processes"),
        Column("each worker's own, MB", ".1f"), Column("all together, MB", ".1f"),
    ]  # fmt: skip
    table = Table("memory", "Memory of loader processes", columns)
    config = own_config(root, batch_size, workers, "native")
    small = open_folder(root, "train")
    for repeat in (1, -(-IMAGENET // len(small))):
        images = _repeat_images(small, repeat)
        index = images.index
        batches = train_batches(
            config, Data(images, images, images.num_classes, None), DIST_INFO, 0, ENDLESS * batch_size
        )
        with batches.loader.started() as iterator:
            for _ in range(4 * workers):
                next(iterator)
            children = child_pids()
            private = statistics.mean(_kilobytes(pid, "Private_Clean", "Private_Dirty") for pid in children) / 1e3
            total = sum(_kilobytes(pid, "Pss") for pid in [os.getpid(), *children]) / 1e3
        size = index.paths.blob.nbytes + index.paths.ends.nbytes + index.labels.nbytes
        table.rows.append([len(index), size / 1e6, 1 + workers, private, total])
    return table


def _repeat_images(images: FolderImages, times: int) -> FolderImages:
    index = images.index
    ends = np.concatenate([index.paths.ends + k * len(index.paths.blob) for k in range(times)])
    paths = Strings(np.tile(index.paths.blob, times), ends)
    return FolderImages(images.root, Index(paths, np.tile(index.labels, times), index.class_names), images.num_classes)


def _kilobytes(pid: int, *fields: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.partition(":")[0] in fields)


_START_SCRIPT = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks.loader_pipelines import DIST_INFO, own_config
from data.build import build_datasets
from tasks.build import train_batches
imported = time.time()
config = own_config({data!r}, {batch_size}, {workers}, "native")
data = build_datasets(config, DIST_INFO)
indexed = time.time()
batches = iter(train_batches(config, data, DIST_INFO, 0, 100 * {batch_size}))
next(batches)
print(len(data.train), imported, indexed, time.time())
batches.close()
"""


def start_table(image: bytes, batch_size: int, workers: int, rounds: int) -> Table:
    """Seconds from a new process to its first batch, with as many files as ImageNet and a cached index."""
    columns = [
        Column("training files", ",d"), Column("imports, s", ".2f"), Column("index, s", ".2f"),
        Column("first batch, s", ".2f"), Column("index and first batch, s", ".2f"), Column("all, s", ".2f"),
    ]  # fmt: skip
    table = Table("start", f"From a cached index to the first batch of {batch_size}, {workers} workers", columns)
    times = []
    with imagenet_sized_folder(image, batch_size * (3 * workers + 1)) as root:
        code = _START_SCRIPT.format(root=str(REPO_ROOT), data=str(root), batch_size=batch_size, workers=workers)
        for _ in range(rounds):
            start = time.time()
            result = subprocess.run(
                [sys.executable, "-c", code], cwd=REPO_ROOT, stdout=subprocess.PIPE, text=True, check=True
            )
            count, imported, indexed, batch = (float(word) for word in result.stdout.split()[-4:])
            times.append((imported - start, indexed - imported, batch - indexed, batch - imported, batch - start))
    table.rows.append([int(count), *np.median(times, axis=0).tolist()])
    table.notes.append("Folders and cached index are complete; of the files, only those that are read exist.")
    return table


@contextmanager
def imagenet_sized_folder(image: bytes, existing: int) -> Iterator[Path]:
    """A folder whose cached index lists as many files as ImageNet. The first `existing` of the data order exist."""
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
        for i in epoch_permutation(IMAGENET, 0, 0)[:existing].tolist():
            os.link(first, root / "train" / index.paths[i])
        for name in names:
            os.link(first, root / "val" / name / "0.jpg")
        folders = [root / "train", *(root / "train" / name for name in names)]
        long_ago = time.time() - 1000
        for path in [*folders, *(root / "val" / name for name in names), root / "val"]:
            os.utime(path, (long_ago, long_ago))
        cached(root, "train", lambda: (index, folders))
        yield root


def data_wait_table(images: list[bytes], workers: int) -> Table:
    """The share of time that a run of main.py waits for data: Swin-T, on this machine."""
    columns = [Column("step"), Column("images/s", ".1f"), Column("waiting for data", ".3%")]
    table = Table("waiting", "Waiting for data, as main.py reports it", columns)
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder, "data"), images)
        run_main([
            "--cfg", str(SWIN_TINY), "--data-path", str(root), "--batch-size", "8",
            "--output", f"{folder}/runs", "--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "PRINT_FREQ", "3",
            "DATA.NUM_WORKERS", str(workers), "MODEL.NUM_CLASSES", "0",
        ])  # fmt: skip
        (records,) = [read_records(path.parent) for path in Path(folder, "runs").rglob("metrics.jsonl")]
    for record in records:
        if record["kind"] == "train":
            table.rows.append([record["step"], record["images_per_second"], record["data_wait"]])
    table.notes.append("The first line includes the start of the workers.")
    return table


def train_throughput(root: Path, backends: Sequence[str], workers: int, updates: int = 40, *opts: object) -> Table:
    """Swin-T trained on the device from files, compared with the same steps on one batch kept on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dist_info = DistInfo.single(device)
    columns = [
        Column("backend"), Column("images/s, from files", ".0f"), Column("images/s, one batch repeated", ".0f"),
        Column("device idle, waiting for data", ".1%"), Column("waiting for data", ".2%"),
        Column("augmentation on the device, ms", ".2f"), Column("share of a step", ".1%"),
    ]  # fmt: skip
    table = Table("device", f"Training Swin-T from files on {hardware()}, {workers} workers", columns)
    for backend in backends:
        keys = ["DATA.DATA_PATH", str(root), "DATA.NUM_WORKERS", workers, "DATA.BACKEND", backend]
        config = get_config(SWIN_TINY, [*keys, "MODEL.NUM_CLASSES", 0, *opts])
        batch_size = config.DATA.BATCH_SIZE
        data = build_datasets(config, dist_info)
        components = build_components(config, dist_info, data)
        batches = train_batches(config, data, dist_info, 0, ENDLESS * batch_size)
        stream = iter(batches)
        batch = next(stream)
        data_wait = partial(getattr, batches, "wait_seconds")
        seconds, waited = _seconds_per_step(components, stream, updates, batch_size, data_wait)
        batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        repeated, _ = _seconds_per_step(components, itertools.repeat(batch), updates, batch_size, lambda: 0.0)
        stream.close()
        augment = _augmentation_seconds(config, device) if backend == "gpu" else None
        table.rows.append([
            backend, batch_size / seconds, batch_size / repeated, max(0.0, 1 - repeated / seconds), waited / seconds,
            augment and augment * 1e3, augment and augment / repeated,
        ])  # fmt: skip
    return table


def _seconds_per_step(
    components: TrainComponents, stream: Iterator[dict], updates: int, batch_size: int, waited: Callable[[], float]
) -> tuple[float, float]:
    """Seconds per step, and how many of them were spent waiting for data."""
    steps = train_steps(components, stream, TrainState(), lambda step: 1e-6, batch_size)
    seconds_for(lambda: next(steps), 5, components.device)
    before = waited()
    seconds = seconds_for(lambda: next(steps), updates, components.device)
    return seconds / updates, (waited() - before) / updates


def _augmentation_seconds(config: CfgNode, device: torch.device) -> float:
    """Seconds that the device takes to augment one batch of noise images; parameters differ from call to call."""
    aug, size, batch_size = config.AUG, config.DATA.IMG_SIZE, config.DATA.BATCH_SIZE
    transform = train_transform(
        size, hflip=aug.HFLIP, color_jitter=aug.COLOR_JITTER, auto_augment=aug.AUTO_AUGMENT, re_prob=aug.REPROB,
        re_mode=aug.REMODE, re_count=aug.RECOUNT, interpolation=config.DATA.INTERPOLATION,
    )  # fmt: skip
    prepare = prepare_train("gpu", transform)
    if not isinstance(prepare, GpuTrainTransform):
        raise TypeError(f"{type(prepare).__name__} does not augment on the device")
    params = itertools.cycle([
        torch.from_numpy(np.stack([prepare.sample_params(size, size) for _ in range(batch_size)])) for _ in range(10)
    ])  # fmt: skip
    pixels = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, device=device)
    return 1 / images_per_second(lambda: prepare.augment(pixels, next(params)), 1, device, seconds=0.3, runs=5)
