"""Shared buffers: batches are complete when they arrive, and are not overwritten before they are copied."""

import hashlib
import time

import numpy as np
import pytest
import torch

from data.loader.loader import BatchLoader
from data.loader.shared_memory import (
    PREFETCH_FACTOR,
    BufferedBatchSampler,
    BufferedDataset,
    Sample,
    SharedBatchBuffers,
    labels_to_tensor,
    unpack_batch,
)

CPU = torch.device("cpu")
SHAPE = (3, 4, 4)
SPECS = {"image": (SHAPE, torch.float32)}


class Numbers:
    """Sample k is filled with k; those divisible by `bad` cannot be used."""

    def __init__(self, bad: int = 10**9):
        self.bad = bad

    def make(self, key: int, out: dict[str, torch.Tensor] | None = None) -> Sample:
        if key % self.bad == 0:
            return Sample(None, None, [f"{key}: bad"])
        return Sample({"image": torch.full(SHAPE, float(key))}, key, [])

    def __getitem__(self, key: int) -> Sample:
        return self.make(key)


class SeveralArrays(Numbers):
    """As for detection: an image with a mask, and objects whose number differs from sample to sample."""

    specs = SPECS | {"mask": ((2, 2), torch.bool)}

    def make(self, key: int, out: dict[str, torch.Tensor] | None = None) -> Sample:
        sample = super().make(key)
        if sample.arrays is None:
            return sample
        mask = torch.empty(2, 2, dtype=torch.bool) if out is None else out["mask"]
        mask.fill_(key % 2 == 1)
        return Sample(sample.arrays | {"mask": mask}, {"boxes": np.full((key % 4, 4), key)}, [])


class LabelMap(Numbers):
    """As for segmentation: the target is an array."""

    specs = SPECS | {"target": ((4, 4), torch.int64)}

    def make(self, key: int, out: dict[str, torch.Tensor] | None = None) -> Sample:
        return Sample(super().make(key).arrays | {"target": torch.full((4, 4), key)}, None, [])


def batches_of(count: int, size: int = 3) -> list[list[int]]:
    return [list(range(1 + size * i, 1 + size * i + size)) for i in range(count)]


def loader(samples, keys, workers, device=CPU, specs=SPECS, **options) -> BatchLoader:
    return BatchLoader(
        samples, keys, num_workers=workers, device=device, batch_size=3, specs=specs, **{"pin_memory": False} | options
    )


def fills(images: torch.Tensor) -> list[float]:
    """The number that each image is filled with."""
    assert all(image.unique().numel() == 1 for image in images)
    return images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_complete_and_in_order(workers):
    keys = batches_of(40)
    with loader(Numbers(), keys, workers).started() as batches:
        for expected in keys:
            batch = next(batches)
            assert batch["target"].tolist() == expected and batch["bad"] == [] and batch["aug_params"] is None
            assert batch["image"].shape == (3, *SHAPE) and fills(batch["image"]) == expected
        with pytest.raises(StopIteration):
            next(batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_copied_batches_are_never_overwritten(workers):
    """Copies of all batches are compared at the end, when every buffer has been written many times."""
    keys = batches_of(30)
    made = loader(Numbers(), keys, workers)
    with made.started() as batches:
        kept = [made.to_device(batch) for batch in batches]
    assert [batch["target"].tolist() for batch in kept] == keys
    assert [fills(batch["image"]) for batch in kept] == keys


@pytest.mark.parametrize("workers", [0, 2])
def test_several_arrays_and_targets_of_any_kind(workers):
    keys = batches_of(12)
    tensors = lambda targets: [{"boxes": torch.from_numpy(target["boxes"])} for target in targets]  # noqa: E731
    made = loader(SeveralArrays(bad=5), keys, workers, specs=SeveralArrays.specs, collate_targets=tensors)
    with made.started() as batches:
        kept = [made.to_device(batch) for batch in batches]
    for batch, expected in zip(kept, keys, strict=True):
        good = [key for key in expected if key % 5]
        assert fills(batch["image"]) == good
        assert batch["mask"].dtype == torch.bool and batch["mask"].flatten(1).tolist() == [
            [k % 2 == 1] * 4 for k in good
        ]
        assert [target["boxes"].shape for target in batch["target"]] == [(key % 4, 4) for key in good]
        assert all((target["boxes"] == key).all() for target, key in zip(batch["target"], good, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_array_named_target_is_the_target(workers):
    made = loader(LabelMap(), batches_of(5), workers, specs=LabelMap.specs)
    with made.started() as batches:
        for batch, expected in zip(batches, batches_of(5), strict=True):
            assert made.to_device(batch)["target"][:, 1, 2].tolist() == expected


def test_a_batch_stays_until_the_one_after_the_next_is_fetched():
    """The last batch and the one before it are in use, or being copied to a GPU, while workers prepare others."""
    with loader(Numbers(), batches_of(30), 2).started() as batches:
        first = next(batches)["image"]
        second = next(batches)["image"]
        deadline = time.monotonic() + 0.3
        digest = hashlib.sha256(first.numpy().tobytes()).digest()
        while time.monotonic() < deadline:  # without another fetch, workers fill all the buffers they may
            assert hashlib.sha256(first.numpy().tobytes()).digest() == digest
        assert fills(second) == [4, 5, 6]


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_leave_no_gap(workers):
    keys = batches_of(20)
    with loader(Numbers(bad=2), keys, workers).started() as batches:
        for expected, batch in zip(keys, batches, strict=True):
            good = [key for key in expected if key % 2]
            assert batch["target"].tolist() == good and fills(batch["image"]) == good
            assert batch["bad"] == [f"{key}: bad" for key in expected if key % 2 == 0]
    with loader(Numbers(bad=1), keys, workers).started() as batches:
        batch = next(batches)
        assert batch["image"].shape == (0, *SHAPE) and batch["target"].shape == (0,)


def test_keys_are_preceded_by_buffers_in_turn():
    keys = BufferedBatchSampler([[7], [8], [9]], 2)
    assert list(keys) == [[0, 7], [1, 8], [0, 9]] and len(keys) == 3


def test_buffers_have_any_dtype_and_take_results_in_place():
    buffers = SharedBatchBuffers(3, 2, {"image": ((5, 5, 3), torch.uint8)})
    images = buffers.arrays["image"]
    assert len(buffers) == 3 and images.shape == (3, 2, 5, 5, 3) and images.dtype == torch.uint8

    class Bytes:
        def make(self, key, out):
            out["image"].fill_(key)  # in place, as the native code does
            return Sample(out, key, [], np.array([[float(key)]]))

    batch = unpack_batch(BufferedDataset(Bytes(), buffers).__getitems__([1, 200, 201]), buffers, labels_to_tensor)
    assert batch["image"].data_ptr() == images[1].data_ptr()
    assert batch["image"].flatten(1).float().mean(1).tolist() == [200, 201]
    assert batch["aug_params"].flatten().tolist() == [200, 201]


class EventStub:
    """Takes the place of a CUDA event after the copy of a batch, and logs that it was waited for."""

    def __init__(self, number: int, log: list):
        self.number, self.log = number, log

    def synchronize(self) -> None:
        self.log.append(self.number)


def test_a_buffer_is_not_reused_before_its_copy_is_complete():
    made = loader(Numbers(), batches_of(12), 1)
    waited: list[int] = []
    with made.started() as batches:
        for number in range(12):
            next(batches)
            assert waited == list(range(number - 1)), "fetching a batch releases the buffer of the one before the last"
            made._copies[number] = EventStub(number, waited)
    assert waited == list(range(12))  # and the memory is not released before
    assert PREFETCH_FACTOR + 2 == 4  # the number of buffers that this assumes: those being prepared, and two


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_pinned_memory_are_right():
    keys = batches_of(60)
    made = loader(Numbers(), keys, 2, device=torch.device("cuda"), pin_memory=True)
    with made.started() as batches:
        first = next(batches)
        assert first["image"].is_pinned()
        kept = [made.to_device(first), *(made.to_device(batch) for batch in batches)]
    assert [fills(batch["image"]) for batch in kept] == keys
