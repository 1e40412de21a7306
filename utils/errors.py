"""Errors that are said to a person in one message, without a traceback.

Exit codes of the program: 0 done, 1 a fault of the program itself (with its traceback), 2 something the user can
mend (flag, key, file, data, memory), 3 training stopped because its numbers were no longer finite, 4 another process
of the run was lost (killed, stopped, hung, or ended by an error of its own), 130 interrupted by hand.
"""


class UserError(Exception):
    """Something the user can mend. The message names the file, key or flag, and the way out."""

    exit_code = 2


class TrainingDiverged(UserError):
    """Loss or gradients stayed non-finite for TRAIN.MAX_BAD_STEPS updates in a row."""

    exit_code = 3


class LostProcess(UserError):
    """Another process of the run is gone or does not answer. The same command continues from the last checkpoint."""

    exit_code = 4
