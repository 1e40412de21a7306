"""Batches in memory that the worker processes share with the main process: workers write, the main process reads.

DataLoader's own transfer allocates new shared memory for each batch, whose pages the kernel clears and maps one by one,
in the worker and again in the reader; that took longer than decoding (docs/reports/LOADER.md). Here a few buffers are
mapped once and reused in turn. The memory is anonymous, so it needs no space in /dev/shm; workers inherit it by fork.

B samples of a micro-batch, n ≤ B of them good.
"""

import logging
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.compat import clear_cuda_error

log = logging.getLogger(__name__)

# Batches that each worker prepares ahead.
PREFETCH_FACTOR = 2

# Shape and dtype of one sample's arrays, by name.
ArraySpecs = Mapping[str, tuple[Sequence[int], torch.dtype]]

# The targets of a batch's good samples (the list may be empty) as the task wants them.
CollateTargets = Callable[[list], object]


class Sample(NamedTuple):
    """One sample.

    arrays: tensors of a fixed shape by name, such as {'image': (3, S, S)}; None when the sample is bad.
    target: anything picklable that is not among the arrays; for classification the label.
    bad: "path: reason" of each bad image that was met.
    aug_params: parameters of the augmentation that is still to be done on the device, None when there is none.
    """

    arrays: dict[str, Tensor] | None
    target: object
    bad: list[str]
    aug_params: np.ndarray | None = None


class SampleFn(Dataset[Sample]):
    """Makes samples by key, one of those in BatchKeys."""

    def make(self, key: Any, out: dict[str, Tensor] | None) -> Sample:
        """The sample of `key`. `out` is memory for its arrays, which may be used to save a copy; None for none."""
        raise NotImplementedError


class BatchKeys(Sized, Protocol):
    """The keys of each batch, in order."""

    def __iter__(self) -> Iterator[list]: ...


class SharedBatchBuffers:
    """Shared memory for `count` batches of up to `batch_size` samples.

    Attributes:
        arrays: (count, B, *shape) by name.
    """

    def __init__(self, count: int, batch_size: int, specs: ArraySpecs):
        self.count = count
        self.arrays: dict[str, Tensor] = {}
        for name, (shape, dtype) in specs.items():
            memory = mmap.mmap(-1, count * batch_size * math.prod(shape) * dtype.itemsize)
            self.arrays[name] = torch.frombuffer(memory, dtype=dtype).view(count, batch_size, *shape)

    def __len__(self) -> int:
        return self.count

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Pins the memory inside the block, so that copies to a GPU are asynchronous."""
        with ExitStack() as stack:
            for array in self.arrays.values():
                stack.enter_context(_pinned(array))
            yield


@contextmanager
def _pinned(array: Tensor) -> Iterator[None]:
    """Pins the memory of `array`, or logs that CUDA refuses and leaves it pageable."""
    runtime, address = torch.cuda.cudart(), array.data_ptr()
    size = array.numel() * array.element_size()
    error = int(runtime.cudaHostRegister(address, size, 0))
    if error:
        clear_cuda_error()
        log.warning(
            "%.1f GiB of memory for batches cannot be pinned (CUDA error %d), so copying them to the GPU takes "
            "longer. Fewer DATA.NUM_WORKERS need less",
            size / 2**30,
            error,
        )
    try:
        yield
    finally:
        if not error:
            runtime.cudaHostUnregister(address)


class BufferedBatchSampler:
    """Batch sampler: each batch of `keys` preceded by the number of the buffer that it is written to."""

    def __init__(self, keys: BatchKeys, buffers: int):
        self.keys = keys
        self.buffers = buffers

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[list]:
        for number, keys in enumerate(self.keys):
            yield [number % self.buffers, *keys]


class BufferedDataset(Dataset[dict]):
    """Makes whole batches in a worker: arrays are written to their buffer, everything else is sent."""

    def __init__(self, samples: SampleFn, buffers: SharedBatchBuffers):
        self.samples = samples
        self.buffers = buffers

    def __getitems__(self, buffer_and_keys: list) -> dict:
        """{'buffer', 'target' and 'aug_params' of the good samples in it, 'bad': list of "path: reason"}."""
        buffer, *keys = buffer_and_keys
        targets: list[object] = []
        bad: list[str] = []
        aug_params: list[np.ndarray | None] = []
        for key in keys:
            out = {name: array[buffer, len(targets)] for name, array in self.buffers.arrays.items()}
            sample = self.samples.make(key, out)
            bad += sample.bad
            if sample.arrays is None:
                continue
            for name, memory in out.items():
                if sample.arrays[name].data_ptr() != memory.data_ptr():
                    memory.copy_(sample.arrays[name])
            targets.append(sample.target)
            aug_params.append(sample.aug_params)
        return {"buffer": buffer, "target": targets, "aug_params": aug_params, "bad": bad}


def unpack_batch(batch: dict, buffers: SharedBatchBuffers, collate_targets: CollateTargets) -> dict:
    """The batch of `BufferedDataset` as `to_batch` gives it; its arrays stay in their buffer."""
    n = len(batch["target"])
    arrays = {name: array[batch["buffer"], :n] for name, array in buffers.arrays.items()}
    return to_batch(arrays, batch["target"], batch["bad"], batch["aug_params"], collate_targets)


def to_batch(
    arrays: dict[str, Tensor],
    targets: list,
    bad: list[str],
    aug_params: list[np.ndarray | None],
    collate_targets: CollateTargets,
) -> dict:
    """{every array (n, *shape) by name, 'target', 'bad', 'aug_params': (n, …) float64, None when there are none}.

    An array named 'target' is the target; otherwise that is what `collate_targets` makes of the samples' targets.
    """
    given = [params for params in aug_params if params is not None]
    stacked = torch.from_numpy(np.stack(given)) if given else None
    target = {} if "target" in arrays else {"target": collate_targets(targets)}
    return arrays | target | {"bad": bad, "aug_params": stacked}


def labels_to_tensor(labels: list[int]) -> Tensor:
    """(n,) int64."""
    return torch.tensor(labels, dtype=torch.int64)
