"""Reading a file that is mapped into memory without keeping it there."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

KEPT = 32 << 20  # bytes that may stay in memory
AROUND = 1 << 16  # bytes that the system maps where one is read
_CHUNK = 1 << 20


class Pages:
    """The pages of a map that the process has read; nothing for an array in memory.

    The system counts them as the process's memory until they are released. Released, they stay in
    its cache of files as long as there is room.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        base: Any = array
        while base is not None and not isinstance(base, mmap.mmap):
            base = getattr(base, "base", None)
        self._map: mmap.mmap | None = base if hasattr(base, "madvise") else None  # not on Windows
        self._read = 0

    def read(self, n_bytes: int, places: int = 1) -> None:
        """Count bytes that were read in so many places, and release all pages when many are."""
        self._read += n_bytes + places * AROUND
        if self._map is not None and self._read > KEPT:
            self._map.madvise(mmap.MADV_DONTNEED)
            self._read = 0


def count_tokens(ids: npt.NDArray[Any], vocab_size: int) -> npt.NDArray[np.int64]:
    """Return how often each id occurs, (vocab_size,)."""
    counts, pages = np.zeros(vocab_size, dtype=np.int64), Pages(ids)
    for start in range(0, len(ids), _CHUNK):
        chunk = ids[start : start + _CHUNK]
        counts += np.bincount(chunk, minlength=vocab_size)
        pages.read(chunk.nbytes)
    return counts


def evenly_spread(ids: npt.NDArray[Any], most: int, pieces: int = 100) -> npt.NDArray[Any]:
    """Return all ids, (n,), if they are at most so many, else that many in some long pieces."""
    if len(ids) <= most:
        return ids
    length = max(1, most // pieces)
    starts = np.linspace(0, len(ids) - length, max(1, most // length)).astype(np.int64)
    return np.concatenate([ids[start : start + length] for start in starts])
