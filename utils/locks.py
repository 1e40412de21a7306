"""Locks between processes, on file systems that have them; elsewhere a warning, and work goes on without."""

import errno
import fcntl
import logging
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

Lock = Callable[[int, int], object]  # fcntl.lockf or fcntl.flock

_HELD = frozenset((errno.EACCES, errno.EAGAIN))  # POSIX allows both for lockf


def try_lock(lock: Lock, file: int, path: Path, consequence: str) -> bool:
    """Locks the open `file` exclusively, without waiting. Returns False if another process holds the lock.

    Network and FUSE file systems may have no locks: ENOLCK, ENOSYS, EOPNOTSUPP, and EBADF for folders on NFS. Then it
    logs a warning and returns True.

    Args:
        path: of the file, for the warning.
        consequence: what is not noticed without locks, for the warning.
    """
    return _acquire(lock, file, fcntl.LOCK_EX | fcntl.LOCK_NB, path, consequence)


def wait_for_lock(lock: Lock, file: int, path: Path, consequence: str) -> None:
    """Locks the open `file` exclusively, and waits while another process holds the lock. See `try_lock`."""
    _acquire(lock, file, fcntl.LOCK_EX, path, consequence)


def _acquire(lock: Lock, file: int, operation: int, path: Path, consequence: str) -> bool:
    try:
        lock(file, operation)
    except OSError as error:
        if error.errno in _HELD:
            return False
        log.warning("%s: this file system has no locks (%s), so %s", path, error.strerror, consequence)
    return True
