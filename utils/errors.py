"""Errors that are reported to the user as one message without a traceback, and the exit codes of all programs."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every program of this project."""

    OK = 0
    BUG = 1  # a fault of the program itself, shown with its traceback
    USER_ERROR = 2  # something the user can fix: flag, key, file, data, memory
    DIVERGED = 3  # training stopped because loss or gradients were no longer finite
    LOST_PROCESS = 4  # another process of the run was killed, stopped, hung, or ended with an error of its own
    INTERRUPTED = 130  # Ctrl-C
    CLOSED_PIPE = 141  # the reader of the output, such as `head`, exited


class UserError(Exception):
    """Something the user can fix. The message names the file, key or flag, and the way out."""

    exit_code = ExitCode.USER_ERROR


class TrainingDiverged(UserError):
    """Loss or gradients stayed non-finite for TRAIN.MAX_BAD_STEPS steps in a row."""

    exit_code = ExitCode.DIVERGED


class LostProcess(UserError):
    """Another process of the run is gone or does not answer. The same command continues from the last checkpoint."""

    exit_code = ExitCode.LOST_PROCESS
