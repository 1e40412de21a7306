"""Refuses images so long and thin that resizing their short side would take more memory than a decompression bomb.

An image of 1 × 20,000 pixels, of which a file has 200 bytes, becomes 256 × 5,120,000 before the centre crop: 5.3 GiB.
The limit is Pillow's for the decoded image, applied to the resized one, in all backends alike.
"""

from collections.abc import Sequence

from PIL import Image
from timm.data.transforms import ResizeKeepRatio
from torchvision import transforms

from data.codecs.pillow_decode import BadImage
from data.transforms.reference import Transform
from utils.compat import torchvision_eval_preset_type


def scale_short_side(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height after resizing the shorter one to `short_side`, rounded as by torchvision."""
    short, long = sorted((width, height))
    sides = short_side, int(short_side * long / short)
    return sides if width <= height else sides[::-1]


def check_resized(size: tuple[int, int], resized: tuple[int, int], path: str) -> None:
    """Raises BadImage if an image of `size` (width, height) cannot become one of `resized`."""
    described = f"is too long and thin ({size[0]} x {size[1]} pixels): resized, it would have"
    if min(resized) < 1:
        raise BadImage(path, f"{described} {resized[0]} x {resized[1]} pixels")
    limit = Image.MAX_IMAGE_PIXELS  # Pillow warns above this, and refuses twice as many
    pixels = resized[0] * resized[1]
    if limit is not None and pixels > 2 * limit:
        raise BadImage(path, f"{described} {pixels / 1e6:,.0f} million pixels, and {2 * limit / 1e6:,.0f} are allowed")


class ResizeLimit:
    """Checks images before a transform of timm or torchvision that begins by resizing."""

    def __init__(self, transform: Transform | Sequence[object]):
        """`transform`: or its steps."""
        self.short_side: int | None = None
        self.keep_ratio: ResizeKeepRatio | None = None
        if isinstance(transform, torchvision_eval_preset_type()):
            self.short_side = _single(transform.resize_size)
            return
        steps = transform if isinstance(transform, Sequence) else getattr(transform, "transforms", ())
        first = next(iter(steps), None)
        if isinstance(first, transforms.Resize):
            self.short_side = _single(first.size)
        elif isinstance(first, ResizeKeepRatio):
            self.keep_ratio = first

    def check(self, image: Image.Image, path: str) -> None:
        """Raises BadImage for an image that would become too large, or have no pixels."""
        if self.short_side is not None:
            check_resized(image.size, scale_short_side(*image.size, self.short_side), path)
        elif self.keep_ratio is not None:
            height, width = ResizeKeepRatio.get_params(image, self.keep_ratio.size, self.keep_ratio.longest)
            check_resized(image.size, (width, height), path)


def _single(size: int | Sequence[int]) -> int | None:
    """The side that torchvision's Resize takes as the short one; None for a height and a width."""
    if isinstance(size, int):
        return size
    return size[0] if len(size) == 1 else None
