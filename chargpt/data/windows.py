"""Windows and batches of a corpus. Only here are targets made: the inputs shifted by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chargpt.base.errors import UserError


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
        self.tokens = compact(tokens)
        self.block_size = block_size
        self.seed = seed
        # One window less than would fit, so that the start can vary over a whole block.
        self.per_epoch = max(1, (len(tokens) - block_size) // block_size)
        self._starts = len(tokens) - self.per_epoch * block_size
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def batch(self, first: int, count: int) -> Batch:
        """Return sequences `first` … `first + count - 1`, shapes (count, T)."""
        starts = torch.tensor([self._start(number) for number in range(first, first + count)])
        offsets = torch.arange(self.block_size + 1)
        windows = self.tokens[starts[:, None] + offsets].long()  # (B, T + 1)
        return Batch(windows[:, :-1], windows[:, 1:])

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_starts(epoch))
        return int(self._order[1][place])

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the start of each window of an epoch, in training order."""
        # The raw stream of a counter-based generator is the same in every version of numpy.
        key = np.array([self.seed, epoch], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(self.per_epoch + 1)
        shift = int(draws[0] % np.uint64(self._starts))
        return shift + np.argsort(draws[1:], kind="stable") * self.block_size


def blocks(tokens: npt.NDArray[Any], block_size: int, batch_size: int) -> Iterator[Batch]:
    """Yield disjoint windows in order; each token but the first is a target once.

    Windows of (n,) tokens have length `block_size`; a shorter last one forms its own batch.
    """
    ids = compact(tokens)  # (n,)
    n_full = (len(ids) - 1) // block_size
    inputs = ids[: n_full * block_size].view(n_full, block_size)
    targets = ids[1 : n_full * block_size + 1].view(n_full, block_size)
    for start in range(0, n_full, batch_size):
        end = start + batch_size
        yield Batch(inputs[start:end].long(), targets[start:end].long())
    rest = ids[n_full * block_size :].long()
    if len(rest) > 1:
        yield Batch(rest[None, :-1], rest[None, 1:])


def compact(tokens: npt.NDArray[Any]) -> Tensor:
    """Return token ids in the smallest type that torch can index, (n,): uint8 or int32."""
    return torch.from_numpy(tokens if tokens.dtype == np.uint8 else tokens.astype(np.int32))
