"""Command-line helpers shared by all programs: the parser, numbers with bounds, and errors turned into exit codes.

Imports nothing slow, so that `--help` and mistakes are answered at once.
"""

import argparse
import errno
import logging
import math
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from utils.errors import ExitCode, UserError
from utils.paths import expand_user

# Errors of the machine, not of the program: full, read-only or broken disks, missing permissions, limits reached.
_MACHINE_ERRNOS = frozenset((
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE,
    errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOMEM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT,
    errno.EEXIST,
))  # fmt: skip

LESS_MEMORY = "a smaller --batch-size"


class CliParser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError instead of printing its usage and exiting.

    `prog` is the command as it is typed, such as "python -m tools.pack_dataset".
    """

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` lists all flags, with examples.")


def number(element: type[int] | type[float], low: float, high: float) -> Callable[[str], float]:
    """Makes an argparse `type`: a number of type `element` from `low` to `high`, both included."""

    def convert(text: str) -> float:
        try:
            value = element(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text[:50]!r} is no number from {low:g} to {high:g}")
        return value

    return convert


def user_path(text: str) -> Path:
    """An argparse `type`: a path, in which a leading `~` is the home folder."""
    try:
        return Path(expand_user(text, "path"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def user_path_or_empty(text: str) -> str:
    """An argparse `type`: as `user_path`, for flags of which '' means "none"."""
    return text and str(user_path(text))


def as_user_error(error: Exception, less_memory: str = LESS_MEMORY) -> UserError | None:
    """Translates an error caused by memory, disk or permissions; None for any other error.

    Args:
        less_memory: the flags that reduce memory use, for the message.
    """
    # Matched by name, because torch is not imported here and has an exception class for GPUs only. An error of a loader
    # worker may arrive as a RuntimeError whose message names the original.
    message = (str(error).splitlines() or ["there is no more"])[0]
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "CPUAllocator" in str(error)
        or "Caught MemoryError" in message
    ):
        return UserError(f"out of memory: {message} Ways out: {less_memory}")
    if isinstance(error, OSError) and error.errno in _MACHINE_ERRNOS:
        file = "" if error.filename is None else f"{error.filename}: "
        return UserError(f"{file}{error.strerror}. Free some space, fix the permissions, or choose another path")
    return None


def run_cli(program: Callable[[], int]) -> int:
    """Runs `program` and returns its exit code. Errors the user can fix are printed without a traceback."""
    try:
        code = program()
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except (UserError, MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _discard_closed_stdout():
            return ExitCode.CLOSED_PIPE
        user_error = error if isinstance(error, UserError) else as_user_error(error)
        if user_error is None:
            raise
        print(f"error: {user_error}", file=sys.stderr)
        return user_error.exit_code


class _StdoutHandler(logging.StreamHandler):
    """Logs to stdout, and to nowhere once its reader has exited: the program continues."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not (isinstance(sys.exc_info()[1], BrokenPipeError) and _discard_closed_stdout()):
            super().handleError(record)


def log_to_stdout() -> None:
    """Sets up logging for a program whose messages are its output."""
    handler = _StdoutHandler(sys.stdout)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


def _discard_closed_stdout() -> bool:
    """Redirects stdout to nowhere if its reader, such as `head`, has exited. Returns whether it has."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails too
    return closed
