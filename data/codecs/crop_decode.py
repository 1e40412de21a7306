"""Decodes, crops and resizes images with the native library, bit-equal to Pillow.

    image = OpenedImage(source, path)               # reads the header of a JPEG, decodes everything else
    params = CropResizeParams(left=…, top=…, …)     # sampled by the transform, which needs image.size
    pixels = image.crop_resize(params)              # (window height, window width, 3) uint8

A JPEG is decoded only where the crop needs it. Pillow decodes, or refuses, what the native decoder does not support:
other formats, progressive and CMYK JPEGs, truncated, corrupt and unusual files.
"""

import ctypes
import io
import random
from functools import cache

import numpy as np
from PIL import Image

from data.codecs.pillow_decode import FORMATS, BadImage, decode
from data.codecs.tiled_jpeg import TiledJpeg
from data.native.library import address, image_address, library
from utils.compile_native import CannotBuild

Source = bytes | np.ndarray | Image.Image  # an encoded image, (H, W, 3) uint8, or an image opened by some library
OK, UNSUPPORTED, CHECK_WITH_PILLOW = range(3)  # status codes of native/image.h
MAX_JPEG_SIDE = 65500  # pixels; libjpeg, and so Pillow, refuses larger JPEGs


class CropResizeParams(ctypes.Structure):
    """The crop (`left`, `top`, `width`, `height`) is resized to `out_width` × `out_height`. The output is the window of
    `window_width` × `window_height` at (`window_left`, `window_top`) of that, mirrored if `flip`. All in pixels."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "left", "top", "width", "height", "out_width", "out_height",
            "window_left", "window_top", "window_width", "window_height", "bicubic", "flip",
        )
    ]  # fmt: skip

    def moved_to(self, left: int, top: int) -> "CropResizeParams":
        """The same for an image in which the crop is at (`left`, `top`)."""
        return CropResizeParams(left, top, *(getattr(self, name) for name, *_ in self._fields_[2:]))


class OpenedImage:
    """An image of known size. The pixels of a JPEG are decoded when `crop_resize` needs them.

    Attributes:
        size: width and height, in pixels.
    """

    def __init__(self, source: Source, path: str):
        """Raises BadImage if the image has to be decoded as a whole and cannot be; `path` names it in the error."""
        self._source = source
        self._path = path
        self._pixels: np.ndarray | None = None  # (H, W, 3) uint8, once the whole image is decoded
        self._jpeg: bytes | None = None  # the image, if the native decoder supports it
        if isinstance(source, bytes) and source.startswith(b"\xff\xd8") and has_jpeg_decoder():
            size = _jpeg_size(source)
            if size is not None:
                self._jpeg, self.size = source, size
        if self._jpeg is None:
            height, width, _ = self._decoded().shape
            self.size = width, height

    def crop_resize(self, params: CropResizeParams, out: np.ndarray | None = None) -> np.ndarray:
        """Returns (window height, window width, 3) uint8.

        Args:
            out: memory for the result; used if that saves a copy.

        Raises:
            BadImage: the image cannot be decoded.
        """
        if self._jpeg is not None:
            pixels = _crop_resize_jpeg(self._jpeg, self.size, params, out)
            if pixels is not None:
                return pixels
        return _crop_resize_array(self._decoded(), params, out)

    def _decoded(self) -> np.ndarray:
        if self._pixels is None:
            source = self._source
            self._pixels = source if isinstance(source, np.ndarray) else np.asarray(decode(source, self._path))
        return self._pixels


def _jpeg_size(source: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG, from its header; None if the native decoder does not support it."""
    size = (ctypes.c_int * 2)()
    if isinstance(source, TiledJpeg):
        status = OK
        size[:] = list(source.size)
    else:
        status = library().swin_jpeg_size(source, ctypes.c_long(len(source)), size)
    limit = Image.MAX_IMAGE_PIXELS
    if status == UNSUPPORTED or max(size) > MAX_JPEG_SIDE or limit is not None and size[0] * size[1] > limit:
        return None
    if status == CHECK_WITH_PILLOW:
        try:
            Image.open(io.BytesIO(source), formats=FORMATS)
        except Exception:  # almost any type; `decode` raises it again and turns it into a BadImage
            return None
    return size[0], size[1]


def _crop_resize_jpeg(
    source: bytes, size: tuple[int, int], params: CropResizeParams, out: np.ndarray | None
) -> np.ndarray | None:
    """Decodes and resizes the crop of a JPEG of `size`; None if the native decoder does not support it."""
    width, height = size
    if isinstance(source, TiledJpeg):
        source, left, top = source.part(params.left, params.top, params.width, params.height)
        part_size = (ctypes.c_int * 2)()
        if library().swin_jpeg_size(source, ctypes.c_long(len(source)), part_size) != OK:
            return None
        width, height = part_size
        params = params.moved_to(left, top)
    out, to = _output(params, out)
    status = library().swin_jpeg_resize(source, ctypes.c_long(len(source)), width, height, ctypes.byref(params), to)
    return out if status == OK else None


def _crop_resize_array(pixels: np.ndarray, params: CropResizeParams, out: np.ndarray | None) -> np.ndarray:
    pixels = np.ascontiguousarray(pixels)
    from_, height, width = image_address(pixels)
    out, to = _output(params, out)
    status = library().swin_resize(from_, ctypes.c_long(3 * width), width, height, ctypes.byref(params), to)
    return out if status == OK else crop_resize_with_pillow(Image.fromarray(pixels), params)


def _output(params: CropResizeParams, out: np.ndarray | None) -> tuple[np.ndarray, ctypes.c_void_p]:
    """`out`, or memory for the result if it is None, and its address. Raises ValueError if `out` does not fit."""
    shape = params.window_height, params.window_width, 3
    out = np.empty(shape, np.uint8) if out is None else out
    return out, address(out, shape, np.uint8)


def crop_resize_with_pillow(image: Image.Image, params: CropResizeParams) -> np.ndarray:
    """The reference: the same with Pillow, called as timm and torchvision call it."""
    image = image.crop((params.left, params.top, params.left + params.width, params.top + params.height))
    resample = Image.Resampling.BICUBIC if params.bicubic else Image.Resampling.BILINEAR
    image = image.resize((params.out_width, params.out_height), resample)
    right, bottom = params.window_left + params.window_width, params.window_top + params.window_height
    image = image.crop((params.window_left, params.window_top, right, bottom))
    return np.asarray(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if params.flip else image)


@cache
def has_jpeg_decoder() -> bool:
    """Whether the native library is available and decodes JPEGs to the pixels of Pillow. Checked once.

    Pillow with another libjpeg than the usual libjpeg-turbo may interpolate chroma in another way.
    """
    try:
        library()
    except CannotBuild:
        return False
    return _agrees_with_pillow()


def _agrees_with_pillow() -> bool:
    """Compares a few crops for each kind of chroma subsampling, pixel by pixel."""
    noise = np.frombuffer(random.Random(0).randbytes(12 * 15 * 3), np.uint8).reshape(12, 15, 3)
    image = Image.fromarray(noise).resize((151, 117), Image.Resampling.BICUBIC)
    for subsampling in range(3):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", subsampling=subsampling, quality=90)
        try:
            expected = decode(buffer.getvalue(), "")
        except BadImage:
            return False
        for box in ((0, 0, 151, 117), (37, 41, 60, 50), (80, 3, 71, 113)):
            params = CropResizeParams(*box, *box[2:], 0, 0, *box[2:], bicubic=1, flip=0)
            found = _crop_resize_jpeg(buffer.getvalue(), expected.size, params, None)
            if found is None or not np.array_equal(found, crop_resize_with_pillow(expected, params)):
                return False
    return True
