"""The native part of the data path: C functions called through ctypes, which lets other threads run meanwhile.

Optional: where it cannot be compiled or loaded, `library()` says why and everything else works without it.
"""

import ctypes
from functools import cache

from data.native.build import CannotBuild, built

__all__ = ["CannotBuild", "library"]


def library() -> ctypes.CDLL:
    """The compiled library, loaded once in a process.

    Raises:
        CannotBuild: there is none here; the message says why, the same at every call.
    """
    loaded = _load()
    if isinstance(loaded, CannotBuild):
        raise loaded
    return loaded


@cache
def _load() -> ctypes.CDLL | CannotBuild:
    try:
        return ctypes.CDLL(str(built()))
    except CannotBuild as error:
        return error
    except OSError as error:
        return CannotBuild(f"the compiled library does not load: {error}")
