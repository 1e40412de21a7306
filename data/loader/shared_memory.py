"""Batches in memory that worker processes share with the process that trains: written there, read here, never sent.

DataLoader's own way gives each batch new shared memory, whose pages the system clears and maps one by one, for the
worker and again for the reader; that took longer than decoding (docs/reports/LOADER.md). Here a few slots are mapped once and
take turns. The memory is anonymous, so it needs no room in /dev/shm; workers see it because they are forked.

B images of a micro-batch, (C, H, W) an image.
"""

import logging
import math
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

# Batches that each worker has begun or finished before they are asked for.
PREFETCH_FACTOR = 2


class SharedBatchBuffers:
    """`count` batches of `batch_size` images of one shape.

    Attributes:
        images: (count, B, *shape).
    """

    def __init__(self, count: int, batch_size: int, shape: Sequence[int], dtype: torch.dtype):
        values = count * batch_size * math.prod(shape)
        self._memory = mmap.mmap(-1, values * dtype.itemsize)
        self.images = torch.frombuffer(self._memory, dtype=dtype).view(count, batch_size, *shape)

    def __len__(self) -> int:
        return len(self.images)

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Locks the pages meanwhile, so that a GPU copies from them without holding up this process. Where that is
        refused, copies take longer."""
        runtime, address = torch.cuda.cudart(), self.images.data_ptr()
        size = self.images.numel() * self.images.element_size()
        refused = int(runtime.cudaHostRegister(address, size, 0))
        if refused:
            log.warning(
                "%.1f GiB of memory for batches cannot be locked (CUDA error %d), so copying them to the GPU "
                "takes longer. Fewer DATA.NUM_WORKERS need less",
                size / 2**30,
                refused,
            )
        try:
            yield
        finally:
            if not refused:
                runtime.cudaHostUnregister(address)


class SampleFn(Protocol):
    """What makes samples (see data.loader.loader.Sample) by key, in the memory that it is given or elsewhere."""

    def make(self, key: object, out: Tensor): ...


class BufferedBatchSampler:
    """Batch sampler: each batch of `keys` behind the number of the slot that it goes into."""

    def __init__(self, keys: Iterable[Sequence], buffers: int):
        self.keys = keys
        self.buffers = buffers

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[list]:
        for number, keys in enumerate(self.keys):
            yield [number % self.buffers, *keys]


class BufferedDataset:
    """Makes whole batches, in a worker: images into their slot; the rest is sent."""

    def __init__(self, samples: SampleFn, buffers: SharedBatchBuffers):
        self.samples = samples
        self.buffers = buffers

    def __getitems__(self, slot_and_keys: list) -> dict:
        """{'slot', 'target' and 'draws' of the images in it, 'bad': list of "path: reason"}."""
        slot, *keys = slot_and_keys
        into = self.buffers.images[slot]
        labels: list[int] = []
        bad: list[str] = []
        aug_params: list[np.ndarray | None] = []
        for key in keys:
            out = into[len(labels)]
            sample = self.samples.make(key, out)
            bad += sample.bad
            if sample.image is not None:
                if sample.image.data_ptr() != out.data_ptr():
                    out.copy_(sample.image)
                labels.append(sample.label)
                aug_params.append(sample.aug_params)
        return {"slot": slot, "target": labels, "draws": aug_params, "bad": bad}


def unpack_batch(batch: dict, buffers: SharedBatchBuffers) -> dict:
    """What a worker sent as a batch: {'image': (n ≤ B, *shape) in its slot, or None, 'target': (n,) int64, 'bad'}."""
    target = torch.tensor(batch["target"], dtype=torch.int64)
    image: Tensor | None = buffers.images[batch["slot"]][: len(target)] if len(target) else None
    return {"image": image, "target": target, "draws": stack_params(batch["draws"]), "bad": batch["bad"]}


def stack_params(aug_params: list[np.ndarray | None]) -> Tensor | None:
    """(n, …) of n samples' draws, None where there are none to be sent on."""
    return torch.from_numpy(np.stack(aug_params)) if aug_params and aug_params[0] is not None else None
