"""timm's augmentation policies on arrays of pixels: the reference's draws and the reference's pixels, to the bit.

What is drawn is drawn by timm's own code: a copy of timm's policy object runs with operations that note down what they
were asked to do instead of doing it. The list of steps that comes of it is then carried out by `native/augment.c`.

    augment = NativeAugment(reference)         # timm's RandAugment, AutoAugment or AugMix, torchvision's ColorJitter
    pixels = augment(pixels)                 # (H, W, 3) uint8

or, where many threads share the generators, in two halves: `steps = augment.draw(width, height)` one after the other,
`augment.apply(pixels, steps)` side by side (the native part runs without Python's lock).
"""

import copy
import ctypes
import math
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

from data.native.library import library


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


# `enum filter` of native/augment.h.
FILTERS = {Image.Resampling.NEAREST: 0, Image.Resampling.BILINEAR: 1, Image.Resampling.BICUBIC: 2}


class OpRecord(NamedTuple):
    """`step` of native/augment.h, as plain numbers.

    a: AFFINE: the matrix from a place (x, y) in the result to (a0 x + a1 y + a2, a3 x + a4 y + a5) in the source;
        elsewhere the operation's argument comes first.
    """

    operation: Operation
    filter: int = 0
    fill: tuple[int, int, int] = (0, 0, 0)
    a: tuple[float, ...] = (0.0,) * 6


# What Pillow does where nothing here does.
PillowStep = Callable[[Image.Image], Image.Image]


class OpRecorder:
    """Stands for a picture of a size while timm's code draws, and notes down what is done to it."""

    def __init__(self, width: int, height: int):
        self.size = width, height
        self.steps: list[OpRecord | PillowStep] = []


class NativeAugment:
    """A policy of timm's, or a colour jitter, on arrays.

    Attributes:
        draws_ahead: False where there is nothing native for one of the policy's operations: then `apply` is where the
            draws are made, all of them, and Pillow does the work.
    """

    def __init__(self, reference: Callable[[Image.Image], Image.Image]):
        self.reference = reference
        self._draw = _recording(reference)
        self.draws_ahead = self._draw is not None

    def draw(self, width: int, height: int) -> list[OpRecord | PillowStep]:
        """Draws, as `reference` would for a picture of this size, from `random`, `numpy.random` and torch."""
        if self._draw is None:
            return [self.reference]
        return self._draw(OpRecorder(width, height)).steps

    def apply(self, image: np.ndarray, steps: Sequence[OpRecord | PillowStep]) -> np.ndarray:
        """(H, W, 3) uint8 as `reference` makes it with the draws of `steps`; `image` itself may be overwritten."""
        for native, group in groupby(steps, lambda step: isinstance(step, OpRecord)):
            if native:
                image = _run(image, list(group))
            else:
                picture = Image.fromarray(image)
                for step in group:
                    picture = step(picture)
                image = np.array(picture)
        return image

    def __call__(self, image: np.ndarray) -> np.ndarray:
        return self.apply(image, self.draw(image.shape[1], image.shape[0]))


_ROW = struct.Struct("11d")


def encoded(steps: Sequence[OpRecord]) -> bytes:
    """For each step 11 doubles: operation, filter, fill (3), a (6), as native/augment.h reads them."""
    return b"".join([_ROW.pack(step.operation, step.filter, *step.fill, *step.a) for step in steps])


def _run(image: np.ndarray, steps: list[OpRecord]) -> np.ndarray:
    height, width, _ = image.shape
    image = np.ascontiguousarray(image)
    other = np.empty_like(image)
    where = library().swin_augment(
        ctypes.c_void_p(image.ctypes.data), ctypes.c_void_p(other.ctypes.data), height, width, encoded(steps),
        len(steps),
    )  # fmt: skip
    if where < 0:
        raise MemoryError(f"no memory to augment a picture of {width}×{height} pixels")
    return other if where else image


class Normalise:
    """torchvision's ToTensor and Normalize in one, to the bit."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        values = torch.arange(256).to(torch.float32).div(255)
        mean, std = (torch.tensor(tuple(each), dtype=torch.float32)[:, None] for each in (mean, std))
        self.table = (values - mean).div(std).contiguous()  # (3, 256)

    def __call__(self, image: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        """(H, W, 3) uint8 → (3, H, W) float32, into `out` (contiguous) where it is given."""
        height, width, _ = image.shape
        image = np.ascontiguousarray(image)
        out = torch.empty((3, height, width)) if out is None else out
        library().swin_normalise(
            ctypes.c_void_p(image.ctypes.data), ctypes.c_void_p(out.data_ptr()), height, width,
            ctypes.c_void_p(self.table.data_ptr()),
        )  # fmt: skip
        return out


# ------------------------------------------------------------------------------------------------ noting down


def _recording(reference: Any) -> Callable[[OpRecorder], OpRecorder] | None:
    """A copy of `reference` that takes notes instead of a picture; None where one of its operations is not known."""
    if isinstance(reference, ColorJitter):
        return None if reference.hue is not None else lambda notes: _note_jitter(reference, notes)
    if isinstance(reference, RandAugment):
        ops = [_recording_op(op) for op in reference.ops]
        return _RecordingRandAugment(ops, reference.num_layers, reference.choice_weights) if all(ops) else None
    if isinstance(reference, AutoAugment):
        policy = [[_recording_op(op) for op in ops] for ops in reference.policy]
        return AutoAugment(policy) if all(all(ops) for ops in policy) else None
    return None


class _RecordingRandAugment(RandAugment):
    """timm's, but where all operations are as likely it asks numpy for their numbers, which is what `choice` does too,
    after much ado about the list."""

    def __call__(self, notes: OpRecorder) -> OpRecorder:
        if self.choice_weights is not None:
            return super().__call__(notes)
        for i in np.random.randint(0, len(self.ops), self.num_layers):
            notes = self.ops[i](notes)
        return notes


def _recording_op(op: Any) -> AugmentOp | None:
    note = RECORDERS.get(op.aug_fn) if type(op) is AugmentOp else None
    if note is None:
        return None
    noting = copy.copy(op)
    noting.aug_fn = note
    return noting


def _note(operation: Operation) -> Callable[..., OpRecorder]:
    def note(notes: OpRecorder, argument: float = 0.0, **_: Any) -> OpRecorder:
        notes.steps.append(OpRecord(operation, a=(float(argument), 0.0, 0.0, 0.0, 0.0, 0.0)))
        return notes

    return note


def _note_posterize(notes: OpRecorder, bits_to_keep: int, **_: Any) -> OpRecorder:
    return notes if bits_to_keep >= 8 else _note(Operation.POSTERIZE)(notes, bits_to_keep)


def _note_solarize_add(notes: OpRecorder, add: int, thresh: int = 128, **_: Any) -> OpRecorder:
    if thresh != 128:
        notes.steps.append(lambda picture: timm_ops.solarize_add(picture, add, thresh))
        return notes
    return _note(Operation.SOLARIZE_ADD)(notes, add)


def _note_desaturate(notes: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    return _note(Operation.COLOR)(notes, min(1.0, max(0.0, 1.0 - factor)))


def _note_blur(notes: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    notes.steps.append(lambda picture: timm_ops.gaussian_blur(picture, factor))
    return notes


def _note_random_blur(notes: OpRecorder, factor: float, **_: Any) -> OpRecorder:
    return _note_blur(notes, timm_ops.random.uniform(0.1, 2.0 * factor))


def _note_affine(notes: OpRecorder, matrix: tuple[float, ...], resample: int, fillcolor: tuple[int, ...]) -> OpRecorder:
    notes.steps.append(OpRecord(Operation.AFFINE, FILTERS[resample], fillcolor, tuple(map(float, matrix))))
    return notes


def _moving(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Callable[..., OpRecorder]:
    """`matrix(argument, width, height)` as an operation of timm's, which draws one of its ways of interpolating."""

    def note(notes: OpRecorder, argument: float, **options: Any) -> OpRecorder:
        a = matrix(argument, *notes.size)
        timm_ops._check_args_tf(options)
        return _note_affine(notes, a, options["resample"], options["fillcolor"])

    return note


def _note_rotate(notes: OpRecorder, degrees: float, **options: Any) -> OpRecorder:
    """Pillow's Image.rotate: about the middle, with cosine and sine rounded; quarter turns are copies of pixels."""
    timm_ops._check_args_tf(options)
    width, height = notes.size
    degrees %= 360.0
    if degrees == 0:
        return notes
    turn = {180: (-1, 0, width, 0, -1, height)}
    if width == height:
        turn |= {90: (0, -1, width, 1, 0, 0), 270: (0, 1, 0, -1, 0, height)}
    if degrees in turn:
        return _note_affine(notes, turn[degrees], Image.Resampling.NEAREST, options["fillcolor"])
    angle = -math.radians(degrees)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    matrix = (
        cosine, sine, cosine * -x + sine * -y + 0.0 + x,
        round(-math.sin(angle), 15), cosine, round(-math.sin(angle), 15) * -x + cosine * -y + 0.0 + y,
    )  # fmt: skip
    return _note_affine(notes, matrix, options["resample"], options["fillcolor"])


def _note_jitter(jitter: ColorJitter, notes: OpRecorder) -> OpRecorder:
    order, *factors = ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
    operations = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.COLOR)
    for which in order.tolist():
        if which < len(operations) and factors[which] is not None:
            _note(operations[which])(notes, factors[which])
    return notes


RECORDERS: dict[Callable[..., Any], Callable[..., OpRecorder]] = {
    timm_ops.auto_contrast: _note(Operation.AUTO_CONTRAST),
    timm_ops.equalize: _note(Operation.EQUALIZE),
    timm_ops.invert: _note(Operation.INVERT),
    timm_ops.posterize: _note_posterize,
    timm_ops.solarize: _note(Operation.SOLARIZE),
    timm_ops.solarize_add: _note_solarize_add,
    timm_ops.color: _note(Operation.COLOR),
    timm_ops.contrast: _note(Operation.CONTRAST),
    timm_ops.brightness: _note(Operation.BRIGHTNESS),
    timm_ops.sharpness: _note(Operation.SHARPNESS),
    timm_ops.desaturate: _note_desaturate,
    timm_ops.gaussian_blur: _note_blur,
    timm_ops.gaussian_blur_rand: _note_random_blur,
    timm_ops.rotate: _note_rotate,
    timm_ops.shear_x: _moving(lambda factor, width, height: (1, factor, 0, 0, 1, 0)),
    timm_ops.shear_y: _moving(lambda factor, width, height: (1, 0, 0, factor, 1, 0)),
    timm_ops.translate_x_rel: _moving(lambda share, width, height: (1, 0, share * width, 0, 1, 0)),
    timm_ops.translate_y_rel: _moving(lambda share, width, height: (1, 0, 0, 0, 1, share * height)),
    timm_ops.translate_x_abs: _moving(lambda pixels, width, height: (1, 0, pixels, 0, 1, 0)),
    timm_ops.translate_y_abs: _moving(lambda pixels, width, height: (1, 0, 0, 0, 1, pixels)),
}
