"""Loads the C library of the data path. README.md in this folder describes the library.

The functions are called through ctypes, which releases Python's global lock meanwhile. The library is optional: if it
cannot be compiled or loaded, `library()` raises an error that says why, and Pillow and timm prepare the images.
"""

import ctypes
from pathlib import Path

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
