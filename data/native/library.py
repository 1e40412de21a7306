"""Loads the C library of the data path. README.md in this folder describes the library.

The functions are called through ctypes, which releases Python's global lock meanwhile. The library is optional: if it
cannot be compiled or loaded, `library()` raises an error that says why, and Pillow and timm prepare the images.
"""

import ctypes
from pathlib import Path

import numpy as np

from utils.compile_native import NativeLibrary

HOW_TO_INSTALL = "install a C compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)"

_LIBRARY = NativeLibrary(
    purpose="the native library of the data path",
    folder=Path(__file__).parent,
    language="c",
    # No contraction: a fused multiply-add rounds once, Pillow's and torch's own code rounds twice.
    flags=("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fwrapv"),
    libraries=("-lm",),
)


def library() -> ctypes.CDLL:
    """Returns the compiled library, loaded once in a process.

    Raises:
        CannotBuild: the library cannot be compiled or loaded; the message says why, the same at every call.
    """
    return _LIBRARY.load()


def address(array: np.ndarray, shape: tuple[int, ...], dtype: type) -> ctypes.c_void_p:
    """The address of a contiguous array for the C functions, which trust it and check no sizes.

    Raises:
        ValueError: `array` has another shape or dtype, is empty, or is not contiguous.
    """
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous or not array.size:
        raise ValueError(
            f"the native library needs a contiguous array of {np.dtype(dtype)} and shape {shape}, not {array.dtype} "
            f"{array.shape} with strides {array.strides}"
        )
    return ctypes.c_void_p(array.ctypes.data)


def image_address(pixels: np.ndarray) -> tuple[ctypes.c_void_p, int, int]:
    """Address, height and width of a contiguous image (H, W, 3) uint8. Raises ValueError for anything else."""
    height, width = pixels.shape[:2] if pixels.ndim == 3 else (0, 0)
    return address(pixels, (height, width, 3), np.uint8), height, width
