"""The C library's heaps."""

from __future__ import annotations

import ctypes

M_ARENA_MAX = -8  # malloc.h
MOST = 2


def share_heaps() -> None:
    """Let the daemon's threads share two heaps; glibc would give each a heap of its own that never becomes smaller (mallopt(3))."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(M_ARENA_MAX, MOST)
