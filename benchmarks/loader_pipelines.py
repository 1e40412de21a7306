"""Measures whole pipelines, from files to batches, in images per second of CPU time."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageDataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2
from yacs.config import CfgNode

from benchmarks.timing import interleave
from config import get_config
from data.build import build_datasets
from data.datasets.base import Images
from data.transforms.reference import eval_transform
from tasks.build import train_batches, val_batches
from utils.distributed.process_group import DistInfo

SIZE = 224
POLICY, ERASING = "rand-m9-mstd0.5-inc1", 0.25
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIST_INFO = DistInfo.single(torch.device("cpu"))
ENDLESS = 10**6  # batches

Batches = AbstractContextManager[Iterator[object]]
OpenPipeline = Callable[[int, int], Batches]  # batch size, workers → batches


def cpu_seconds(pid: int) -> float:
    """CPU time that process `pid` has used so far, in all its threads. Linux only."""
    return time.clock_gettime((~pid << 3) | 2)  # the clock that clock_getcpuclockid(3) returns


def child_pids() -> set[int]:
    """The process ids of the running worker processes."""
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


@contextmanager
def iterate(loader: DataLoader) -> Iterator[Iterator[object]]:
    """Yields an iterator over `loader`; its workers are stopped at the end of the `with` block."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if isinstance(batches, Iterator) and hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


class InfiniteSampler:
    """Samples 0 … n-1 in random order, epoch after epoch."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return ENDLESS * self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(self.n, generator=generator).tolist()


def original_train(root: Path, batch_size: int, workers: int) -> Batches:
    """The original code: Pillow, timm's transform, DataLoader."""
    transform = create_transform(
        SIZE, is_training=True, color_jitter=0.4, auto_augment=POLICY, re_prob=ERASING, re_mode="pixel", re_count=1,
        interpolation="bicubic",
    )  # fmt: skip
    images = ImageFolder(str(root / "train"), transform)
    return iterate(DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers))


def original_eval(root: Path, batch_size: int, workers: int) -> Batches:
    images = ImageFolder(str(root / "val"), eval_transform(SIZE, True, "bicubic"))
    return iterate(DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers))


@contextmanager
def timm_train(root: Path, batch_size: int, workers: int) -> Iterator[Iterator[object]]:
    """timm's loader with its prefetcher: normalises and erases whole uint8 batches, here on the CPU."""
    images = ImageDataset(str(root / "train"))
    loader = create_loader(
        images, (3, SIZE, SIZE), batch_size, is_training=True, use_prefetcher=True, re_prob=ERASING, re_mode="pixel",
        color_jitter=0.4, auto_augment=POLICY, interpolation="bicubic", mean=MEAN, std=STD, num_workers=workers,
        pin_memory=False, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    collate = loader.loader.collate_fn
    loader.loader = DataLoader(
        images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers, collate_fn=collate
    )
    with iterate(loader.loader) as batches:
        loader.loader = batches
        yield iter(loader)


class TensorImages(torch.utils.data.Dataset):
    """torchvision: decodes to tensors, applies v2 transforms."""

    def __init__(self, root: Path):
        self.files = ImageFolder(str(root / "train")).samples
        self.transform = v2.Compose([
            v2.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandAugment(interpolation=InterpolationMode.BILINEAR),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
            v2.RandomErasing(ERASING, value="random"),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.files[i]
        return self.transform(decode_jpeg(read_file(path), ImageReadMode.RGB)), label


def torchvision_train(root: Path, batch_size: int, workers: int) -> Batches:
    images = TensorImages(root)
    return iterate(DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers))


def own_config(root: Path, batch_size: int, workers: int, backend: str, *opts: object) -> CfgNode:
    keys = ["DATA.DATA_PATH", str(root), "DATA.BATCH_SIZE", batch_size, "DATA.NUM_WORKERS", workers]
    keys += ["DATA.BACKEND", backend, "MODEL.NUM_CLASSES", 0, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0]
    return get_config(None, [*keys, *opts])


def own_train(root: Path, backend: str, *opts: object) -> OpenPipeline:
    """This project's training pipeline, without the part that runs on the device."""

    def open_batches(batch_size: int, workers: int) -> Batches:
        config = own_config(root, batch_size, workers, backend, *opts)
        data = build_datasets(config, DIST_INFO)
        return train_batches(config, data, DIST_INFO, 0, ENDLESS * batch_size).loader.started()

    return open_batches


class RepeatedImages:
    """Repeats `images` 1000 times."""

    def __init__(self, images: Images):
        self.images = images
        self.num_classes = images.num_classes
        self.class_names = images.class_names

    def __len__(self) -> int:
        return 1000 * len(self.images)

    def path(self, i: int) -> str:
        return self.images.path(i % len(self.images))

    def read(self, i: int) -> tuple[bytes | Image.Image, int]:
        return self.images.read(i % len(self.images))


def own_eval(root: Path, backend: str) -> OpenPipeline:
    @contextmanager
    def open_batches(batch_size: int, workers: int) -> Iterator[Iterator[object]]:
        config = own_config(root, batch_size, workers, backend)
        data = build_datasets(config, DIST_INFO)
        with val_batches(config, replace(data, val=RepeatedImages(data.val)), DIST_INFO).loader.started() as batches:
            yield batches

    return open_batches


@dataclass(frozen=True)
class RunningPipeline:
    """A pipeline with one worker, which sleeps when enough batches are prefetched."""

    batches: Iterator[object]
    worker: int  # process id

    def cpu_seconds_used(self) -> float:
        """Waits until the worker sleeps; returns the CPU time that it has used so far."""
        before = -1.0
        while before != (now := cpu_seconds(self.worker)) or not self.sleeps():
            before = now
            time.sleep(0.05)
        return now

    def sleeps(self) -> bool:
        return Path(f"/proc/{self.worker}/stat").read_text().rpartition(") ")[2].startswith("S")

    def turn(self, batches: int, batch_size: int) -> float:
        """Takes `batches` while the worker makes as many new ones; returns images per second of CPU time of both."""
        main_start, worker_start = time.process_time(), self.cpu_seconds_used()
        for _ in range(batches):
            next(self.batches)
        used = time.process_time() - main_start + self.cpu_seconds_used() - worker_start
        return batches * batch_size / used


def compare_pipelines(
    pipelines: dict[str, OpenPipeline], batch_size: int, batches: int, rounds: int
) -> dict[str, list[float]]:
    """Images per second of CPU time of each pipeline, in each round."""
    with ExitStack() as stack:
        turns = {}
        for name, open_pipeline in pipelines.items():
            before = child_pids()
            iterator = stack.enter_context(open_pipeline(batch_size, 1))
            next(iterator)
            (worker,) = child_pids() - before
            pipeline = RunningPipeline(iterator, worker)
            pipeline.turn(1, batch_size)  # warm-up
            turns[name] = partial(pipeline.turn, batches, batch_size)
        return interleave(turns, rounds)


def count_equal_eval_images(root: Path) -> tuple[int, int]:
    """How many validation images the native backend prepares bit for bit as the original code does, and the total."""
    images = ImageFolder(str(root / "val"), eval_transform(SIZE, True, "bicubic"))
    config = own_config(root, 1, 0, "native")
    batches = val_batches(config, build_datasets(config, DIST_INFO), DIST_INFO)
    equal = sum(torch.equal(batch["image"][0], images[i][0]) for i, batch in enumerate(batches))
    return equal, len(images)
