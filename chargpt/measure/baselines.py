"""What cheap methods reach on the text a model is judged by.

A model's bits per character say little alone. Here are four to set beside them: guessing letters by
their frequency, an n-gram model, and the compressors bz2 and xz. All see the same training text.
"""

from __future__ import annotations

import bz2
import lzma
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.data.tokenizer import CharTokenizer
from chargpt.training.summary import unigram_nats

Ids = npt.NDArray[np.integer[Any]]

# Bytes that a compressor can look back on. bz2 sorts blocks of 900 kB and forgets everything
# between them; its first step lengthens a run of just four equal bytes, hence the margin. 64 MiB
# is xz's own largest preset: more costs gigabytes of memory.
_WINDOW_BYTES = {"bz2": 850_000, "xz": 64 << 20}


class Baseline(NamedTuple):
    """One line of the comparison."""

    name: str
    bits_per_char: float


def baselines(
    training_ids: Ids,
    held_out_ids: Ids,
    tokenizer: CharTokenizer,
    *,
    order: int = 5,
    training_chars: int = 10_000_000,
) -> list[Baseline]:
    """Score the held-out text by each cheap method, in bits per character.

    End-of-text tokens are scored by the first two methods, and are no text to the compressors.

    Args:
        training_ids: what the model was trained on, shape (n,).
        held_out_ids: what it is judged by, shape (m,).
        tokenizer: gives the size of the vocabulary, and the text for the compressors.
        order: characters that the n-gram model looks back on.
        training_chars: the methods see this many of the last training characters. 10 million take
            about a minute and 1 GB of memory; more training text makes them better.

    Returns:
        Letters by frequency, n-gram, bz2, xz.

    Raises:
        UserError: the held-out text is empty, or an id is outside the vocabulary.
    """
    training_ids = training_ids[max(len(training_ids) - training_chars, 0) :]
    size = tokenizer.vocab_size
    unigram = unigram_nats(_checked(training_ids, size), _checked(held_out_ids, size), size)
    ngram = NgramModel.fit(training_ids, size, order=order).nats_per_char(held_out_ids)
    training, held_out = tokenizer.decode(training_ids), tokenizer.decode(held_out_ids)
    return [
        Baseline("letters by frequency", unigram / math.log(2)),
        Baseline(f"order-{order} n-gram", ngram / math.log(2)),
        Baseline("bz2", compressed_bits_per_char(held_out, training, method="bz2")),
        Baseline("xz", compressed_bits_per_char(held_out, training, method="xz")),
    ]


def compressed_bits_per_char(
    held_out: str, training: str = "", *, method: Literal["xz", "bz2"]
) -> float:
    """Return what the held-out text adds to the compressed training text, in bits per character.

    That is 8 · (size(training + held_out) − size(training)) / len(held_out), sizes in bytes of
    UTF-8. Without a training text it is the plain compressed size, file header included.

    The formula as it stands would be unfair to bz2, which sorts a text in blocks of 900 kB: the
    held-out text would share a block with only the odd end of a long training text. So the held-out
    text is taken in pieces of at most half a block, each after as much of the text before it as
    fits the same block, and the differences are added up. The same is done for xz with its 64 MiB,
    so that a usual held-out text is one piece.

    Raises:
        UserError: the held-out text is empty.
    """
    if not held_out:
        raise UserError("the held-out text is empty: give at least one character")
    before = training.encode("utf-8", "surrogatepass")
    text = before + held_out.encode("utf-8", "surrogatepass")
    if not before:
        return 8 * _compressed_bytes(text, method) / len(held_out)
    window = _WINDOW_BYTES[method]
    added = 0
    for start in range(len(before), len(text), window // 2):
        end = min(start + window // 2, len(text))
        seen = max(end - window, 0)
        added += _compressed_bytes(text[seen:end], method)
        added -= _compressed_bytes(text[seen:start], method)
    return 8 * added / len(held_out)


def _compressed_bytes(data: bytes, method: Literal["xz", "bz2"]) -> int:
    if method == "bz2":
        return len(bz2.compress(data))
    # Preset 9 is preset 6 with a larger dictionary; one of the data's size is as good and lighter.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": max(len(data), 4096)}]
    return len(lzma.compress(data, filters=filters))


class _Level(NamedTuple):
    """The grams of one length: a context and the token after it.

    A gram's id is its place in `keys`, and contexts have the ids of the level below. The arrays of
    floats have one more entry, which index −1 finds: that of an unseen gram or context.
    """

    keys: npt.NDArray[np.int64]  # (G,) context id · vocab_size + token, ascending
    share: npt.NDArray[np.float64]  # (G + 1,) of its context's probability, less the discount
    backoff: npt.NDArray[np.float64]  # (C + 1,) probability that a context leaves to shorter ones


@dataclass(frozen=True, slots=True, eq=False)
class NgramModel:
    """Predicts each token from the `order` tokens before it, smoothed by shorter contexts.

    The smoothing is interpolated modified Kneser-Ney (Chen & Goodman 1999, "An empirical study of
    smoothing techniques for language modeling", section 3; Kneser & Ney 1995), down to the uniform
    distribution, so that every token has a positive probability after every context. Memory and
    time grow with the length of the text times the order, whatever the vocabulary.
    """

    vocab_size: int
    levels: tuple[_Level, ...]

    @classmethod
    def fit(cls, ids: Ids, vocab_size: int, order: int = 5) -> Self:
        """Count the grams of a text.

        Args:
            ids: the training text, shape (n,); of an empty one comes the uniform distribution.
            vocab_size: number of tokens.
            order: length of the longest context, in tokens; 0 takes no context into account.

        Raises:
            UserError: an id is outside the vocabulary, or the order is negative.
        """
        if order < 0:
            raise UserError(f"an n-gram model of order {order} is none: give 0 or more")
        levels: list[_Level] = []
        for keys, counts in _count_grams(_checked(ids, vocab_size), vocab_size, order):
            contexts = len(levels[-1].keys) if levels else 1
            levels.append(_discount(keys, counts, keys // vocab_size, contexts))
        return cls(vocab_size, tuple(levels))

    def log_probs(self, ids: Ids) -> npt.NDArray[np.float64]:
        """Return ln p of each token given those before it, shape (len(ids),).

        The first token is predicted from nothing, the next ones from a growing context.

        Raises:
            UserError: an id is outside the vocabulary.
        """
        ids = _checked(ids, self.vocab_size)
        probs = np.full(len(ids), 1 / self.vocab_size)
        context = np.zeros(len(ids), dtype=np.int64)
        for length, level in enumerate(self.levels):
            gram = _find(level.keys, context * self.vocab_size + ids[length:])
            probs[length:] *= level.backoff[context]
            probs[length:] += level.share[gram]
            context = gram[:-1]
        log_probs: npt.NDArray[np.float64] = np.log(probs)
        return log_probs

    def nats_per_char(self, ids: Ids) -> float:
        """Return the mean −ln p over all tokens of `ids`.

        Raises:
            UserError: `ids` is empty, or an id is outside the vocabulary.
        """
        return _mean(-self.log_probs(ids))


def _count_grams(
    ids: npt.NDArray[np.int64], vocab_size: int, order: int
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Return the keys and the counts of the grams of 1 to order + 1 tokens.

    Only the longest are counted by their occurrences. A shorter one serves when a longer context
    is new, so it counts the distinct tokens before it, the start of the text among them: a word
    like "Francisco", frequent but only after "San", is unlikely after anything new.
    """
    levels: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    context = np.zeros(len(ids), dtype=np.int64)
    shorter = np.zeros(0, dtype=np.int64)  # id of the gram at each place, one level below
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


def _discount(
    keys: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    context: npt.NDArray[np.int64],
    contexts: int,
) -> _Level:
    """Take a discount of each count and leave the sum to the shorter contexts."""
    discount = _discounts(counts)[np.minimum(counts, 3) - 1]
    total = np.bincount(context, weights=counts, minlength=contexts)
    taken = np.bincount(context, weights=discount, minlength=contexts)
    # A context seen only at the very end of the text has nothing after it.
    backoff = np.divide(taken, total, out=np.ones(contexts), where=total > 0)
    share = (counts - discount) / total[context]
    return _Level(keys, np.append(share, 0.0), np.append(backoff, 1.0))


def _discounts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return the discounts of counts 1, 2, and 3 or more (Chen & Goodman 1999, section 3)."""
    # One more gram of each count keeps a tiny or a periodic text from a division by zero.
    n1, n2, n3, n4 = np.bincount(np.minimum(counts, 5), minlength=6)[1:5] + 1
    y = n1 / (n1 + 2 * n2)
    estimates = np.array([y, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    # Odd texts give negative estimates; discounts that do not fall stay between 0 and the count.
    return np.maximum.accumulate(estimates)


def _find(keys: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the place of each wanted key, −1 where there is none; keys are ascending."""
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, place, -1)


def _checked(ids: Ids, vocab_size: int) -> npt.NDArray[np.int64]:
    # Of int64, which holds a key: a gram's id, below the text's length, times the vocabulary.
    checked = np.asarray(ids, dtype=np.int64)
    if checked.size and not 0 <= checked.min() <= checked.max() < vocab_size:
        wrong = checked[(checked < 0) | (checked >= vocab_size)][0]
        raise UserError(f"token id {wrong} is outside the vocabulary of {vocab_size} tokens")
    return checked


def _mean(nats: npt.NDArray[np.float64]) -> float:
    if not len(nats):
        raise UserError("the held-out text is empty: give at least one character")
    return float(nats.mean())
