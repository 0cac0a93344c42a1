"""Keeps what the agent gives back to malloc from staying with it.

glibc keeps an arena for every thread and memory in the middle of a heap for ever. Fetching and indexing an image goes through
tens of megabytes in worker threads, and 45 MB of them stayed: 155 MB resident after an image of 100 MB, 110 with these settings
(measured with glibc 2.36), for no change in speed that could be measured.
"""

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
"""Parameter numbers of mallopt(3)."""
_TRIM_BYTES: Final = 128 << 10
_MMAP_BYTES: Final = 64 << 10
"""Blocks as large as one read from a connection are mapped, and so given back at once."""


def limit_malloc() -> bool:
    """Tune glibc's allocator; call before other threads start. False where the C library has no mallopt (musl)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_ARENA_MAX, 1), (_M_TRIM_THRESHOLD, _TRIM_BYTES), (_M_MMAP_THRESHOLD, _MMAP_BYTES))
    return all([bool(mallopt(parameter, value)) for parameter, value in wanted])
