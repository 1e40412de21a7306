"""timm's augmentation policies on arrays of pixels, bit-equal to timm: the same random numbers and the same pixels.

timm's own code samples the random numbers: a copy of timm's policy object runs with operations that record their
arguments instead of changing an image. `data/native/augment.c` then applies the recorded operations.

    augment = NativeAugment(reference)       # timm's RandAugment, AutoAugment or AugMix, torchvision's ColorJitter
    pixels = augment(pixels)                 # (H, W, 3) uint8

The two parts can also be called separately: `ops = augment.sample(width, height)`, then `augment.apply(pixels, ops)`.
"""

import copy
import math
import random
import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torchvision.transforms import ColorJitter

from data.native.library import address, image_address, library
from data.transforms.reference import posterize
from utils.compat import resolve_timm_resampling


class Operation(IntEnum):
    """`enum operation` of native/augment.h."""

    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    POSTERIZE = 3
    SOLARIZE = 4
    SOLARIZE_ADD = 5
    COLOR = 6
    CONTRAST = 7
    BRIGHTNESS = 8
    SHARPNESS = 9
    AFFINE = 10


MAX_PIXELS = 1 << 28  # four values of a pixel are counted with 32 bits; Pillow refuses images of this size

# `enum filter` of native/augment.h.
FILTERS = {Image.Resampling.NEAREST: 0, Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2}


class OpRecord(NamedTuple):
    """One operation with its arguments: `OpRecord` of native/augment.h.

    Attributes:
        operation: the operation.
        filter: for AFFINE, one of FILTERS.
        fill: for AFFINE, the colour of pixels sampled outside the source.
        a: for AFFINE, the matrix: output position (x, y) is sampled at (a0 x + a1 y + a2, a3 x + a4 y + a5);
            for other operations the first element is the argument.
    """

    operation: Operation
    filter: int = 0
    fill: tuple[int, int, int] = (0, 0, 0)
    a: tuple[float, ...] = (0.0,) * 6


PillowOp = Callable[[Image.Image], Image.Image]  # for operations without native code


class OpRecorder:
    """Passed to timm's code in place of an image of this size; records the operations in `ops`."""

    def __init__(self, width: int, height: int):
        self.size = width, height
        self.ops: list[OpRecord | PillowOp] = []


class NativeAugment:
    """A policy of timm, or a colour jitter, on arrays.

    Attributes:
        recordable: False if one of the policy's operations is not known here. Then `sample` samples nothing, and
            `apply` runs `reference` on a Pillow image, with all its random numbers.
    """

    def __init__(self, reference: Callable[[Image.Image], Image.Image]):
        self.reference = reference
        self._record = _recording(reference)
        self.recordable = self._record is not None

    def sample(self, width: int, height: int) -> list[OpRecord | PillowOp]:
        """Samples the operations for an image of this size from `random`, `numpy.random` and torch, as `reference`
        does."""
        if self._record is None:
            return [self.reference]
        return self._record(OpRecorder(width, height)).ops

    def apply(self, pixels: np.ndarray, ops: Sequence[OpRecord | PillowOp]) -> np.ndarray:
        """Applies `ops` to (H, W, 3) uint8, which may be overwritten, and returns (H, W, 3) uint8."""
        for is_native, group in groupby(ops, lambda op: isinstance(op, OpRecord)):
            run = list(group)
            if is_native:
                pixels = _apply_native(pixels, [op for op in run if isinstance(op, OpRecord)])
            else:
                pixels = _apply_pillow(pixels, [op for op in run if not isinstance(op, OpRecord)])
        return pixels

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        return self.apply(pixels, self.sample(pixels.shape[1], pixels.shape[0]))


_PACKED_OP = struct.Struct("11d")


def pack_ops(ops: Sequence[OpRecord]) -> bytes:
    """11 doubles for each operation: operation, filter, fill (3), a (6), as native/augment.h reads them."""
    return b"".join([_PACKED_OP.pack(op.operation, op.filter, *op.fill, *op.a) for op in ops])


def _apply_native(pixels: np.ndarray, ops: list[OpRecord]) -> np.ndarray:
    pixels = np.require(pixels, requirements=["C", "W"])
    at, height, width = image_address(pixels)
    if height * width > MAX_PIXELS:
        raise ValueError(f"an image of {width} × {height} pixels is too large to augment natively")
    other = np.empty_like(pixels)
    result = library().swin_augment(at, image_address(other)[0], height, width, pack_ops(ops), len(ops))
    if result == -2:
        raise ValueError(f"numbers that an operation cannot have: {ops}")
    if result < 0:
        raise MemoryError(f"not enough memory to augment an image of {width}×{height} pixels")
    return other if result else pixels


def _apply_pillow(pixels: np.ndarray, ops: list[PillowOp]) -> np.ndarray:
    image = Image.fromarray(pixels)
    for op in ops:
        image = op(image)
    return np.array(image)


class Normalise:
    """torchvision's ToTensor and Normalize in one step, bit-equal."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        values = torch.arange(256).to(torch.float32).div(255)
        means, stds = (torch.tensor(tuple(each), dtype=torch.float32)[:, None] for each in (mean, std))
        self.table = (values - means).div(stds).contiguous().numpy()  # (3, 256)

    def __call__(self, pixels: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        """(H, W, 3) uint8 → (3, H, W) float32, written to `out` (contiguous) if it is given."""
        pixels = np.ascontiguousarray(pixels)
        at, height, width = image_address(pixels)
        out = torch.empty((3, height, width)) if out is None else out
        to, table = address(out.numpy(), (3, height, width), np.float32), address(self.table, (3, 256), np.float32)
        library().swin_normalise(at, to, height, width, table)
        return out


# ------------------------------------------------------------------------------------------------ recording


def _recording(reference: Any) -> Callable[[OpRecorder], OpRecorder] | None:
    """A copy of `reference` that takes an OpRecorder instead of an image; None if an operation is not known."""
    if isinstance(reference, ColorJitter):
        return None if reference.hue is not None else lambda recorder: _record_jitter(reference, recorder)
    if isinstance(reference, RandAugment):
        ops = [_with_recorder(op) for op in reference.ops]
        return _RecordingRandAugment(ops, reference.num_layers, reference.choice_weights) if all(ops) else None
    if isinstance(reference, AutoAugment):
        policy = [[_with_recorder(op) for op in ops] for ops in reference.policy]
        return AutoAugment(policy) if all(all(ops) for ops in policy) else None
    return None


class _RecordingRandAugment(RandAugment):
    """timm's RandAugment, with the same random numbers. If all operations are equally likely it samples their indices
    with `randint`, as `np.random.choice` does internally, and skips that function's conversion of the list."""

    def __call__(self, recorder: OpRecorder) -> OpRecorder:
        if self.choice_weights is not None:
            return super().__call__(recorder)
        for i in np.random.randint(0, len(self.ops), self.num_layers):
            recorder = self.ops[i](recorder)
        return recorder


def _with_recorder(op: Any) -> AugmentOp | None:
    record = RECORDERS.get(op.aug_fn) if type(op) is AugmentOp else None
    if record is None:
        return None
    recording = copy.copy(op)
    recording.aug_fn = record
    return recording


def _record_op(operation: Operation) -> Callable[..., OpRecorder]:
    def record(recorder: OpRecorder, argument: float = 0.0, **_: Any) -> OpRecorder:
        recorder.ops.append(OpRecord(operation, a=(float(argument), 0.0, 0.0, 0.0, 0.0, 0.0)))
        return recorder

    return record


def _record_posterize(recorder: OpRecorder, bits_to_keep: int, **_: Any) -> OpRecorder:
    return recorder if bits_to_keep >= 8 else _record_op(Operation.POSTERIZE)(recorder, bits_to_keep)


def _record_solarize_add(recorder: OpRecorder, add: int, thresh: int = 128, **_: Any) -> OpRecorder:
    if thresh != 128:
        recorder.ops.append(lambda image: timm_ops.solarize_add(image, add, thresh))
        return recorder
    return _record_op(Operation.SOLARIZE_ADD)(recorder, add)


def _record_desaturate(recorder: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    return _record_op(Operation.COLOR)(recorder, min(1.0, max(0.0, 1.0 - factor)))


def _record_blur(recorder: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    recorder.ops.append(lambda image: timm_ops.gaussian_blur(image, factor))
    return recorder


def _record_random_blur(recorder: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    return _record_blur(recorder, random.uniform(0.1, 2.0 * factor))


def _record_affine(
    recorder: OpRecorder, matrix: tuple[float, ...], resample: Image.Resampling, fill: tuple[int, int, int]
) -> OpRecorder:
    recorder.ops.append(OpRecord(Operation.AFFINE, FILTERS[resample], fill, tuple(map(float, matrix))))
    return recorder


def _record_moving(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[..., OpRecorder]:
    """Recorder of an affine operation of timm, whose matrix is `matrix(argument, width, height)`."""

    def record(recorder: OpRecorder, argument: float, **options: Any) -> OpRecorder:
        a = matrix(argument, *recorder.size)
        resolve_timm_resampling(options)
        return _record_affine(recorder, a, options["resample"], options["fillcolor"])

    return record


def _record_rotate(recorder: OpRecorder, degrees: float, **options: Any) -> OpRecorder:
    """Pillow's Image.rotate: about the centre, with rounded cosine and sine; quarter turns copy pixels."""
    resolve_timm_resampling(options)
    width, height = recorder.size
    degrees %= 360.0
    if degrees == 0:
        return recorder
    quarter_turns: dict[float, tuple[float, ...]] = {180: (-1, 0, width, 0, -1, height)}
    if width == height:
        quarter_turns |= {90: (0, -1, width, 1, 0, 0), 270: (0, 1, 0, -1, 0, height)}
    if degrees in quarter_turns:
        return _record_affine(recorder, quarter_turns[degrees], Image.Resampling.NEAREST, options["fillcolor"])
    angle = -math.radians(degrees)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    matrix = (
        cosine, sine, cosine * -x + sine * -y + 0.0 + x,
        round(-math.sin(angle), 15), cosine, round(-math.sin(angle), 15) * -x + cosine * -y + 0.0 + y,
    )  # fmt: skip
    return _record_affine(recorder, matrix, options["resample"], options["fillcolor"])


def _record_jitter(jitter: ColorJitter, recorder: OpRecorder) -> OpRecorder:
    order, *factors = ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
    operations = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)
    for i in order.tolist():
        if i < len(operations) and factors[i] is not None:
            _record_op(operations[i])(recorder, factors[i])
    return recorder


RECORDERS: dict[object, Callable[..., OpRecorder]] = {
    timm_ops.auto_contrast: _record_op(Operation.AUTO_CONTRAST),
    timm_ops.equalize: _record_op(Operation.EQUALIZE),
    timm_ops.invert: _record_op(Operation.INVERT),
    timm_ops.posterize: _record_posterize,
    posterize: _record_posterize,
    timm_ops.solarize: _record_op(Operation.SOLARIZE),
    timm_ops.solarize_add: _record_solarize_add,
    timm_ops.color: _record_op(Operation.COLOR),
    timm_ops.contrast: _record_op(Operation.CONTRAST),
    timm_ops.brightness: _record_op(Operation.BRIGHTNESS),
    timm_ops.sharpness: _record_op(Operation.SHARPNESS),
    timm_ops.desaturate: _record_desaturate,
    timm_ops.gaussian_blur: _record_blur,
    timm_ops.gaussian_blur_rand: _record_random_blur,
    timm_ops.rotate: _record_rotate,
    timm_ops.shear_x: _record_moving(lambda factor, width, height: (1, factor, 0, 0, 1, 0)),
    timm_ops.shear_y: _record_moving(lambda factor, width, height: (1, 0, 0, factor, 1, 0)),
    timm_ops.translate_x_rel: _record_moving(lambda fraction, width, height: (1, 0, fraction * width, 0, 1, 0)),
    timm_ops.translate_y_rel: _record_moving(lambda fraction, width, height: (1, 0, 0, 0, 1, fraction * height)),
    timm_ops.translate_x_abs: _record_moving(lambda pixels, width, height: (1, 0, pixels, 0, 1, 0)),
    timm_ops.translate_y_abs: _record_moving(lambda pixels, width, height: (1, 0, 0, 0, 1, pixels)),
}
