"""Memory that a step freed, kept for the next one."""

import ctypes

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def disable_malloc_trim() -> bool:
    """Has this process keep what is freed, large tensors too, instead of giving it back to the system.

    A step on a CPU allocates what the last one freed. If that went back in between, the system hands it out page by
    page again, each wiped: a tenth of a training step. The process then stays as large as it once was.

    Returns:
        Whether the C library could be told: glibc can, others are left as they are.
    """
    try:
        mallopt = ctypes.pythonapi.mallopt  # of the C library that Python runs on: nothing is loaded
    except AttributeError:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))
