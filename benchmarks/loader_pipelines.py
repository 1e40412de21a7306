"""Whole pipelines, from files to batches, in images per second of processor time."""

import contextlib
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from timm.data import ImageDataset, create_loader, create_transform
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg, read_file
from torchvision.transforms import InterpolationMode, v2

from config import get_config
from data.build import TrainBatches, build_datasets, val_batches
from data.datasets.base import Images
from data.transforms.reference import eval_transform
from utils.distributed.process_group import DistInfo

log = logging.getLogger(__name__)

SIZE = 224
POLICY, ERASING = "rand-m9-mstd0.5-inc1", 0.25
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PROCESS = DistInfo.single(torch.device("cpu"))
ENDLESS = 10**6  # batches

Batches = contextlib.AbstractContextManager[Iterator[object]]
Opening = Callable[[int, int], Batches]  # batch size, workers → batches


def cpu_seconds(pid: int) -> float:
    """Processor time that process `pid` has used so far, in all its threads (Linux: its clock, as clock_getcpuclockid
    makes it)."""
    return time.clock_gettime((~pid << 3) | 2)


@contextmanager
def of_dataloader(loader: DataLoader) -> Iterator[Iterator[object]]:
    """Endless batches of `loader`, whose workers end with the block."""
    batches = iter(loader)
    try:
        yield batches
    finally:
        if isinstance(batches, Iterator) and hasattr(batches, "_shutdown_workers"):
            batches._shutdown_workers()


class InfiniteSampler:
    """A sampler: the indices of an epoch in random order, again and again."""

    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return ENDLESS * self.n

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield from torch.randperm(self.n, generator=generator).tolist()


def original_train(root: Path, batch_size: int, workers: int) -> Batches:
    """The original code's: Pillow, timm's transform, DataLoader."""
    transform = create_transform(
        SIZE, is_training=True, color_jitter=0.4, auto_augment=POLICY, re_prob=ERASING, re_mode="pixel", re_count=1,
        interpolation="bicubic",
    )  # fmt: skip
    images = ImageFolder(str(root / "train"), transform)
    return of_dataloader(DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers))


def original_eval(root: Path, batch_size: int, workers: int) -> Batches:
    images = ImageFolder(str(root / "val"), eval_transform(SIZE, True, "bicubic"))
    return of_dataloader(DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers))


@contextmanager
def timm_train(root: Path, batch_size: int, workers: int) -> Iterator[Iterator[object]]:
    """timm's loader with its prefetcher: uint8 batches, normalised and erased as a whole, here on the CPU."""
    images = ImageDataset(str(root / "train"))
    loader = create_loader(
        images, (3, SIZE, SIZE), batch_size, is_training=True, use_prefetcher=True, re_prob=ERASING, re_mode="pixel",
        color_jitter=0.4, auto_augment=POLICY, interpolation="bicubic", mean=MEAN, std=STD, num_workers=workers,
        pin_memory=False, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    inner = loader.loader
    loader.loader = DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers,
                               collate_fn=inner.collate_fn)  # fmt: skip
    with of_dataloader(loader.loader) as batches:
        loader.loader = batches
        yield iter(loader)


class TensorImages(torch.utils.data.Dataset):
    """torchvision's second way: decoded to tensors, v2 transforms."""

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
    return of_dataloader(DataLoader(images, batch_size, sampler=InfiniteSampler(len(images)), num_workers=workers))


def own_config(root: Path, batch_size: int, workers: int, backend: str, *opts: object):
    words = ["DATA.DATA_PATH", str(root), "DATA.BATCH_SIZE", batch_size, "DATA.NUM_WORKERS", workers]
    words += ["DATA.BACKEND", backend, "MODEL.NUM_CLASSES", 0, "AUG.MIXUP", 0.0, "AUG.CUTMIX", 0.0]
    return get_config(None, [*words, *opts])


def own_train(root: Path, backend: str, *opts: object) -> Opening:
    """This project's: the part of it that works on the CPU in any case."""

    def opened(batch_size: int, workers: int) -> Batches:
        config = own_config(root, batch_size, workers, backend, *opts)
        data = build_datasets(config, PROCESS)
        return TrainBatches(config, data, PROCESS, 0, ENDLESS * batch_size).loader.started()

    return opened


class Repeated:
    """Images again and again."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return 1000 * len(self.images)

    def path(self, i: int) -> str:
        return self.images.path(i % len(self.images))

    def read(self, i: int) -> tuple[object, int]:
        return self.images.read(i % len(self.images))


def own_eval(root: Path, backend: str) -> Opening:
    @contextmanager
    def opened(batch_size: int, workers: int) -> Iterator[Iterator[object]]:
        config = own_config(root, batch_size, workers, backend)
        data = build_datasets(config, PROCESS)
        with val_batches(config, replace(data, val=Repeated(data.val)), PROCESS).loader.started() as batches:
            yield batches

    return opened


@dataclass
class Running:
    """A pipeline with one worker, which rests whenever enough batches are ready."""

    name: str
    batches: Iterator[object]
    worker: int  # process id
    costs: list[float] = field(default_factory=list)  # seconds of processor time for an image, in each turn

    def cpu_seconds_used(self) -> float:
        """Waits until the worker has nothing to do. Returns the processor time used so far, this process's included."""
        before = -1.0
        while before != (now := cpu_seconds(self.worker)) or not self.sleeps():
            before = now
            time.sleep(0.05)
        return now

    def sleeps(self) -> bool:
        return Path(f"/proc/{self.worker}/stat").read_text().rpartition(") ")[2].startswith("S")

    def turn(self, batches: int, batch_size: int) -> None:
        """Takes `batches` and lets the worker make as many new ones."""
        begun_here, begun_there = time.process_time(), self.cpu_seconds_used()
        for _ in range(batches):
            next(self.batches)
        used = time.process_time() - begun_here + self.cpu_seconds_used() - begun_there
        self.costs.append(used / (batches * batch_size))


def compare(pipelines: dict[str, Opening], batch_size: int, batches: int, rounds: int) -> dict[str, list[float]]:
    """Images per second of processor time of each of `pipelines`, in each of `rounds` rounds of turns."""
    with ExitStack() as stack:
        running = []
        for name, opening in pipelines.items():
            before = {child.pid for child in multiprocessing.active_children()}
            iterator = stack.enter_context(opening(batch_size, 1))
            next(iterator)
            (worker,) = {child.pid for child in multiprocessing.active_children()} - before
            running.append(Running(name, iterator, worker))
            running[-1].turn(1, batch_size)
            running[-1].costs.clear()
        for number in range(rounds):
            for each in running[:: -1 if number % 2 else 1]:
                each.turn(batches, batch_size)
            log.info("round %d/%d", number + 1, rounds)
    return {each.name: [1 / cost for cost in each.costs] for each in running}


def same_evaluation(root: Path) -> tuple[int, int]:
    """How many validation images the native backend prepares to the very bits of the original's, of how many."""
    images = ImageFolder(str(root / "val"), eval_transform(SIZE, True, "bicubic"))
    config = own_config(root, 1, 0, "native")
    batches = val_batches(config, build_datasets(config, PROCESS), PROCESS)
    same = sum(torch.equal(batch["image"][0], images[i][0]) for i, batch in enumerate(batches))
    return same, len(images)
