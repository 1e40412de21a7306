"""The native part of the data path: C functions called through ctypes, which lets other threads run meanwhile.

Optional: where it cannot be compiled or loaded, `library()` says why and everything else works without it.
"""

import ctypes
from pathlib import Path

from utils.compile_native import NativeLibrary

HOW_TO_INSTALL = "install a C compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)"

_LIBRARY = NativeLibrary(
    purpose="the native part of the data path",
    folder=Path(__file__).parent,
    language="c",
    # No contraction: a fused multiply-add rounds once where Pillow's and torch's own code rounds twice.
    flags=("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fwrapv"),
    libraries=("-lm",),
)


def library() -> ctypes.CDLL:
    """The compiled library, loaded once in a process.

    Raises:
        CannotBuild: there is none here; the message says why, the same at every call.
    """
    return _LIBRARY.load()
