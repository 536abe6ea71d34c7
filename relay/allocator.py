"""glibc's allocator, told to keep what it has.

By default glibc takes every block of 128 KiB and more from the kernel and gives it back on free,
so each read buffer and each frame costs page faults: 30 to 40 % of the daemon's CPU. Raised
thresholds keep such blocks on the heap. Resident memory stays bounded by what is in use at the
peak. On another C library, or without ``mallopt``, nothing happens and the daemon runs as well,
only dearer.
"""

import ctypes
from typing import Final

THRESHOLD: Final = 32 * 1024 * 1024
"""Bytes; glibc's own upper limit for the mmap threshold on 64-bit systems."""

# Parameter numbers from glibc's malloc.h; see mallopt(3).
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_TOP_PAD: Final = 1024 * 1024


def tune() -> bool:
    """Raise the thresholds for this process. Returns whether the C library took them."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    settings = (
        (_M_MMAP_THRESHOLD, THRESHOLD),
        (_M_TRIM_THRESHOLD, THRESHOLD),
        (_M_TOP_PAD, _TOP_PAD),
    )
    taken = [mallopt(parameter, value) for parameter, value in settings]
    return all(taken)
