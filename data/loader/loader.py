"""From the keys of samples to batches: worker processes, and what happens to images that cannot be used.

B samples of a micro-batch, S the size of an image.
"""

import itertools
import logging
import math
import multiprocessing
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.codecs.crop_decode import Source
from data.codecs.pillow_decode import BadImage, upright
from data.datasets.base import Images
from data.loader.shared_memory import (
    PREFETCH_FACTOR,
    ArraySpecs,
    BatchKeys,
    BufferedBatchSampler,
    BufferedDataset,
    CollateTargets,
    Sample,
    SampleFn,
    SharedBatchBuffers,
    labels_to_tensor,
    to_batch,
    unpack_batch,
)
from data.transforms.native_transforms import Prepare
from utils.compat import shut_down_workers, tree_leaves
from utils.errors import UserError
from utils.orphans import end_with_parent
from utils.seed import derive, seed_cpu

log = logging.getLogger(__name__)

_MAIN_PROCESS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_WORKER_DIED = re.compile(r"DataLoader worker \(pid")

# An encoded image, its target, its name for messages, and memory for the arrays or None → the sample. Raises BadImage.
PrepareSample = Callable[[Source, object, str, dict[str, Tensor] | None], Sample]


class LabelledImage:
    """PrepareSample for classification: {'image': (3, S, S) float32}, and the label as target.

    With the backend gpu the image is (S, S, 3) uint8, and `aug_params` says how to augment it there.
    `exif_orientation`: whether images are first turned as their EXIF orientation says; before, so that all backends do.
    """

    def __init__(self, prepare: Prepare, exif_orientation: bool = False):
        self.prepare = prepare
        self.exif_orientation = exif_orientation

    def __call__(self, source: Source, label: object, path: str, out: dict[str, Tensor] | None) -> Sample:
        if self.exif_orientation:
            source = upright(source, path)
        prepared = self.prepare(source, path, None if out is None else out["image"])
        image, aug_params = prepared if isinstance(prepared, tuple) else (prepared, None)
        return Sample({"image": image}, label, [], aug_params)


class TrainSamples(SampleFn):
    """Augmented samples by key (epoch, index). A sample is a pure function of (seed, key), in any process."""

    def __init__(self, images: Images, prepare: PrepareSample, seed: int, max_bad: int):
        self.images = images
        self.prepare = prepare
        self.seed = seed
        self.max_bad = max_bad

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        return self.make(key, None)

    def make(self, key: tuple[int, int], out: dict[str, Tensor] | None) -> Sample:
        """Image `index`; if it is bad, the next good one with its own target, skipping at most `max_bad`."""
        epoch, index = key
        bad: list[str] = []
        for step in range(min(self.max_bad + 1, len(self.images))):
            i = (index + step) % len(self.images)
            try:
                source, target = self.images.read(i)
                with _seeded(derive(self.seed, "augment", epoch, index)):
                    sample = self.prepare(source, target, self.images.path(i), out)
                return sample._replace(bad=bad)
            except BadImage as error:
                bad.append(str(error))
        return Sample(None, None, bad)


class EvalSamples(SampleFn):
    """Samples by index, without randomness; a bad image gives a sample without arrays."""

    def __init__(self, images: Images, prepare: PrepareSample):
        self.images = images
        self.prepare = prepare

    def __getitem__(self, i: int) -> Sample:
        return self.make(i, None)

    def make(self, i: int, out: dict[str, Tensor] | None) -> Sample:
        try:
            source, target = self.images.read(int(i))
            return self.prepare(source, target, self.images.path(int(i)), out)
        except BadImage as error:
            return Sample(None, None, [str(error)])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seeds the generators that transforms use. In the main process their state is restored afterwards."""
    if get_worker_info() is not None:
        seed_cpu(seed)
        yield
        return
    saved = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed_cpu(seed)
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.set_rng_state(saved[2])


class BadImageCount:
    """Counts the different bad images that one process met, against DATA.MAX_BAD_IMAGES."""

    def __init__(self, limit: int, consequence: str):
        """`consequence`: what the log says happens to such an image."""
        self.limit = limit
        self.consequence = consequence
        self.seen: set[str] = set()

    def add(self, bad: list[str]) -> None:
        """Counts and logs the new ones of `bad`. Raises UserError when there are more than allowed."""
        for line in bad:
            if line in self.seen:
                continue
            self.seen.add(line)
            if len(self.seen) > self.limit:
                raise UserError(
                    f"{line}. That is bad image {len(self.seen)}, and DATA.MAX_BAD_IMAGES allows {self.limit}. Repair "
                    f"or remove it, or allow more: --opts DATA.MAX_BAD_IMAGES {max(10, 2 * self.limit)}"
                )
            log.warning("bad image %s: %s", self.consequence, line)


class BatchLoader:
    """Makes batches of `samples` in worker processes, in the order of `keys`; with 0 workers in this process.

    A batch is a dict (see data.loader.shared_memory.to_batch). Workers write its arrays into shared buffers: batch n is
    valid until batch n + 2 is requested. Use it before, or copy it with `to_device`.
    """

    def __init__(
        self,
        samples: SampleFn,
        keys: BatchKeys,
        num_workers: int,
        device: torch.device,
        pin_memory: bool,
        batch_size: int,
        specs: ArraySpecs,
        collate_targets: CollateTargets = labels_to_tensor,
    ):
        """`specs` describes the arrays of one sample."""
        self._samples = samples
        self._keys = keys
        self._num_workers = num_workers
        self._device = device
        self._pin_memory = pin_memory
        self._batch_size = batch_size
        self._specs = specs
        self._collate_targets = collate_targets
        # Copies wait for no training step in a stream of their own, and run at the same time as one.
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copies: dict[int, torch.cuda.Event] = {}  # by batch number; recorded after the batch's copy to the GPU
        self._number = 0  # of the last batch

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def buffer_bytes(self) -> int:
        """The size of the memory that is shared with the workers."""
        sample = sum(math.prod(shape) * dtype.itemsize for shape, dtype in self._specs.values())
        return self._num_buffers * self._batch_size * sample

    @property
    def _num_buffers(self) -> int:
        """Batches that workers prepare ahead, the last batch, and the one before it, which may still be copied."""
        return PREFETCH_FACTOR * self._num_workers + 2 if self._num_workers else 0

    @contextmanager
    def started(self) -> Iterator[Iterator[dict]]:
        """Gives an iterator over one pass of batches. Workers and buffers are released at the end of the block."""
        with self.reusable(keep_workers=False) as passes:
            yield next(passes)

    @contextmanager
    def reusable(self, keep_workers: bool = True) -> Iterator[Iterator[Iterator[dict]]]:
        """Gives an endless iterator of passes, each an iterator of batches, by the same workers and buffers.

        Workers and buffers are released at the end of the block, also by an exception. Without this, an iterator that
        an exception's traceback keeps alive may be left to the garbage collector, which closes its queues before it
        tells the workers to stop: torch then waits five seconds for each of them.
        """
        if not self._num_workers:
            data_loader = self._data_loader(self._samples, self._keys, collate_fn=self._collate)
            yield (iter(data_loader) for _ in itertools.count())
            return
        buffers = SharedBatchBuffers(self._num_buffers, self._batch_size, self._specs)
        with buffers.pinned() if self._pin_memory else nullcontext():
            data_loader = self._data_loader(
                BufferedDataset(self._samples, buffers),
                BufferedBatchSampler(self._keys, len(buffers)),
                collate_fn=_identity,
                num_workers=self._num_workers,
                multiprocessing_context="fork",
                prefetch_factor=PREFETCH_FACTOR,
                worker_init_fn=_start_worker,
                persistent_workers=keep_workers,
            )
            started: list[Iterator[dict]] = []

            def one_pass() -> Iterator[dict]:
                self._wait_for_copies(self._number)  # the workers write the first buffers again
                before = set(multiprocessing.active_children())
                # A signal that reached a worker before `_start_worker` would kill it, as if it had crashed.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, _MAIN_PROCESS_SIGNALS)
                try:
                    batches = iter(data_loader)
                except BaseException:  # such as too many processes: those before it wait for a first batch
                    for child in set(multiprocessing.active_children()) - before:
                        child.kill()
                    raise
                finally:
                    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                started[:] = [batches]
                return self._unpacked(batches, buffers)

            try:
                yield (one_pass() for _ in itertools.count())
            finally:
                for batches in started:
                    shut_down_workers(batches)
                self._wait_for_copies(self._number)

    def _data_loader(self, dataset: Dataset, keys: BatchKeys, **options: Any) -> DataLoader:
        # Without a generator of its own, DataLoader draws from torch's global one at each start.
        return DataLoader(dataset, batch_sampler=keys, generator=torch.Generator(), **options)

    def _collate(self, samples: list[Sample]) -> dict:
        good = [sample for sample in samples if sample.arrays is not None]
        made = [sample.arrays for sample in samples if sample.arrays is not None]
        arrays = {
            name: torch.stack([each[name] for each in made]) if made else torch.empty(0, *shape, dtype=dtype)
            for name, (shape, dtype) in self._specs.items()
        }
        bad = [line for sample in samples for line in sample.bad]
        return to_batch(arrays, [s.target for s in good], bad, [s.aug_params for s in good], self._collate_targets)

    def _unpacked(self, batches: Iterator[dict], buffers: SharedBatchBuffers) -> Iterator[dict]:
        for number in range(len(self._keys)):
            self._number = number
            self._wait_for_copies(number - 2)  # fetching this batch lets a worker write that batch's buffer
            yield unpack_batch(next(batches), buffers, self._collate_targets)

    def _wait_for_copies(self, last: int) -> None:
        for number in [number for number in self._copies if number <= last]:
            self._copies.pop(number).synchronize()

    def to_device(self, batch: dict) -> dict:
        """The last batch with its arrays and target on the device, in memory of their own.

        `aug_params` stays on the host: the augmentation reads it there.
        """
        with torch.cuda.stream(self._copy_stream):  # does nothing without a stream
            arrays = {
                name: batch[name].to(self._device, non_blocking=True, copy=self._num_workers > 0)
                for name in self._specs
            }
            copied = batch | {"target": _to_device(batch["target"], self._device)} | arrays
        if self._copy_stream is not None:
            done = self._copy_stream.record_event()
            if self._num_workers:
                self._copies[self._number] = done
            compute_stream = torch.cuda.current_stream(self._device)
            compute_stream.wait_event(done)
            for tensor in tree_leaves([copied["target"], arrays]):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(compute_stream)  # keeps the memory until the step that uses it is over
        return copied


def _to_device(value: object, device: torch.device) -> object:
    """`value` with the tensors in it, at any depth of dicts and lists, on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to_device(item, device) for key, item in value.items()}
    return [_to_device(item, device) for item in value] if isinstance(value, list) else value


def _identity(batch: dict) -> dict:
    return batch


def _start_worker(worker: int) -> None:
    """Leaves signals to the main process: they reach the whole process group, and the workers end with that process.

    (DataLoader sets one torch thread.)
    """
    for number in _MAIN_PROCESS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _MAIN_PROCESS_SIGNALS)
    end_with_parent()


@contextmanager
def explain_worker_crash(num_workers: int) -> Iterator[None]:
    """Turns DataLoader's error about a dead worker into a UserError with a way out.

    The error is raised by a signal handler, so it can occur anywhere in the main process, also outside `next()`:
    put the whole loop over batches into this.
    """
    try:
        yield
    except RuntimeError as error:
        if not _WORKER_DIED.search(str(error)):
            raise
        raise UserError(
            f"{str(error).splitlines()[0]} One of DATA.NUM_WORKERS ({num_workers}) worker processes died, most often "
            "because memory or space in /dev/shm ran out. Start again to continue; if it happens again, use fewer: "
            f"--opts DATA.NUM_WORKERS {num_workers // 2}"
        ) from error
