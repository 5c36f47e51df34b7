"""A random order of any number of things that takes no memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

ROUNDS = 6
Ints = npt.NDArray[np.int64]


def permuted(places: Ints, size: int, keys: Sequence[int] | npt.NDArray[np.uint64]) -> Ints:
    """Return where a permutation of 0 … `size` - 1 puts each of `places`, (n,).

    The `keys`, `ROUNDS` random 64-bit numbers, choose the permutation. It is a Feistel network,
    which permutes 0 … 4^h - 1; a number that falls outside is permuted again until it is inside
    (Black & Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, (size - 1).bit_length() + 1) // 2)  # bits: h
    numbers = places.astype(np.uint64)
    outside = np.ones(len(numbers), dtype=bool)
    while outside.any():
        numbers[outside] = _encrypted(numbers[outside], half, np.asarray(keys, dtype=np.uint64))
        outside = numbers >= size
    return numbers.astype(np.int64)


def _encrypted(
    numbers: npt.NDArray[np.uint64], half: np.uint64, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = numbers >> half, numbers & mask
    for key in keys:
        left, right = right, left ^ (_mixed(right + key) & mask)
    return (left << half) | right


def _mixed(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return numbers each of whose bits depends on all bits (MurmurHash3's last step)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        numbers = (numbers ^ (numbers >> np.uint64(33))) * np.uint64(factor)
    return numbers ^ (numbers >> np.uint64(33))
