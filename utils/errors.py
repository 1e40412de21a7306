"""Errors that are said to a person in one message, without a traceback.

Exit codes of the program: 0 done, 1 a fault of the program itself (with its traceback), 2 something the user can
mend (flag, key, file, data), 3 training stopped because its numbers were no longer finite, 130 interrupted by hand.
"""


class UserError(Exception):
    """Something the user can mend. The message names the file, key or flag, and the way out."""

    exit_code = 2


class TrainingDiverged(UserError):
    """Loss or gradients stayed non-finite for TRAIN.MAX_BAD_STEPS updates in a row."""

    exit_code = 3
