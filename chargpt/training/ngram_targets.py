"""Soft targets: what an n-gram of the training text expects at each position.

One character says little about what could have come next; an n-gram says what came next wherever
the text was alike. Learning from both is faster at first, and memorises less later (Sathe &
Sarawagi 2024, arXiv 2407.02819, with n-grams of a whole corpus). docs/sizing.md has measurements.

The n-gram has seen each position that it is asked about. So the position's own count is taken out,
or its target would leak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chargpt.compute import native
from chargpt.data.mapped import Pages

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
MOST_TOKENS = 4_000_000  # of the text that are counted: some seconds, and half a gigabyte
PIECES = 100  # evenly spread, of a longer text
GAIN_TOKENS, GAIN_ORDER = 200_000, 3


class Level(NamedTuple):
    """The grams of one length: each a context, and the token after it.

    A gram's id is its index in `keys`. A context's id is that of its gram, one level below.
    """

    keys: Ints  # (G,) context id · vocab_size + token, ascending
    counts: Floats  # (G,) how often each gram occurs
    firsts: Ints  # (C + 1,) where the grams of each context begin
    totals: Floats  # (C,) sum of the counts of each context's grams


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NgramTargets:
    """Expects each token of a text from up to `order` tokens before it, without its own count.

    Each order is mixed with the next lower one as by Witten & Bell (1991, "The zero-frequency
    problem"): of a context followed by D distinct tokens in N places, shorter contexts get the
    share D / (N + D).
    """

    tokens: npt.NDArray[Any]  # (n,)
    vocab_size: int
    levels: tuple[Level, ...]  # of 0 to `order` tokens of context
    starts: Ints  # of the counted pieces
    length: int  # of each piece

    @classmethod
    def count(
        cls, tokens: npt.NDArray[Any], vocab_size: int, order: int, most: int = MOST_TOKENS
    ) -> Self:
        """Count the grams of a text, (n,), or of about `most` tokens of it, evenly spread."""
        length, starts = len(tokens), np.zeros(1, dtype=np.int64)
        if length > most:
            length = max(order + 1, most // PIECES)
            starts = np.linspace(0, len(tokens) - length, PIECES).astype(np.int64)
        pages = Pages(tokens)
        pieces = np.stack([tokens[start : start + length] for start in starts]).astype(np.int64)
        pages.read(pieces.nbytes, len(pieces))
        return cls(
            tokens=tokens,
            vocab_size=vocab_size,
            levels=tuple(_levels(pieces, vocab_size, order)),
            starts=starts,
            length=length,
        )

    def expected(self, starts: Ints, block_size: int, *, fast: bool = False) -> Tensor:
        """Return p of each token after those of windows that start at `starts`, (B, T, V).

        ``[b, t]`` is about the token at ``starts[b] + t + 1``. `fast` uses the kernels.
        """
        order, V = len(self.levels) - 1, self.vocab_size
        places = starts[:, None] + np.arange(-order, block_size + 1)  # (B, order + 1 + T)
        ids = np.where(places < 0, -1, self.tokens[np.maximum(places, 0)]).astype(np.int64)
        targets = ids[:, order + 1 :].ravel()
        offsets = self._offsets(places[:, order + 1 :].ravel())
        expected = np.full((len(targets), V), 1 / V, dtype=np.float32)
        mix, find = (native.mix_ngram, native.find_grams) if fast else (_mix, _find)
        gram = np.zeros_like(ids)  # that ends at each place, of `size` tokens; −1: never seen
        for size, level in enumerate(self.levels):
            context = gram[:, order:-1].ravel()
            mix(level, context, targets, (offsets >= size).astype(np.int64), expected)
            longer = np.full_like(gram, -1)
            longer[:, 1:] = find(level.keys, gram[:, :-1], ids[:, 1:], V)
            gram = longer
        return torch.from_numpy(expected).view(len(starts), block_size, V)

    def _offsets(self, places: Ints) -> Ints:
        """Return where in its counted piece each place is; −1: it was not counted."""
        piece = np.searchsorted(self.starts, places, side="right") - 1
        offsets = places - self.starts[piece]
        return np.where(offsets < self.length, offsets, -1)


def context_gain(tokens: npt.NDArray[Any], vocab_size: int) -> float:
    """Return how many nats of a token the three tokens before it tell, in the middle of a text.

    That is by how much the losses of two n-grams differ, each without the token's own count, as in
    `NgramTargets`.
    """
    middle = max(0, (len(tokens) - GAIN_TOKENS) // 2)
    part = np.asarray(tokens[middle : middle + GAIN_TOKENS]).astype(np.int64)
    context, p, losses = np.zeros_like(part), np.full(len(part), 1 / vocab_size), []
    for size in range(GAIN_ORDER + 1):
        keys, gram, counts = np.unique(
            context * vocab_size + part[size:], return_inverse=True, return_counts=True
        )
        contexts, others = keys // vocab_size, counts[gram] - 1
        distinct = np.bincount(contexts)[context] - (others == 0)
        total = np.bincount(contexts, counts)[context] - 1 + distinct
        p = np.divide(others + distinct * p, total, out=p.copy(), where=total > 0)
        losses.append(-np.log(p).mean())
        context, p = gram[:-1], p[1:]
    return float(max(0.0, losses[0] - losses[-1]))


def _levels(pieces: Ints, vocab_size: int, order: int) -> Iterator[Level]:
    """Yield the grams of 1 to order + 1 tokens of pieces, (P, length)."""
    context, n_contexts = np.zeros_like(pieces), 1
    for size in range(order + 1):
        keys, gram, counts = np.unique(
            context * vocab_size + pieces[:, size:], return_inverse=True, return_counts=True
        )
        contexts = keys // vocab_size
        yield Level(
            keys=keys,
            counts=counts.astype(np.float32),
            firsts=np.searchsorted(contexts, np.arange(n_contexts + 1)),
            totals=np.bincount(contexts, counts, n_contexts).astype(np.float32),
        )
        context, n_contexts = gram.reshape(len(pieces), -1)[:, :-1], len(keys)


def _find(keys: Ints, context: Ints, token: Ints, vocab_size: int) -> Ints:
    """Return the id of each gram, −1 if it or its context was never seen."""
    wanted = context * vocab_size + token
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((context >= 0) & (token >= 0) & (keys[place] == wanted), place, -1)


def _mix(level: Level, context: Ints, targets: Ints, counted: Ints, expected: Floats) -> None:
    """Mix what shorter contexts expect, (M, V), with one level, in place.

    Args:
        level: the grams of one length.
        context: the id of the context of each of M targets, −1 for one never seen.
        targets: token ids, (M,).
        counted: 1 for each target that the level has counted, (M,).
        expected: probabilities of each token.
    """
    known, context = context >= 0, np.maximum(context, 0)
    firsts = level.firsts[context]
    width = np.where(known, level.firsts[context + 1] - firsts, 0)
    row = np.repeat(np.arange(len(context)), width)
    gram = np.arange(len(row)) + np.repeat(firsts - (np.cumsum(width) - width), width)
    token = level.keys[gram] % expected.shape[1]
    counts = level.counts[gram] - counted[row] * (token == targets[row])
    distinct = np.bincount(row, counts > 0, len(context)).astype(np.float32)
    total = np.where(known, level.totals[context] - counted + distinct, 0).astype(np.float32)
    expected *= np.divide(distinct, total, out=np.ones_like(total), where=total > 0)[:, None]
    expected[row, token] += np.divide(counts, total[row], where=total[row] > 0, out=0 * counts)
