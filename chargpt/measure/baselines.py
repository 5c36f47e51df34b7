"""Bits per character that cheap methods reach after the same training text as a model."""

from __future__ import annotations

import bz2
import lzma
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.data.mapped import evenly_spread
from chargpt.data.tokenizer import CharTokenizer
from chargpt.training.summary import unigram_nats

Ids = npt.NDArray[np.integer[Any]]
_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]
_Compressor = Literal["xz", "bz2"]
_CHUNK = 1 << 20  # tokens scored at a time

# Bytes that a compressor can refer back to. bz2 sorts blocks of 900 kB independently; its first
# step lengthens a run of four equal bytes, hence the margin. 64 MiB is xz's largest preset: more
# would take gigabytes of memory.
_WINDOW_BYTES = {"bz2": 850_000, "xz": 64 << 20}


MOST_CHARACTERS = 10_000_000  # that the methods see of a text


class Baseline(NamedTuple):
    """A cheap method and what it reaches."""

    name: str
    bits_per_char: float


def baselines(
    training_ids: Ids,
    held_out_ids: Ids,
    tokenizer: CharTokenizer,
    *,
    order: int = 5,
    most: int = MOST_CHARACTERS,
) -> list[Baseline]:
    """Score a text by letter frequencies, an n-gram model, bz2 and xz, in that order.

    The n-gram model has a context of `order` characters. The methods see at most `most` characters
    of either text, evenly spread (see `describe_parts`): 10 million take about a minute and 1 GB of
    memory; more would improve the scores. Only the first two methods see and score end-of-text
    tokens.

    Raises:
        UserError: the held-out text is empty, or an id is outside the vocabulary.
    """
    training_ids, held_out_ids = (evenly_spread(ids, most) for ids in (training_ids, held_out_ids))
    size = tokenizer.vocab_size
    ngram = NgramModel.fit(training_ids, size, order=order).nats_per_char(held_out_ids)  # checks
    unigram = unigram_nats(training_ids, held_out_ids, size)
    training, held_out = tokenizer.decode(training_ids), tokenizer.decode(held_out_ids)
    compressors: tuple[_Compressor, ...] = ("bz2", "xz")
    return [
        Baseline("letters by frequency", unigram / math.log(2)),
        Baseline(f"order-{order} n-gram", ngram / math.log(2)),
        *(Baseline(c, compressed_bits_per_char(held_out, training, method=c)) for c in compressors),
    ]


def describe_parts(training_ids: Ids, held_out_ids: Ids, most: int = MOST_CHARACTERS) -> str:
    """Return a line on which parts of long texts `baselines` sees; empty if it sees all."""
    texts = (("learn from", training_ids), ("are scored on", held_out_ids))
    cut = [f"{verb} {most:,} of {len(ids):,} characters" for verb, ids in texts if len(ids) > most]
    return f"the simple methods {' and '.join(cut)}, evenly spread" if cut else ""


def compressed_bits_per_char(held_out: str, training: str = "", *, method: _Compressor) -> float:
    """Return what the held-out text adds to the compressed training text, in bits per character.

    That is 8 · (size(training + held_out) − size(training)) / len(held_out), with sizes in bytes of
    UTF-8. Without a training text it is the compressed size, file header included.

    bz2 sorts a text in blocks of 900 kB, and the held-out text could share a block with only a
    small end of a long training text. Therefore the held-out text is cut into pieces of at most
    half a block, each after as much of the text before it as fits into the block, and the
    differences are added. The same for xz, with 64 MiB: a typical held-out text is one piece.

    Raises:
        UserError: the held-out text is empty.
    """
    if not held_out:
        raise UserError("the held-out text is empty: give at least one character")
    before = training.encode("utf-8", "surrogatepass")
    text = before + held_out.encode("utf-8", "surrogatepass")
    if not before:
        return 8 * _compressed_bytes(text, method) / len(held_out)
    window, added = _WINDOW_BYTES[method], 0
    for start in range(len(before), len(text), window // 2):
        end = min(start + window // 2, len(text))
        seen = max(end - window, 0)
        added += _compressed_bytes(text[seen:end], method)
        added -= _compressed_bytes(text[seen:start], method)
    return 8 * added / len(held_out)


def _compressed_bytes(data: bytes, method: _Compressor) -> int:
    if method == "bz2":
        return len(bz2.compress(data))
    # Preset 9 is preset 6 with a larger dictionary; one of the data's size takes less memory.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": max(len(data), 4096)}]
    return len(lzma.compress(data, filters=filters))


class _Level(NamedTuple):
    """The G grams of one length, each a context and the token after it.

    A gram's id is its index in `keys`; a context's id is that of the level below. Index −1 of the
    float arrays, one more entry, stands for an unseen gram or context.
    """

    keys: _Ints  # (G,) context id · vocab_size + token, ascending
    share: _Floats  # (G + 1,) discounted p of the token in its context
    backoff: _Floats  # (C + 1,) p that a context leaves to shorter ones


@dataclass(frozen=True, slots=True, eq=False)
class NgramModel:
    """Predicts each token from the `order` tokens before it, smoothed by shorter contexts.

    The smoothing is interpolated modified Kneser-Ney (Chen & Goodman 1999, "An empirical study of
    smoothing techniques for language modeling", section 3; Kneser & Ney 1995), down to the uniform
    distribution, so that every token has a positive probability. Memory and time are proportional
    to the length of the text times the order.
    """

    vocab_size: int
    levels: tuple[_Level, ...]

    @classmethod
    def fit(cls, ids: Ids, vocab_size: int, order: int = 5) -> Self:
        """Count the grams of a text, (n,); an empty one gives the uniform distribution.

        The longest context has `order` tokens; 0: no context.

        Raises:
            UserError: an id is outside the vocabulary, or the order is negative.
        """
        if order < 0:
            raise UserError(f"the n-gram order is {order}: give 0 or more")
        levels: list[_Level] = []
        for keys, counts in _count_grams(_checked(ids, vocab_size), vocab_size, order):
            contexts = len(levels[-1].keys) if levels else 1
            levels.append(_discount(keys, counts, keys // vocab_size, contexts))
        return cls(vocab_size, tuple(levels))

    def log_probs(self, ids: Ids) -> _Floats:
        """Return ln p of each token given those before it, (len(ids),); UserError as for `fit`."""
        ids = _checked(ids, self.vocab_size)
        probs = np.full(len(ids), 1 / self.vocab_size)
        context = np.zeros(len(ids), dtype=np.int64)
        for length, level in enumerate(self.levels):
            gram = _find(level.keys, context * self.vocab_size + ids[length:])
            probs[length:] *= level.backoff[context]
            probs[length:] += level.share[gram]
            context = gram[:-1]
        return np.log(probs)  # type: ignore[no-any-return]

    def nats_per_char(self, ids: Ids) -> float:
        """Return the mean −ln p over all tokens of `ids`; UserError if there are none."""
        if not len(ids):
            raise UserError("the held-out text is empty: give at least one character")
        nats = 0.0
        for start in range(0, len(ids), _CHUNK):
            seen = max(0, start - len(self.levels))  # tokens that give the first ones their context
            nats -= float(self.log_probs(ids[seen : start + _CHUNK])[start - seen :].sum())
        return nats / len(ids)


def _count_grams(ids: _Ints, vocab_size: int, order: int) -> list[tuple[_Ints, _Ints]]:
    """Return the keys and the counts of the grams of 1 to order + 1 tokens.

    Only the longest are counted by their occurrences. A shorter one is used after a new longer
    context, so its count is that of the distinct tokens before it, the start of the text included:
    "Francisco", frequent but only after "San", is unlikely in a new context.
    """
    levels: list[tuple[_Ints, _Ints]] = []
    context = np.zeros(len(ids), dtype=np.int64)
    shorter = np.zeros(0, dtype=np.int64)  # id of each position's gram, one level below
    for length in range(min(order + 1, len(ids))):
        keys, gram, counts = np.unique(
            context * vocab_size + ids[length:], return_inverse=True, return_counts=True
        )
        if length:
            suffix = np.empty(len(keys), dtype=np.int64)
            suffix[gram] = shorter[1:]
            neighbours = np.bincount(suffix, minlength=len(levels[-1][0]))
            neighbours[shorter[0]] += 1
            levels[-1] = levels[-1][0], neighbours
        levels.append((keys, counts))
        context, shorter = gram[:-1], gram
    return levels


def _discount(keys: _Ints, counts: _Ints, context: _Ints, contexts: int) -> _Level:
    """Subtract a discount from each count and give the sum to the shorter contexts."""
    # One more gram of each count avoids a division by zero for a tiny or a periodic text.
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5] + 1
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([y, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Unusual texts give negative estimates; discounts that never fall stay in 0 … count.
    discount = np.maximum.accumulate(estimates)[np.minimum(counts, 3) - 1]
    total = np.bincount(context, weights=counts, minlength=contexts)
    taken = np.bincount(context, weights=discount, minlength=contexts)
    # A context that occurs only at the very end of the text has no next token.
    backoff = np.divide(taken, total, out=np.ones(contexts), where=total > 0)
    share = (counts - discount) / total[context]
    return _Level(keys, np.append(share, 0.0), np.append(backoff, 1.0))


def _find(keys: _Ints, wanted: _Ints) -> _Ints:
    """Return the index of each wanted key in ascending `keys`, −1 if it is missing."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _checked(ids: Ids, vocab_size: int) -> _Ints:
    # int64 holds a key: a gram's id, less than the text's length, times the vocabulary size.
    checked = np.asarray(ids, dtype=np.int64)
    if checked.size and not 0 <= checked.min() <= checked.max() < vocab_size:
        wrong = checked[(checked < 0) | (checked >= vocab_size)][0]
        raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size} tokens")
    return checked
