"""DATA.BACKEND device: augmentation after the crop, for a batch at once, where the model trains.

    draws = GpuAugParams(augments, erasing)          # with the workers: a few numbers a sample
    numbers = draws(width, height)                  # (R, 11) float64, drawn as the reference draws
    augment = GpuAugment(mean, std, erasing)     # with the model
    images = augment(pixels, numbers)               # (B, S, S, 3) uint8 and (B, R, 11) → (B, 3, S, S) float32

What is drawn is what the reference draws, from the same generators in the same order, but for the noise that random
erasing writes, which is a function of a number drawn for the sample. An image's pixels depend on its own draws alone,
not on the rest of the batch. The operations are exact but for the affine ones, whose values are computed in single
precision: one level off where Pillow's value is next to a whole number, which is less than 0.1 % of them, or up to 5 %
when a picture is moved by a short decimal of pixels. With the recipe's policy photographs agree to 95 dB.

The numbers stay in the host's memory, where samples are sorted by what is to be done; the device gets the order and
never has to be asked. `timed(…)` measures it; what it should cost is reckoned in docs/reports/LOADER.md.

B images of a batch, S their size, R rows: of each sample its steps, then its erased rectangles.
"""

import copy
import random
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import ColorJitter

from data.transforms import gpu_ops
from data.transforms.native_augment import FILTERS, NativeAugment, Operation, encoded
from utils.errors import UserError

COLUMNS = 11  # of a row: native/augment.h's step; of a rectangle: _ERASE, four empty, top, left, height, width, seed
_NOTHING, _ERASE = -1, -2
_A = 5  # where the matrix, the argument or the rectangle begins

# Ways of working: samples with the same one are worked on together. From _FIRST_TABLE on it is by look-up tables, one
# way for each of _TABLES: those known beforehand, then those that depend on the picture.
_NONE, _COLOR, _SHARPNESS, _ACROSS, _DOWN, _PLANE, _NEAREST, _FIRST_TABLE = range(8)
_TABLES = (
    Operation.INVERT, Operation.POSTERIZE, Operation.SOLARIZE, Operation.SOLARIZE_ADD, Operation.BRIGHTNESS,
    Operation.CONTRAST, Operation.AUTO_CONTRAST, Operation.EQUALIZE,
)  # fmt: skip
_KNOWN_BEFOREHAND = 5


class GpuAugParams:
    """The draws of a sample's augmentation and erasing, as numbers."""

    def __init__(self, augments: Sequence[NativeAugment], erasing: RandomErasing | None):
        """Raises UserError where an augmentation has something that is not done on the device."""
        for augment in augments:
            _check(augment)
        self.augments = list(augments)
        self.steps = sum(_most_steps(augment.reference) for augment in augments)
        self.rectangles = erasing.max_count if erasing is not None else 0
        self._erasing = copy.copy(erasing)
        if erasing is not None:
            self._erasing.per_pixel = self._erasing.rand_color = False  # its rectangles are wanted, not its noise

    def __call__(self, width: int, height: int) -> np.ndarray:
        """(R, 11) float64 for a picture of this size."""
        rows = np.full((self.steps + self.rectangles, COLUMNS), float(_NOTHING))
        steps = [step for augment in self.augments for step in augment.draw(width, height)]
        if steps:
            rows[: len(steps)] = np.frombuffer(encoded(steps)).reshape(-1, COLUMNS)
        if self._erasing is not None:
            rectangles = _Rectangles(width, height)
            self._erasing(rectangles)
            for i, rectangle in enumerate(rectangles.found):
                rows[self.steps + i] = (_ERASE, 0, 0, 0, 0, *rectangle, random.getrandbits(48), 0)
        return rows


class _Rectangles:
    """Stands for an image while timm's random erasing draws, and notes down what would be erased."""

    dtype = torch.float32

    def __init__(self, width: int, height: int):
        self._size = 3, height, width
        self.found: list[tuple[int, int, int, int]] = []

    def size(self) -> tuple[int, int, int]:
        return self._size

    def __setitem__(self, key: tuple[slice, slice, slice], value: Tensor) -> None:
        _, rows, columns = key
        self.found.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))


class GpuAugment:
    """Augments, normalises and erases batches where they are."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], erasing: RandomErasing | None):
        self.mean = torch.tensor(tuple(mean), dtype=torch.float32).view(1, 3, 1, 1)
        self.std = torch.tensor(tuple(std), dtype=torch.float32).view(1, 3, 1, 1)
        self.rectangles = erasing.max_count if erasing is not None else 0
        self.noise = "const"
        if erasing is not None and (erasing.per_pixel or erasing.rand_color):
            self.noise = "pixel" if erasing.per_pixel else "rand"

    def __call__(self, pixels: Tensor, numbers: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 on any device → (B, 3, S, S) float32 there; `pixels` is overwritten.

        Args:
            numbers: (B, R, 11) float64 in the host's memory, of `GpuAugParams`.
        """
        device = pixels.device
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        rows = numbers.numpy()
        on_device = _sent(numbers, device)
        last = rows.shape[1] - self.rectangles
        for layer in range(last):
            _apply(pixels, rows[:, layer], on_device[:, layer])
        planes = pixels.permute(0, 3, 1, 2)
        images = torch.div(planes, 255, out=torch.empty(planes.shape, device=device)).sub_(self.mean).div_(self.std)
        for i in range(last, rows.shape[1]):
            self._erase(images, rows[:, i], on_device[:, i])
        return images

    def _erase(self, images: Tensor, rows: np.ndarray, on_device: Tensor) -> None:
        which = np.flatnonzero(rows[:, 0] == _ERASE)
        if not len(which):
            return
        area = int((rows[which, _A + 2] * rows[which, _A + 3]).sum())
        index = _sent(torch.from_numpy(which), images.device)
        numbers = on_device.index_select(0, index)[:, _A:].to(torch.int64)
        gpu_ops.erase(images, index, numbers[:, :4], area, numbers[:, 4], self.noise)


def timed(augment: GpuAugment, aug_params: GpuAugParams, batch_size: int, size: int, device: torch.device) -> float:
    """Seconds that `augment` takes for one batch of `batch_size` noise pictures on `device`: the median of ten batches,
    each with draws of its own."""
    seconds = []
    for _ in range(13):
        numbers = torch.from_numpy(np.stack([aug_params(size, size) for _ in range(batch_size)]))
        pixels = torch.randint(0, 256, (batch_size, size, size, 3), dtype=torch.uint8, device=device)
        _finish(device)
        start = time.perf_counter()
        augment(pixels, numbers)
        _finish(device)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[3:]))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------------------------ one layer of steps


def _apply(pixels: Tensor, rows: np.ndarray, on_device: Tensor) -> None:
    """One step of each sample, in place; rows (B, 11) here and on the device."""
    ways = _ways(rows)
    order = np.argsort(ways, kind="stable")
    sent = _sent(torch.from_numpy(order), pixels.device)
    bounds = np.searchsorted(ways[order], np.arange(_FIRST_TABLE + len(_TABLES) + 1))
    groups = [(way, bounds[way], bounds[way + 1]) for way in range(_COLOR, _FIRST_TABLE)]
    for way, start, stop in [*groups, (_FIRST_TABLE, bounds[_FIRST_TABLE], len(order))]:
        if start == stop:
            continue
        index = sent[start:stop]
        images, numbers = pixels.index_select(0, index), on_device.index_select(0, index)
        if way == _FIRST_TABLE:
            tables = _tables(images, numbers, rows[order[start:stop]], bounds[_FIRST_TABLE:] - start)
            result = gpu_ops.look_up(images, tables)
        else:
            result = _work(way, images, numbers)
        pixels.index_copy_(0, index, result)


def _work(way: int, images: Tensor, numbers: Tensor) -> Tensor:
    if way == _COLOR:
        return gpu_ops.color(images, numbers[:, _A])
    if way == _SHARPNESS:
        return gpu_ops.sharpness(images, numbers[:, _A])
    matrix, fill = numbers[:, _A:], numbers[:, 2:_A]
    if way == _NEAREST:
        return gpu_ops.nearest(images, matrix, fill)
    cubic = numbers[:, 1] == FILTERS[Image.Resampling.BICUBIC]
    move = {_ACROSS: gpu_ops.along_rows, _DOWN: gpu_ops.along_columns, _PLANE: gpu_ops.affine}[way]
    return move(images, matrix, cubic, fill)


def _tables(images: Tensor, numbers: Tensor, rows: np.ndarray, bounds: np.ndarray) -> Tensor:
    """(n, 3, 256) uint8; samples sorted by way, those of _TABLES[i] from bounds[i] to bounds[i + 1]."""
    known = bounds[_KNOWN_BEFOREHAND]
    found = [_sent(torch.from_numpy(_known_tables(rows[:known])), images.device)[:, None].expand(-1, 3, -1)]
    contrast, auto_contrast, equalize = (slice(*bounds[i : i + 2]) for i in range(_KNOWN_BEFOREHAND, len(_TABLES)))
    if len(images[contrast]):
        found.append(gpu_ops.contrast_tables(images[contrast], numbers[contrast, _A]))
    if len(images[auto_contrast]):
        found.append(gpu_ops.auto_contrast_tables(images[auto_contrast]))
    if len(images[equalize]):
        found.append(gpu_ops.equalize_tables(images[equalize]))
    return torch.cat(found)


def _known_tables(rows: np.ndarray) -> np.ndarray:
    """(n, 256) uint8 of the operations that ask nothing of the picture, as native/augment.c does them."""
    codes, argument = rows[:, :1].astype(int), rows[:, _A : _A + 1]
    whole, values = argument.astype(int), np.arange(256)[None]
    bright = np.clip(argument.astype(np.float32) * values.astype(np.float32), 0, 255)
    tables = {
        Operation.INVERT: 255 - values,
        Operation.POSTERIZE: values & (0xFF00 >> np.clip(whole, 0, 8)),
        Operation.SOLARIZE: np.where(values < whole, values, 255 - values),
        Operation.SOLARIZE_ADD: np.where(values < 128, np.minimum(values + whole, 255), values),
        Operation.BRIGHTNESS: bright.astype(int),
    }
    which = [codes == operation for operation in tables]
    return np.select(which, [np.broadcast_to(each, (len(rows), 256)) for each in tables.values()]).astype(np.uint8)


def _ways(rows: np.ndarray) -> np.ndarray:
    """(B,) the way of each sample's step."""
    codes, a = rows[:, 0].astype(int), rows[:, _A:]
    ways = np.full(len(rows), _NONE)
    ways[codes == Operation.COLOR], ways[codes == Operation.SHARPNESS] = _COLOR, _SHARPNESS
    for i, operation in enumerate(_TABLES):
        ways[codes == operation] = _FIRST_TABLE + i
    unmoved_y = (a[:, 3] == 0) & (a[:, 4] == 1) & (a[:, 5] == 0)
    unmoved_x = (a[:, 0] == 1) & (a[:, 1] == 0) & (a[:, 2] == 0)
    kind = np.where(unmoved_y, _ACROSS, np.where(unmoved_x, _DOWN, _PLANE))
    kind = np.where(rows[:, 1] == FILTERS[Image.Resampling.NEAREST], _NEAREST, kind)
    return np.where(codes == Operation.AFFINE, kind, ways)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, by a copy that nobody waits for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


# ------------------------------------------------------------------------------------------------ what a policy has


def _operations(reference: object) -> list[list[Callable]]:
    """The functions that may be called on one picture, one list for each alternative."""
    if isinstance(reference, RandAugment):
        return [[op.aug_fn for op in reference.ops]]
    if isinstance(reference, AutoAugment):
        return [[op.aug_fn for op in ops] for ops in reference.policy]
    return []


def _most_steps(reference: object) -> int:
    """How many steps a picture gets at most."""
    if isinstance(reference, RandAugment):
        return reference.num_layers
    return 3 if isinstance(reference, ColorJitter) else max(map(len, _operations(reference)), default=0)


def _check(augment: NativeAugment) -> None:
    functions = {function for functions in _operations(augment.reference) for function in functions}
    blurs = functions & {timm_ops.gaussian_blur, timm_ops.gaussian_blur_rand}
    if blurs or not augment.draws_ahead:
        name = type(augment.reference).__name__
        what = "a Gaussian blur" if blurs else f"{name}, or one of its operations,"
        raise UserError(
            f"DATA.BACKEND device: {what} of AUG.AUTO_AUGMENT or AUG.COLOR_JITTER is not done on the device. Take "
            "DATA.BACKEND fast, or a policy rand-… or original."
        )
