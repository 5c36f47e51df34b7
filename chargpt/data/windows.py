"""Windows and batches of a corpus. Only here are targets made: the inputs shifted by one.

Token ids stay where they are, in memory or in a file that is mapped into memory: only a batch is
copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chargpt.base.errors import UserError
from chargpt.data.mapped import Pages
from chargpt.data.permutation import ROUNDS, permuted

SORTED = 1 << 20  # most windows whose order is an array; that of more takes no memory
Ints = npt.NDArray[np.int64]


class Batch(NamedTuple):
    """Token ids and the ids that follow them."""

    inputs: Tensor
    """(B, T), int64."""
    targets: Tensor
    """(B, T), int64: ``targets[:, t]`` follows ``inputs[:, t]`` in the text."""


class Windows:
    """Numbered training sequences: sequence `i` is a function of (seed, i), so any step can resume.

    Each epoch cuts `tokens`, (n,), into disjoint windows of `block_size` T, from a random start, in
    a random order. It visits every token once, except fewer than 2 T tokens at the ends. Fewer than
    T + 1 tokens are a UserError.
    """

    def __init__(self, tokens: npt.NDArray[Any], block_size: int, seed: int) -> None:
        if len(tokens) <= block_size:
            raise UserError(
                f"the text is too short: {len(tokens)} tokens to train on, and block_size "
                f"{block_size} needs {block_size + 1}; give more text, or a --block-size below "
                f"{len(tokens)}"
            )
        self.tokens = tokens
        self.block_size = block_size
        self.seed = seed
        # One window less than would fit, so that the start can vary over a whole block.
        self.per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._starts = len(tokens) - self.per_epoch * block_size
        # The last epoch, its shift, and the order of its windows, or the keys of a large one's.
        self._drawn: tuple[int, int, npt.NDArray[Any]] = -1, 0, np.array([])
        self._pages = Pages(tokens)

    def batch(self, first: int, count: int) -> Batch:
        """Return sequences `first` … `first + count - 1`, shapes (count, T)."""
        length = self.block_size + 1
        starts = self.starts(first, count)
        windows = np.stack([self.tokens[start : start + length] for start in starts])  # (B, T + 1)
        self._pages.read(windows.nbytes, count)
        ids = torch.from_numpy(windows.astype(np.int64))
        return Batch(ids[:, :-1], ids[:, 1:])

    def starts(self, first: int, count: int) -> Ints:
        """Return where sequences `first` … `first + count - 1` start in the text, (count,)."""
        numbers = np.arange(first, first + count)
        starts = np.empty_like(numbers)
        epochs, places = np.divmod(numbers, self.per_epoch)
        for epoch in np.unique(epochs):
            starts[epochs == epoch] = self._starts_in(int(epoch), places[epochs == epoch])
        return starts

    def _starts_in(self, epoch: int, places: Ints) -> Ints:
        """Return where the windows at some places of an epoch's order start, (n,)."""
        is_large = self.per_epoch > SORTED
        if self._drawn[0] != epoch:
            # The raw stream of a counter-based generator is the same in every version of numpy.
            key = np.array([self.seed, epoch], dtype=np.uint64)
            draws = np.random.Philox(key=key).random_raw(
                1 + (ROUNDS if is_large else self.per_epoch)
            )
            order: npt.NDArray[Any] = draws[1:]
            if not is_large:
                order = np.argsort(order, kind="stable")
            self._drawn = epoch, int(draws[0] % np.uint64(self._starts)), order
        _, shift, order = self._drawn
        windows: Ints = permuted(places, self.per_epoch, order) if is_large else order[places]
        return shift + windows * self.block_size


def blocks(tokens: npt.NDArray[Any], block_size: int, batch_size: int) -> Iterator[Batch]:
    """Yield disjoint windows in order; each token but the first is a target once.

    Windows of (n,) tokens have length `block_size`; a shorter last one forms its own batch.
    """
    pages = Pages(tokens)
    n_full = (len(tokens) - 1) // block_size
    for start in range(0, n_full, batch_size):
        count = min(batch_size, n_full - start)
        piece = tokens[start * block_size : (start + count) * block_size + 1]
        pages.read(piece.nbytes)
        ids = torch.from_numpy(piece.astype(np.int64))
        yield Batch(ids[:-1].view(count, block_size), ids[1:].view(count, block_size))
    rest = torch.from_numpy(tokens[n_full * block_size :].astype(np.int64))
    if len(rest) > 1:
        yield Batch(rest[None, :-1], rest[None, 1:])
