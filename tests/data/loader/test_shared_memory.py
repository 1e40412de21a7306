"""Slots: batches in shared memory are whole when they are given, and are not written again before they are copied."""

import hashlib
import time

import numpy as np
import pytest
import torch

from data.loader.loader import BatchLoader, Sample
from data.loader.shared_memory import (
    PREFETCH_FACTOR,
    BufferedBatchSampler,
    BufferedDataset,
    SharedBatchBuffers,
    unpack_batch,
)

CPU = torch.device("cpu")
SHAPE = (3, 4, 4)


class Numbers:
    """Sample k is filled with k; those divisible by `bad` cannot be used."""

    def __init__(self, bad: int = 10**9):
        self.bad = bad

    def make(self, key: int, out: torch.Tensor | None = None) -> Sample:
        if key % self.bad == 0:
            return Sample(None, -1, [f"{key}: bad"])
        return Sample(torch.full(SHAPE, float(key)), key, [])

    def __getitem__(self, key: int) -> Sample:
        return self.make(key)


def batches_of(count: int, size: int = 3) -> list[list[int]]:
    return [list(range(1 + size * i, 1 + size * i + size)) for i in range(count)]


def loader(samples, keys, workers, device=CPU) -> BatchLoader:
    return BatchLoader(samples, keys, workers, device, False, 3, SHAPE)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_whole_and_in_order(workers):
    keys = batches_of(40)
    with loader(Numbers(), keys, workers).started() as arriving:
        for expected in keys:
            batch = next(arriving)
            assert batch["target"].tolist() == expected and batch["bad"] == []
            assert batch["image"].shape == (3, *SHAPE)
            assert batch["image"][:, 0, 0, 0].tolist() == expected and batch["image"].std((1, 2, 3)).max() == 0
        with pytest.raises(StopIteration):
            next(arriving)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_copied_stays(workers):
    """Copies of all batches are compared at the end, when every slot has been written many times."""
    keys = batches_of(30)
    made = loader(Numbers(), keys, workers)
    with made.started() as arriving:
        kept = [made.to_device(batch) for batch in arriving]
    assert [target.tolist() for _, target in kept] == keys
    assert [image[:, 0, 0, 0].tolist() for image, _ in kept] == keys


def test_a_batch_stays_until_the_one_after_the_next_is_asked_for():
    """The last and the one before it are in use, or being copied to a GPU, while workers run ahead."""
    with loader(Numbers(), batches_of(30), 2).started() as arriving:
        first = next(arriving)["image"]
        second = next(arriving)["image"]
        deadline = time.monotonic() + 0.3
        digest = hashlib.sha256(first.numpy().tobytes()).digest()
        while time.monotonic() < deadline:  # nobody asks: the workers fill all they may
            assert hashlib.sha256(first.numpy().tobytes()).digest() == digest
        assert second[:, 0, 0, 0].tolist() == [4, 5, 6]


def test_bad_images_leave_no_gap():
    keys = batches_of(20)
    with loader(Numbers(bad=2), keys, 2).started() as arriving:
        for expected, batch in zip(keys, arriving, strict=True):
            good = [key for key in expected if key % 2]
            assert batch["target"].tolist() == good and batch["image"][:, 0, 0, 0].tolist() == good
            assert batch["bad"] == [f"{key}: bad" for key in expected if key % 2 == 0]
    with loader(Numbers(bad=1), keys, 1).started() as arriving:
        assert next(arriving)["image"] is None


def test_keys_carry_slots_in_turn():
    keys = BufferedBatchSampler([[7], [8], [9]], 2)
    assert list(keys) == [[0, 7], [1, 8], [0, 9]] and len(keys) == 3


def test_slots_hold_any_kind_of_image():
    buffers = SharedBatchBuffers(3, 2, (5, 5, 3), torch.uint8)
    assert len(buffers) == 3 and buffers.images.shape == (3, 2, 5, 5, 3) and buffers.images.dtype == torch.uint8

    class Bytes:
        def make(self, key, out):
            out.fill_(key)  # in place, as the native code does
            return Sample(out, key, [], np.array([[float(key)]]))

    batch = unpack_batch(BufferedDataset(Bytes(), buffers).__getitems__([1, 200, 201]), buffers)
    assert batch["image"].data_ptr() == buffers.images[1].data_ptr()
    assert batch["image"].flatten(1).float().mean(1).tolist() == [200, 201]
    assert batch["draws"].flatten().tolist() == [200, 201]


class Event:
    """Stands for a CUDA event behind the copy of a batch, and notes when it is waited for."""

    def __init__(self, number: int, log: list):
        self.number, self.log = number, log

    def synchronize(self) -> None:
        self.log.append(self.number)


def test_a_slot_is_not_handed_out_before_its_copy_is_over():
    made = loader(Numbers(), batches_of(12), 1)
    waited: list[int] = []
    with made.started() as arriving:
        for number in range(12):
            next(arriving)
            assert waited == list(range(number - 1)), "asking for a batch hands out the slot of the one before the last"
            made._copies[number] = Event(number, waited)
    assert waited == list(range(12))  # and the memory is not given back before
    assert PREFETCH_FACTOR + 2 == 4  # the number of slots that this rests on: those under way, and two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_locked_memory_are_right():
    device = torch.device("cuda")
    keys = batches_of(60)
    made = BatchLoader(Numbers(), keys, 2, device, True, 3, SHAPE)
    with made.started() as arriving:
        first = next(arriving)
        assert first["image"].is_pinned()
        kept = [made.to_device(first), *(made.to_device(batch) for batch in arriving)]
    assert [image[:, 0, 0, 0].tolist() for image, _ in kept] == keys
