"""Ends forked worker processes with the process that forked them, however that one ends.

Workers ignore the signals that the main process answers, SIGTERM among them, with which multiprocessing would end them.
"""

import atexit
import ctypes
import multiprocessing.util  # registers its exit function, which waits for children, before the one below
import os
import signal

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Has the kernel kill this process when the thread that forked it is gone. To be called in the worker (Linux)."""
    parent = multiprocessing.parent_process()
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)  # it was gone already


@atexit.register
def _kill_children() -> None:
    """Kills the processes that multiprocessing forked here and that still run: it would wait for them."""
    children = multiprocessing.active_children()
    if children:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report each as a crash
    for child in children:
        child.kill()
