"""The loss of a model over a text in disjoint blocks, or over an evenly spread part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chargpt.compute.world import ALONE, World
from chargpt.data.mapped import Pages
from chargpt.engine.scoring import BATCH_SIZE, check_stride, score_windows, windows

_SUMS = 1000  # parts that are kept apart


def evaluate(
    model: nn.Module,
    tokens: npt.NDArray[Any],
    block_size: int,
    *,
    most: int | None = None,
    stride: int = 0,
    batch_size: int = BATCH_SIZE,
    autocast: AbstractContextManager[Any] | None = None,
    world: World = ALONE,
    advance: Callable[[int], None] = lambda n: None,
) -> float:
    """Return the mean loss over the tokens, in nats per token.

    Args:
        model: maps ids (B, T) to logits (B, T, V); stays in its mode.
        tokens: token ids, (n,) with n ≥ 2.
        block_size: T, tokens per block. Each block starts without context.
        most: if there are more tokens, only as many whole blocks as fit are scored; they are spread
            evenly, and the same every time.
        stride: 1 to T: score overlapping windows (see `chargpt.engine.scoring`); 0: blocks.
        batch_size: blocks per forward pass; changes speed and memory only.
        autocast: a reusable context for each forward pass, such as a `torch.autocast`.
        world: the processes that share the work; all must call this, and each gets the result.
        advance: called with about the number of tokens that all processes have just scored.

    Raises:
        UserError: a stride outside 0 … T.
    """
    check_stride(stride, block_size)
    total = _Sum(next(model.parameters()).device)
    counts: list[int] = []  # of each batch, what is not padding

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        if stride:
            for inputs, targets in windows(tokens, block_size, stride, batch_size):
                counts.append(targets.numel())
                yield inputs, targets
        else:
            for inputs, targets, count in _shares(tokens, block_size, most, batch_size, world):
                counts.append(count)
                yield inputs, targets

    def take(nats: Tensor) -> None:
        total.add(nats[: counts[-1]])
        advance(counts[-1] * world.size)

    score_windows(model, batches(), take, autocast)
    nats, n = world.total(total.nats, total.count)
    return nats / n


class _Sum:
    """A sum in float64 that stays on the device: copying each part would make a GPU wait."""

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._parts: list[Tensor] = []
        self._dtype = torch.float64 if device.type != "mps" else None  # which has none

    def add(self, values: Tensor) -> None:
        self.count += len(values)
        self._parts.append(values.sum(dtype=self._dtype))
        if len(self._parts) == _SUMS:
            self._parts = [torch.stack(self._parts).sum()]

    @property
    def nats(self) -> float:
        return float(torch.stack(self._parts).cpu().sum(dtype=torch.float64))


def scored_tokens(n_tokens: int, block_size: int, most: int | None) -> int:
    """Return how many of the tokens `evaluate` scores."""
    if most is None or n_tokens <= most:
        return n_tokens - 1
    return max(1, most // block_size) * block_size


def _shares(
    tokens: npt.NDArray[Any], block_size: int, most: int | None, batch_size: int, world: World
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield this rank's inputs and targets, (B, T), and how many of the targets count.

    Every rank yields the same number of batches, because a model that processes share needs all of
    them for each forward pass: a rank with fewer blocks repeats one that does not count.
    """
    pages = Pages(tokens)
    n_full = (len(tokens) - 1) // block_size
    whole = most is None or len(tokens) <= most
    chosen = n_full if whole else max(1, most // block_size)  # type: ignore[operator]
    own = world.share(chosen)
    for first in range(0, -(-chosen // world.size), batch_size):
        padded = min(batch_size, -(-chosen // world.size) - first)
        places = np.arange(own.start + first, own.start + first + padded)
        # Evenly spread; a place beyond the last one repeats it.
        starts = np.minimum(places, chosen - 1) * n_full // chosen * block_size
        ids = np.stack([tokens[start : start + block_size + 1] for start in starts])
        pages.read(ids.nbytes, padded)
        counted = int((places < own.stop).sum()) * block_size
        rows = torch.from_numpy(ids.astype(np.int64))
        yield rows[:, :-1], rows[:, 1:], counted
    rest = torch.from_numpy(tokens[n_full * block_size :].astype(np.int64))
    if whole and len(rest) > 1:
        yield rest[None, :-1], rest[None, 1:], len(rest) - 1 if world.is_first else 0
