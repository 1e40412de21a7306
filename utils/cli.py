"""What the programs of this project have in common where they meet a person: numbers that were typed, and what is said
of errors that are not the program's. Imports nothing that takes time.
"""

import argparse
import errno
import math
import sys
from collections.abc import Callable

from utils.errors import UserError

# Errors of the machine, not of the program: full, read-only or broken disks, missing rights, limits reached.
_MACHINE = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOMEM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
    errno.EEXIST,
))  # fmt: skip

LESS_MEMORY = "a smaller --batch-size"


def as_user_error(error: Exception, less_memory: str = LESS_MEMORY) -> UserError | None:
    """What to say of an `error` that memory, disk or rights are the cause of; None for any other.

    Args:
        less_memory: what takes less memory.
    """
    # By name, since torch is not imported here; it has a class for GPUs alone. What happened in a loading process comes
    # as a RuntimeError where the original error cannot be made again, and names the original.
    said = (str(error).splitlines() or ["there is no more"])[0]
    by_name = type(error).__name__ == "OutOfMemoryError" or "CPUAllocator" in str(error) or "Caught MemoryError" in said
    if isinstance(error, MemoryError) or by_name:
        return UserError(f"out of memory: {said} Ways out: {less_memory}")
    if isinstance(error, OSError) and error.errno in _MACHINE:
        where = "" if error.filename is None else f"{error.filename}: "
        return UserError(f"{where}{error.strerror}. Make room or mend the rights there, or give another place")
    return None


def run_cli(program: Callable[[], int]) -> int:
    """The exit code of `program`; what a person can mend is said in one message, without a traceback."""
    try:
        return program()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        said = error if isinstance(error, UserError) else as_user_error(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        return said.exit_code


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """For argparse: a number of `kind` from `low` to `high`, both included."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:50]!r} is no number from {low:g} to {high:g}")
        return value

    return convert
