"""Encoded bytes to an 8-bit RGB picture, or a `BadImage` that says why not.

Right first: whatever Pillow decodes without complaint is taken as it is (no EXIF rotation, as in the original
recipe), 16-bit values are scaled, and everything else is refused. Nothing here invents pixels.
"""

import io

import numpy as np
from PIL import Image

# Told apart by content, never by file ending: ImageNet has a PNG called .JPEG. Pillow knows more formats, but some of
# them start other programs to decode (EPS runs Ghostscript), which no training image has a reason to do.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF")


class BadImage(Exception):
    """An image that cannot be used: `path` says which, `reason` why. Picklable, so workers can raise it."""

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode(source: bytes | np.ndarray | Image.Image, path: str) -> Image.Image:
    """Decodes `source` (an encoded file, a picture that some library opened already, or (H, W, 3) uint8) to mode RGB.

    Raises:
        BadImage: truncated, corrupt, not an image, so large that it is a decompression bomb (Pillow's limit,
            178 million pixels), or with pixel values whose range is unknown (32-bit, floating point).
    """
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    try:
        picture = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source), formats=FORMATS)
        picture.load()
        return _to_rgb(picture)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins answer malformed files with almost any exception, all meaning this
        reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise BadImage(path, reason or type(error).__name__) from error


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown; store them as 8 or 16 bit")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_16_bit(picture)
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # the same colours; Pillow warns about the direct way
    return picture.convert("RGB")


def _from_16_bit(picture: Image.Image) -> Image.Image:
    """Scales greys of 0…65535 to 0…255 by dropping the low byte, as Pillow itself does for 16-bit colour."""
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("32-bit integer pixels, whose range is unknown; store them as 8 or 16 bit")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
