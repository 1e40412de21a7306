"""Decodes image files with Pillow to 8-bit RGB, or raises a `BadImage` that says why it cannot.

Every image that Pillow decodes without an error is accepted as it is, without EXIF rotation, as in the original recipe;
`upright` turns images, for DATA.EXIF_ORIENTATION. 16-bit values are scaled to 8 bits. All other images are refused: no
pixels are made up.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

# The format is found from the content, not from the file name: ImageNet has a PNG named .JPEG. Pillow supports more
# formats, but some of them start other programs to decode (EPS runs Ghostscript), and some have no signature (TGA), so
# that damaged files of another format pass as images.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF", "AVIF", "JPEG2000")

# The endings of files in these formats, in lower case. Other files in a folder of images are left out and counted.
EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".pbm", ".pgm", ".ppm", ".pnm", ".tif", ".tiff",
    ".webp", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
)  # fmt: skip


class BadImage(Exception):
    """An image that cannot be used, with its `path` and the `reason`. Picklable, so workers can raise it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(source: bytes | np.ndarray | Image.Image, path: str) -> Image.Image:
    """Decodes `source` (an encoded file, an image opened by some library, or (H, W, 3) uint8) to mode RGB.

    Raises:
        BadImage: the image is truncated, corrupt, not an image, larger than Pillow's limit against decompression bombs
            (178 million pixels), or has pixel values of unknown range (32-bit, floating point).
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    with _errors_named(path):
        image = _open(source)
        image.load()
        return _to_rgb(image)


def upright(source: bytes | np.ndarray | Image.Image, path: str) -> bytes | np.ndarray | Image.Image:
    """`source` itself, or the decoded image turned as its EXIF orientation says, as PIL.ImageOps.exif_transpose does.

    Raises:
        BadImage: the image or its EXIF data cannot be read.
    """
    if isinstance(source, np.ndarray):
        return source
    with _errors_named(path):
        image = _open(source)
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return source
        return _to_rgb(ImageOps.exif_transpose(image))


def _open(source: bytes | Image.Image) -> Image.Image:
    return source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)


@contextmanager
def _errors_named(path: str) -> Iterator[None]:
    """Turns every error but a lack of memory into a BadImage: for malformed files, Pillow raises almost any."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown; store them as 8 or 16 bit")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours; Pillow warns about the direct conversion
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    """Scales grey values of 0…65535 to 0…255 by dropping the low byte, as Pillow does for 16-bit colour."""
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit integer pixels, whose range is unknown; store them as 8 or 16 bit")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
