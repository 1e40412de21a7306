"""Batches in memory that worker processes share with the process that trains: written there, read here, never sent.

DataLoader's own way gives each batch new shared memory, whose pages the system clears and maps one by one, for the
worker and again for the reader; that took longer than decoding (docs/LOADER.md). Here a few slots are mapped once and
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
AHEAD = 2


class Slots:
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
            log.warning("%.1f GiB of memory for batches cannot be locked (CUDA error %d), so copying them to the GPU "
                        "takes longer. Fewer DATA.NUM_WORKERS need less", size / 2**30, refused)
        try:
            yield
        finally:
            if not refused:
                runtime.cudaHostUnregister(address)


class Makes(Protocol):
    """What makes samples (see data.loader.Sample) by key, in the memory that it is given or elsewhere."""

    def make(self, key: object, out: Tensor): ...


class SlotKeys:
    """Batch sampler: each batch of `keys` behind the number of the slot that it goes into."""

    def __init__(self, keys: Iterable[Sequence], slots: int):
        self.keys = keys
        self.slots = slots

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[list]:
        for number, keys in enumerate(self.keys):
            yield [number % self.slots, *keys]


class SlotSamples:
    """Makes whole batches, in a worker: images into their slot; the rest is sent."""

    def __init__(self, samples: Makes, slots: Slots):
        self.samples = samples
        self.slots = slots

    def __getitems__(self, slot_and_keys: list) -> dict:
        """{'slot', 'target' and 'draws' of the images in it, 'bad': list of "path: reason"}."""
        slot, *keys = slot_and_keys
        into = self.slots.images[slot]
        labels: list[int] = []
        bad: list[str] = []
        draws: list[np.ndarray | None] = []
        for key in keys:
            out = into[len(labels)]
            sample = self.samples.make(key, out)
            bad += sample.bad
            if sample.image is not None:
                if sample.image.data_ptr() != out.data_ptr():
                    out.copy_(sample.image)
                labels.append(sample.label)
                draws.append(sample.draws)
        return {"slot": slot, "target": labels, "draws": draws, "bad": bad}


def received(batch: dict, slots: Slots) -> dict:
    """What a worker sent as a batch: {'image': (n ≤ B, *shape) in its slot, or None, 'target': (n,) int64, 'bad'}."""
    target = torch.tensor(batch["target"], dtype=torch.int64)
    image: Tensor | None = slots.images[batch["slot"]][: len(target)] if len(target) else None
    return {"image": image, "target": target, "draws": stacked(batch["draws"]), "bad": batch["bad"]}


def stacked(draws: list[np.ndarray | None]) -> Tensor | None:
    """(n, …) of n samples' draws, None where there are none to be sent on."""
    return torch.from_numpy(np.stack(draws)) if draws and draws[0] is not None else None
