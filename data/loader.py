"""From an image's number to batches: worker processes, and what happens to images that cannot be used.

B images of a micro-batch, S their size.
"""

import logging
import random
import re
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from data.datasets import Images
from data.decode import BadImage, decode
from data.transforms import Transform
from utils.errors import UserError
from utils.seed import derive, seed_cpu

log = logging.getLogger(__name__)

_ANSWERED_BY_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")


class Sample(NamedTuple):
    """image: (3, S, S), None where there was none to be had; bad: "path: reason" of what was met on the way."""

    image: Tensor | None
    label: int
    bad: list[str]


class TrainSamples(Dataset):
    """Augmented samples by key (epoch, index): a pure function of (seed, key), whoever computes it."""

    def __init__(self, images: Images, transform: Transform, seed: int, max_bad: int):
        self.images = images
        self.transform = transform
        self.seed = seed
        self.max_bad = max_bad

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Image `index`, or where it is bad the next good one with its own label, passing over `max_bad` at most."""
        epoch, index = key
        bad: list[str] = []
        for step in range(min(self.max_bad + 1, len(self.images))):
            i = (index + step) % len(self.images)
            try:
                source, label = self.images.read(i)
                picture = decode(source, self.images.path(i))
            except BadImage as error:
                bad.append(str(error))
                continue
            with _draws_from(derive(self.seed, "augment", epoch, index)):
                return Sample(self.transform(picture), label, bad)
        return Sample(None, -1, bad)


class EvalSamples(Dataset):
    """Samples by number, without any draw; a bad image is left out."""

    def __init__(self, images: Images, transform: Transform):
        self.images = images
        self.transform = transform

    def __getitem__(self, i: int) -> Sample:
        try:
            source, label = self.images.read(int(i))
            return Sample(self.transform(decode(source, self.images.path(int(i)))), label, [])
        except BadImage as error:
            return Sample(None, -1, [str(error)])


@contextmanager
def _draws_from(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms draw from. In the main process they are left as they were found."""
    if get_worker_info() is not None:
        seed_cpu(seed)
        yield
        return
    found = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(found[0])
        np.random.set_state(found[1])
        torch.set_rng_state(found[2])


def collate(samples: list[Sample]) -> dict:
    """{'image': (B, 3, S, S) or None, 'target': (B,) int64} of the good samples, 'bad': list of "path: reason"."""
    good = [sample for sample in samples if sample.image is not None]
    return {
        "image": default_collate([sample.image for sample in good]) if good else None,
        "target": torch.tensor([sample.label for sample in good], dtype=torch.int64),
        "bad": [line for sample in samples for line in sample.bad],
    }


class BadImageCount:
    """How many different images one process could not use, against DATA.MAX_BAD_IMAGES."""

    def __init__(self, limit: int, consequence: str):
        """`consequence`: what the log says becomes of such an image."""
        self.limit = limit
        self.consequence = consequence
        self.seen: set[str] = set()

    def add(self, bad: list[str]) -> None:
        """Counts and logs those of `bad` that are new. Raises UserError when there are more than allowed."""
        for line in bad:
            if line in self.seen:
                continue
            self.seen.add(line)
            if len(self.seen) > self.limit:
                raise UserError(
                    f"{line}. That is bad image {len(self.seen)}, and DATA.MAX_BAD_IMAGES allows {self.limit}. Mend or "
                    f"remove it, or allow more: --opts DATA.MAX_BAD_IMAGES {max(10, 2 * self.limit)}"
                )
            log.warning("bad image %s: %s", self.consequence, line)


def make_loader(samples: Dataset, keys: Iterable[list], num_workers: int, pin_memory: bool) -> DataLoader:
    """A DataLoader over the batches of `keys`, in their order; with 0 workers it reads in this process."""
    return DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else it takes a number from torch's global generator at each start
    )


@contextmanager
def started(loader: DataLoader) -> Iterator[Iterator[dict]]:
    """`iter(loader)`, whose workers are stopped when the block is left, whichever way.

    Without this an iterator that an exception's traceback keeps alive may be left to the garbage collector, which
    closes its queues before telling the workers to stop: torch then waits five seconds for each of them.
    """
    # A signal that reached a worker before `_start_worker` would end it, and read like a worker that died by itself.
    found = signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_MAIN)
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, found)
    try:
        yield batches
    finally:
        if loader.num_workers:
            batches._shutdown_workers()  # torch has no public name for it


def _start_worker(worker: int) -> None:
    """Signals go to the whole process group; the main process alone answers them, and then ends its workers.

    (DataLoader sets one torch thread.)
    """
    for number in _ANSWERED_BY_MAIN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ANSWERED_BY_MAIN)


@contextmanager
def worker_death_named(num_workers: int) -> Iterator[None]:
    """Turns DataLoader's error about a dead worker into a UserError with a way out.

    The error comes from a signal handler, so it can strike anywhere in the main process, also outside `next()`:
    whoever loops over batches with workers can put the loop into this.
    """
    try:
        yield
    except RuntimeError as error:
        if not _WORKER_DIED.search(str(error)):
            raise
        raise UserError(
            f"{str(error).splitlines()[0]} One of DATA.NUM_WORKERS ({num_workers}) loading processes is gone, most "
            "often for want of memory or of space in /dev/shm. Start again to continue; if it comes back, use fewer: "
            f"--opts DATA.NUM_WORKERS {num_workers // 2}"
        ) from error
