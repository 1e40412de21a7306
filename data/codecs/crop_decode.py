"""From an encoded image to the resized crop of it, by native code: the pixels that Pillow would make, to the bit.

A `Job` says which part of the image is resized to which size. JPEGs are decoded only where the job needs them. What the
native code does not take (other formats, progressive or CMYK JPEGs, truncated or corrupt files, anything odd) Pillow
decodes and judges.
"""

import ctypes
import io
import random
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

from data.codecs.pillow_decode import FORMATS, BadImage, decode
from data.codecs.tiled_jpeg import TiledJpeg
from data.native.library import library
from utils.compile_native import CannotBuild

Source = bytes | np.ndarray | Image.Image
OK, UNSUPPORTED, CHECK_WITH_PILLOW = range(3)  # the answers of native/image.h


class CropResizeParams(ctypes.Structure):
    """`left`, `top`, `width`, `height` of an image resized to `out_width` × `out_height`; of that the window of
    `window_width` × `window_height` at (`window_left`, `window_top`), mirrored if `flip`. All in pixels."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "left", "top", "width", "height", "out_width", "out_height",
            "window_left", "window_top", "window_width", "window_height", "bicubic", "flip",
        )
    ]  # fmt: skip


SampleParams = Callable[[int, int], CropResizeParams]  # width and height of an image → what to make of it


def decode_crop_resize(source: Source, path: str, plan: SampleParams, out: np.ndarray | None = None) -> np.ndarray:
    """(window height, window width, 3) uint8 of `source`, an encoded image, a picture or (H, W, 3) uint8.

    Args:
        out: memory for it, used where that saves copying.

    Raises:
        BadImage: as `data.codecs.pillow_decode.decode` does; `path` is what it calls the image.
    """
    job = None
    if isinstance(source, bytes) and source.startswith(b"\xff\xd8") and has_jpeg_decoder():
        size = _jpeg_size(source)
        if size is not None:
            job = plan(*size)
            made = _from_jpeg(source, size, job, out)
            if made is not None:
                return made
    pixels = source if isinstance(source, np.ndarray) else np.asarray(decode(source, path))
    height, width, _ = pixels.shape
    return _from_array(pixels, plan(width, height) if job is None else job, out)


def _jpeg_size(source: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that is fit for the native decoder, from its head."""
    if isinstance(source, TiledJpeg):
        return source.size
    size = (ctypes.c_int * 2)()
    answer = library().swin_jpeg_size(source, ctypes.c_long(len(source)), size)
    limit = Image.MAX_IMAGE_PIXELS
    if answer == UNSUPPORTED or limit is not None and size[0] * size[1] > limit:
        return None
    if answer == CHECK_WITH_PILLOW:
        try:
            Image.open(io.BytesIO(source), formats=FORMATS)
        except Exception:  # almost any; `decode` meets it again and says what it means
            return None
    return size[0], size[1]


def _from_jpeg(
    source: bytes, size: tuple[int, int], job: CropResizeParams, out: np.ndarray | None
) -> np.ndarray | None:
    width, height = size
    if isinstance(source, TiledJpeg):
        source, left, top = source.part(job.left, job.top, job.width, job.height)
        part = (ctypes.c_int * 2)()
        if library().swin_jpeg_size(source, ctypes.c_long(len(source)), part) != OK:
            return None
        width, height = part
        job = CropResizeParams(left, top, *(getattr(job, name) for name, _ in CropResizeParams._fields_[2:]))
    out = np.empty((job.window_height, job.window_width, 3), np.uint8) if out is None else out
    answer = library().swin_jpeg_resize(
        source, ctypes.c_long(len(source)), width, height, ctypes.byref(job), ctypes.c_void_p(out.ctypes.data)
    )
    return out if answer == OK else None


def _from_array(pixels: np.ndarray, job: CropResizeParams, out: np.ndarray | None) -> np.ndarray:
    height, width, _ = pixels.shape
    pixels = np.ascontiguousarray(pixels)
    out = np.empty((job.window_height, job.window_width, 3), np.uint8) if out is None else out
    answer = library().swin_resize(
        ctypes.c_void_p(pixels.ctypes.data), ctypes.c_long(3 * width), width, height, ctypes.byref(job),
        ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    return out if answer == OK else crop_resize_with_pillow(Image.fromarray(pixels), job)


def crop_resize_with_pillow(picture: Image.Image, job: CropResizeParams) -> np.ndarray:
    """The definition of right: the same by Pillow, as timm and torchvision ask it."""
    picture = picture.crop((job.left, job.top, job.left + job.width, job.top + job.height))
    filter = Image.Resampling.BICUBIC if job.bicubic else Image.Resampling.BILINEAR
    picture = picture.resize((job.out_width, job.out_height), filter)
    right, bottom = job.window_left + job.window_width, job.window_top + job.window_height
    picture = picture.crop((job.window_left, job.window_top, right, bottom))
    return np.asarray(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if job.flip else picture)


@cache
def has_jpeg_decoder() -> bool:
    """Whether there is a native library, and JPEGs decoded by it have Pillow's pixels here. Found out once.

    (Another libjpeg than the usual libjpeg-turbo, under some other Pillow, may interpolate chroma in another way.)
    """
    try:
        library()
    except CannotBuild:
        return False
    return _agrees_with_pillow()


def _agrees_with_pillow() -> bool:
    """Compares a few crops of each kind of chroma subsampling, pixel by pixel."""
    noise = np.frombuffer(random.Random(0).randbytes(12 * 15 * 3), np.uint8).reshape(12, 15, 3)
    picture = Image.fromarray(noise).resize((151, 117), Image.Resampling.BICUBIC)
    for subsampling in range(3):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", subsampling=subsampling, quality=90)
        try:
            whole = decode(buffer.getvalue(), "")
        except BadImage:
            return False
        for box in ((0, 0, 151, 117), (37, 41, 60, 50), (80, 3, 71, 113)):
            job = CropResizeParams(*box, *box[2:], 0, 0, *box[2:], 1, 0)
            made = _from_jpeg(buffer.getvalue(), whole.size, job, None)
            if made is None or not np.array_equal(made, crop_resize_with_pillow(whole, job)):
                return False
    return True
