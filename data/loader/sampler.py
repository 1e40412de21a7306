"""The order of the images: one endless stream, a pure function of (seed, images seen).

Stream position s is place s mod N of epoch s // N, and each epoch has its own permutation. The ranks take turns at
micro-batches, so the world size changes which rank computes a sample, and not which samples a step sees.
"""

from collections.abc import Iterator

import numpy as np

from utils.seed import derive


def epoch_permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of `n` images in `epoch`, (n,) int64; depends on (n, seed, epoch) alone."""
    # numpy guarantees the streams of the legacy generator for all versions; its newer ones and torch's may change.
    key = derive(seed, "order", epoch)
    return np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(n)


class StreamSampler:
    """Batch sampler: for each micro-batch of this rank a list of keys (epoch, index).

    `rank` takes every `world_size`-th micro-batch of `batch_size` samples, starting with the `rank`-th, from stream
    position `start` to `stop` (in samples, at any place of an epoch). Gradient accumulation needs nothing more: a step
    is that many micro-batches of every rank.
    """

    def __init__(self, n: int, seed: int, batch_size: int, rank: int, world_size: int, start: int, stop: int):
        """Raises ValueError when start to stop is not a whole number of micro-batches of every rank."""
        if start > stop or (stop - start) % (batch_size * world_size):
            raise ValueError(f"{start} to {stop} is not a multiple of {world_size} × {batch_size} samples")
        self.n = n
        self.seed = seed
        self.batch_size = batch_size
        self.positions = range(start + rank * batch_size, stop, world_size * batch_size)

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, np.int64)  # one epoch's permutation at a time
        for position in self.positions:
            keys = []
            for s in range(position, position + self.batch_size):
                if s // self.n != epoch:
                    epoch = s // self.n
                    order = epoch_permutation(self.n, self.seed, epoch)
                keys.append((epoch, int(order[s % self.n])))
            yield keys


def eval_indices(n: int, rank: int, world_size: int) -> np.ndarray:
    """The images that `rank` evaluates: over all ranks each of the `n` once, without padding."""
    return np.arange(rank, n, world_size)
