"""DATA.BACKEND gpu: augmentation after the crop, for whole batches, on the device of the model.

    sample_params = GpuAugParams(augments, erasing)      # in the workers
    aug_params = sample_params(width, height)            # (R, 11) float64 for one sample
    augment = GpuAugment(mean, std, erasing)             # in the main process
    images = augment(pixels, aug_params)                 # (B, S, S, 3) uint8 and (B, R, 11) → (B, 3, S, S) float32

The random numbers are those of the reference, from the same generators in the same order. Only the noise of random
erasing differs: it is a function of a seed that is sampled for each rectangle. An image depends on its own parameters
only, not on the rest of the batch.

The operations are exact except the affine ones, which compute in single precision: a value is one level off where
Pillow's is next to an integer. That is less than 0.1 % of the values, or up to 5 % when an image is shifted by a short
decimal of pixels. With the recipe's policy, photographs agree to 95 dB.

The parameters stay in host memory, where samples are sorted by operation; the device gets the order, so that the host
never waits for it. `measure_seconds` measures a batch; docs/reports/LOADER.md has an estimate.

B images of a batch, S their size, R rows: the operations of a sample, then its erased rectangles.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter

from data.transforms import gpu_ops
from data.transforms.native_augment import FILTERS, NativeAugment, Operation, OpRecord, pack_ops
from utils.errors import UserError

# A row is an OpRecord of native/augment.h, or a rectangle: _ERASE, four unused, top, left, height, width, seed, unused.
COLUMNS = 11
_NOTHING, _ERASE = -1, -2
_A = 5  # the first column of the matrix, the argument or the rectangle

# Kinds of operations; samples with operations of the same kind are processed together. The kinds from _FIRST_TABLE on
# use look-up tables, one kind for each of _TABLES: first those whose table is known, then those whose table depends on
# the image.
_NONE, _COLOR, _SHARPNESS, _SHIFT_ROWS, _SHIFT_COLUMNS, _AFFINE, _NEAREST, _FIRST_TABLE = range(8)
_TABLES = (
    Operation.INVERT, Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD, Operation.BRIGHTNESS,
    Operation.CONTRAST, Operation.AUTO_CONTRAST, Operation.EQUALIZE,
)  # fmt: skip
_KNOWN_TABLES = 5


class GpuAugParams:
    """Samples the parameters of augmentation and random erasing for one image."""

    def __init__(self, augments: Sequence[NativeAugment], erasing: RandomErasing | None):
        """Raises UserError if an augmentation is not implemented in `GpuAugment`."""
        for augment in augments:
            _check(augment)
        self.augments = list(augments)
        self.max_ops = sum(_max_ops(augment.reference) for augment in augments)
        self.rectangles = erasing.max_count if erasing is not None else 0
        self._erasing = copy.copy(erasing)
        if self._erasing is not None:
            self._erasing.per_pixel = self._erasing.rand_color = False  # do not sample the noise

    def __call__(self, width: int, height: int) -> np.ndarray:
        """(R, 11) float64 for an image of this size."""
        rows = np.full((self.max_ops + self.rectangles, COLUMNS), float(_NOTHING))
        # The cast: `_check` has refused policies with other operations.
        ops = cast(list[OpRecord], [op for augment in self.augments for op in augment.sample(width, height)])
        if ops:
            rows[: len(ops)] = np.frombuffer(pack_ops(ops)).reshape(-1, COLUMNS)
        if self._erasing is not None:
            recorder = _RectangleRecorder(width, height)
            self._erasing(recorder)
            for i, rectangle in enumerate(recorder.rectangles):
                rows[self.max_ops + i] = (_ERASE, 0, 0, 0, 0, *rectangle, random.getrandbits(48), 0)
        return rows


class _RectangleRecorder:
    """Passed to timm's random erasing in place of an image; records the rectangles (top, left, height, width)."""

    dtype = torch.float32

    def __init__(self, width: int, height: int):
        self._size = 3, height, width
        self.rectangles: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, key: tuple[slice, slice, slice], value: Tensor) -> None:
        _, rows, columns = key
        self.rectangles.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


class GpuAugment:
    """Augments, normalises and erases batches on their device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], erasing: RandomErasing | None):
        self.mean = torch.tensor(tuple(mean), dtype=torch.float32).view(1, 3, 1, 1)
        self.std = torch.tensor(tuple(std), dtype=torch.float32).view(1, 3, 1, 1)
        self.rectangles = erasing.max_count if erasing is not None else 0
        self.noise = "const"
        if erasing is not None and (erasing.per_pixel or erasing.rand_color):
            self.noise = "pixel" if erasing.per_pixel else "rand"

    def __call__(self, pixels: Tensor, aug_params: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 on any device → (B, 3, S, S) float32 on that device. Overwrites `pixels`.

        Args:
            aug_params: (B, R, 11) float64 in host memory, from `GpuAugParams`.
        """
        device = pixels.device
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        rows = aug_params.numpy()
        on_device = _to_device(aug_params, device)
        max_ops = rows.shape[1] - self.rectangles
        for i in range(max_ops):
            _apply(pixels, rows[:, i], on_device[:, i])
        planes = pixels.permute(0, 3, 1, 2)
        images = torch.div(planes, 255, out=torch.empty(planes.shape, device=device)).sub_(self.mean).div_(self.std)
        for i in range(max_ops, rows.shape[1]):
            self._erase(images, rows[:, i], on_device[:, i])
        return images

    def _erase(self, images: Tensor, rows: np.ndarray, on_device: Tensor) -> None:
        samples = np.flatnonzero(rows[:, 0] == _ERASE)
        if not len(samples):
            return
        pixels = int((rows[samples, _A + 2] * rows[samples, _A + 3]).sum())
        index = _to_device(torch.from_numpy(samples), images.device)
        values = on_device.index_select(0, index)[:, _A:].to(torch.int64)
        gpu_ops.erase(images, index, areas=values[:, :4], pixels=pixels, seeds=values[:, 4], noise=self.noise)


def measure_seconds(
    augment: GpuAugment, sample_params: GpuAugParams, batch_size: int, size: int, device: torch.device
) -> float:
    """Seconds that `augment` takes for a batch of noise images on `device`: the median of ten batches, each with new
    parameters."""
    seconds = []
    for _ in range(13):
        aug_params = torch.from_numpy(np.stack([sample_params(size, size) for _ in range(batch_size)]))
        pixels = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, device=device)
        _synchronize(device)
        start = time.perf_counter()
        augment(pixels, aug_params)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[3:]))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ----------------------------------------------------------------------------------------- one operation of each sample


def _apply(pixels: Tensor, rows: np.ndarray, on_device: Tensor) -> None:
    """Applies one operation to each sample, in place; rows (B, 11) on the host and on the device."""
    kinds = _kinds(rows)
    order = np.argsort(kinds, kind="stable")
    order_on_device = _to_device(torch.from_numpy(order), pixels.device)
    bounds = np.searchsorted(kinds[order], np.arange(_FIRST_TABLE + len(_TABLES) + 1))
    groups = [(kind, bounds[kind], bounds[kind + 1]) for kind in range(_COLOR, _FIRST_TABLE)]
    for kind, start, stop in [*groups, (_FIRST_TABLE, bounds[_FIRST_TABLE], len(order))]:
        if start == stop:
            continue
        index = order_on_device[start:stop]
        images, ops = pixels.index_select(0, index), on_device.index_select(0, index)
        if kind == _FIRST_TABLE:
            tables = _tables(images, ops, rows[order[start:stop]], bounds[_FIRST_TABLE:] - start)
            result = gpu_ops.look_up(images, tables)
        else:
            result = _apply_kind(kind, images, ops)
        pixels.index_copy_(0, index, result)


def _apply_kind(kind: int, images: Tensor, ops: Tensor) -> Tensor:
    if kind == _COLOR:
        return gpu_ops.color(images, ops[:, _A])
    if kind == _SHARPNESS:
        return gpu_ops.sharpness(images, ops[:, _A])
    matrix, fill = ops[:, _A:], ops[:, 2:_A]
    if kind == _NEAREST:
        return gpu_ops.nearest(images, matrix, fill)
    cubic = ops[:, 1] == FILTERS[Image.Resampling.BICUBIC]
    functions = {_SHIFT_ROWS: gpu_ops.shift_rows, _SHIFT_COLUMNS: gpu_ops.shift_columns, _AFFINE: gpu_ops.affine}
    return functions[kind](images, matrix, cubic, fill)


def _tables(images: Tensor, ops: Tensor, rows: np.ndarray, bounds: np.ndarray) -> Tensor:
    """(n, 3, 256) uint8. Samples are sorted by kind; those of _TABLES[i] are from bounds[i] to bounds[i + 1]."""
    known = bounds[_KNOWN_TABLES]
    tables = [_to_device(torch.from_numpy(_known_tables(rows[:known])), images.device)[:, None].expand(-1, 3, -1)]
    contrast, auto_contrast, equalize = (slice(*bounds[i : i + 2]) for i in range(_KNOWN_TABLES, len(_TABLES)))
    if len(images[contrast]):
        tables.append(gpu_ops.contrast_tables(images[contrast], ops[contrast, _A]))
    if len(images[auto_contrast]):
        tables.append(gpu_ops.auto_contrast_tables(images[auto_contrast]))
    if len(images[equalize]):
        tables.append(gpu_ops.equalize_tables(images[equalize]))
    return torch.cat(tables)


def _known_tables(rows: np.ndarray) -> np.ndarray:
    """(n, 256) uint8 for operations that do not depend on the image, with the arithmetic of native/augment.c."""
    codes, argument = rows[:, :1].astype(int), rows[:, _A : _A + 1]
    integer, values = argument.astype(int), np.arange(256)[None]
    bright = np.clip(argument.astype(np.float32) * values.astype(np.float32), 0, 255)
    tables = {
        Operation.INVERT: 255 - values,
        Operation.POSTERIZE: values & (0xFF00 >> np.clip(integer, 0, 8)),
        Operation.SOLARIZE: np.where(values < integer, values, 255 - values),
        Operation.SOLARIZE_ADD: np.where(values < 128, np.minimum(values + integer, 255), values),
        Operation.BRIGHTNESS: bright.astype(int),
    }
    conditions = [codes == operation for operation in tables]
    choices = [np.broadcast_to(table, (len(rows), 256)) for table in tables.values()]
    return np.select(conditions, choices).astype(np.uint8)


def _kinds(rows: np.ndarray) -> np.ndarray:
    """(B,) the kind of each sample's operation."""
    codes, a = rows[:, 0].astype(int), rows[:, _A:]
    kinds = np.full(len(rows), _NONE)
    kinds[codes == Operation.COLOR], kinds[codes == Operation.SHARPNESS] = _COLOR, _SHARPNESS
    for i, operation in enumerate(_TABLES):
        kinds[codes == operation] = _FIRST_TABLE + i
    unmoved_y = (a[:, 3] == 0) & (a[:, 4] == 1) & (a[:, 5] == 0)
    unmoved_x = (a[:, 0] == 1) & (a[:, 1] == 0) & (a[:, 2] == 0)
    affine = np.where(unmoved_y, _SHIFT_ROWS, np.where(unmoved_x, _SHIFT_COLUMNS, _AFFINE))
    affine = np.where(rows[:, 1] == FILTERS[Image.Resampling.NEAREST], _NEAREST, affine)
    return np.where(codes == Operation.AFFINE, affine, kinds)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies to the device without waiting for it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ------------------------------------------------------------------------------------------- the operations of a policy


def _operations(reference: object) -> list[list[Callable]]:
    """The functions that may be applied to one image, one list for each alternative."""
    if isinstance(reference, RandAugment):
        return [[op.aug_fn for op in reference.ops]]
    if isinstance(reference, AutoAugment):
        return [[op.aug_fn for op in ops] for ops in reference.policy]
    return []


def _max_ops(reference: object) -> int:
    """The maximum number of operations for one image."""
    if isinstance(reference, RandAugment):
        return reference.num_layers
    return 3 if isinstance(reference, ColorJitter) else max(map(len, _operations(reference)), default=0)


def _check(augment: NativeAugment) -> None:
    functions = {function for functions in _operations(augment.reference) for function in functions}
    blurs = functions & {timm_ops.gaussian_blur, timm_ops.gaussian_blur_rand}
    if blurs or not augment.recordable:
        name = type(augment.reference).__name__
        unsupported = "a Gaussian blur" if blurs else f"{name}, or one of its operations,"
        raise UserError(
            f"DATA.BACKEND gpu: {unsupported} of AUG.AUTO_AUGMENT or AUG.COLOR_JITTER is not implemented. Set "
            "DATA.BACKEND native, or choose a policy rand-… or original."
        )
