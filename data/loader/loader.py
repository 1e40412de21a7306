"""From an image's number to batches: worker processes, and what happens to images that cannot be used.

B images of a micro-batch, S their size.
"""

import logging
import random
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from data.codecs.pillow_decode import BadImage
from data.datasets.base import Images
from data.loader.sampler import StreamSampler
from data.loader.shared_memory import (
    PREFETCH_FACTOR,
    BufferedBatchSampler,
    BufferedDataset,
    SharedBatchBuffers,
    stack_params,
    unpack_batch,
)
from data.transforms.native_transforms import Prepare
from utils.errors import UserError
from utils.seed import derive, seed_cpu

log = logging.getLogger(__name__)

_ANSWERED_BY_MAIN = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")


class Sample(NamedTuple):
    """image: (3, S, S), None where there was none to be had; bad: "path: reason" of what was met on the way.

    For the backend device the image is (S, S, 3) uint8, and `draws` says what is still to be done to it.
    """

    image: Tensor | None
    label: int
    bad: list[str]
    aug_params: np.ndarray | None = None


class TrainSamples(Dataset):
    """Augmented samples by key (epoch, index): a pure function of (seed, key), whoever computes it."""

    def __init__(self, images: Images, prepare: Prepare, seed: int, max_bad: int):
        self.images = images
        self.prepare = prepare
        self.seed = seed
        self.max_bad = max_bad

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.make(key, None)

    def make(self, key: tuple[int, int], out: Tensor | None) -> Sample:
        """Image `index`, or where it is bad the next good one with its own label, passing over `max_bad` at most.

        Args:
            out: memory that may be used for the image, to save copying it there.
        """
        epoch, index = key
        bad: list[str] = []
        for step in range(min(self.max_bad + 1, len(self.images))):
            i = (index + step) % len(self.images)
            try:
                source, label = self.images.read(i)
                with _seeded(derive(self.seed, "augment", epoch, index)):
                    made = self.prepare(source, self.images.path(i), out)
                image, aug_params = made if isinstance(made, tuple) else (made, None)
                return Sample(image, label, bad, aug_params)
            except BadImage as error:
                bad.append(str(error))
        return Sample(None, -1, bad)


class EvalSamples(Dataset):
    """Samples by number, without any draw; a bad image is left out."""

    def __init__(self, images: Images, prepare: Prepare):
        self.images = images
        self.prepare = prepare

    def __getitem__(self, i: int) -> Sample:
        return self.make(i, None)

    def make(self, i: int, out: Tensor | None) -> Sample:
        """`out`: as for TrainSamples."""
        try:
            source, label = self.images.read(int(i))
            return Sample(self.prepare(source, self.images.path(int(i)), out), label, [])
        except BadImage as error:
            return Sample(None, -1, [str(error)])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
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
    """{'image': (B, 3, S, S) or None, 'target': (B,) int64, 'draws': (B, …) float64 or None} of the good samples, and
    'bad': list of "path: reason"."""
    good = [sample for sample in samples if sample.image is not None]
    return {
        "draws": stack_params([sample.aug_params for sample in good]),
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


class BatchLoader:
    """Batches of `samples` by worker processes, in the order of `keys`; with 0 workers by this process.

    Workers write images into slots (data/loader/shared_memory.py), and a slot is written again while the batch after the next one is
    asked for. So a batch must be used up, or copied by `to_device`, before that.
    """

    def __init__(
        self,
        samples: Dataset,
        keys: Sequence[list] | StreamSampler,
        num_workers: int,
        device: torch.device,
        pin_memory: bool,
        batch_size: int,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
    ):
        """`shape` and `dtype` are those of one sample's image."""
        self._samples = samples
        self._keys = keys
        self._num_workers = num_workers
        self._device = device
        self._pin_memory = pin_memory
        self._new_slots = partial(SharedBatchBuffers, PREFETCH_FACTOR * num_workers + 2, batch_size, shape, dtype)
        self._copies: dict[int, torch.cuda.Event] = {}  # by number of the batch: when its copy to the GPU is over
        self._number = 0  # of the batch that was given last

    def __len__(self) -> int:
        return len(self._keys)

    @contextmanager
    def started(self) -> Iterator[Iterator[dict]]:
        """Gives an iterator of batches as `collate` makes them. Workers and slots go when the block is left, whichever
        way.

        Without this an iterator that an exception's traceback keeps alive may be left to the garbage collector, which
        closes its queues before telling the workers to stop: torch then waits five seconds for each of them.
        """
        if not self._num_workers:
            yield iter(self._data_loader(self._samples, self._keys, collate_fn=collate))
            return
        buffers = self._new_slots()
        with buffers.pinned() if self._pin_memory else nullcontext():
            data_loader = self._data_loader(
                BufferedDataset(self._samples, buffers),
                BufferedBatchSampler(self._keys, len(buffers)),
                collate_fn=_as_it_is,
                num_workers=self._num_workers,
                multiprocessing_context="fork",
                prefetch_factor=PREFETCH_FACTOR,
                worker_init_fn=_start_worker,
            )
            # A signal that reached a worker before `_start_worker` would end it, and read like a worker that died by
            # itself.
            found = signal.pthread_sigmask(signal.SIG_BLOCK, _ANSWERED_BY_MAIN)
            try:
                batches = iter(data_loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, found)
            try:
                yield self._received(batches, buffers)
            finally:
                batches._shutdown_workers()  # torch has no public name for it
                self._wait_for_copies(self._number)

    def _data_loader(self, samples: Dataset, keys: Sequence[list], **options: Any) -> DataLoader:
        # Without a generator of its own it takes a number from torch's global one at each start.
        return DataLoader(samples, batch_sampler=keys, generator=torch.Generator(), **options)

    def _received(self, batches: Iterator[dict], buffers: SharedBatchBuffers) -> Iterator[dict]:
        for number in range(len(self._keys)):
            self._number = number
            self._wait_for_copies(number - 2)  # asking for this batch hands out that one's slot again
            yield unpack_batch(next(batches), buffers)

    def _wait_for_copies(self, last: int) -> None:
        for number in [number for number in self._copies if number <= last]:
            self._copies.pop(number).synchronize()

    def to_device(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Image and target of the batch that was given last, on the device and in memory of their own."""
        image = batch["image"].to(self._device, non_blocking=True, copy=self._num_workers > 0)
        if self._num_workers and self._device.type == "cuda":
            self._copies[self._number] = torch.cuda.current_stream(self._device).record_event()
        return image, batch["target"].to(self._device, non_blocking=True)


def _as_it_is(batch: dict) -> dict:
    return batch


def _start_worker(worker: int) -> None:
    """Signals go to the whole process group; the main process alone answers them, and then ends its workers.

    (DataLoader sets one torch thread.)
    """
    for number in _ANSWERED_BY_MAIN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ANSWERED_BY_MAIN)


@contextmanager
def explain_worker_crash(num_workers: int) -> Iterator[None]:
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
