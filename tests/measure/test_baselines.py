"""The cheap methods, against slow references and the compressors' own sizes."""

import bz2
import lzma
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.data.mapped import evenly_spread
from chargpt.data.tokenizer import CharTokenizer
from chargpt.measure import baselines as module
from chargpt.measure.baselines import (
    Baseline,
    NgramModel,
    baselines,
    compressed_bits_per_char,
    describe_parts,
    unigram_nats,
)

START = -1  # stands before the first token
Method = Literal["xz", "bz2"]


def prose(length: int, seed: int) -> str:
    """Words of a made-up language: letters that follow each other unevenly."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list("abcdefgh"), rng.integers(2, 7))) for _ in range(300)]
    return " ".join(rng.choice(words, length // 3))[:length]


def noise(length: int, seed: int) -> str:
    return np.random.default_rng(seed).integers(33, 126, length, np.uint8).tobytes().decode()


class SlowKneserNey:
    """Chen & Goodman 1999, section 3, in dictionaries over tuples of tokens."""

    def __init__(self, text: Sequence[int], vocab_size: int, order: int) -> None:
        self.vocab_size = vocab_size
        self.order = max(min(order, len(text) - 1), 0)
        padded = (START, *text)
        self.counts: list[Counter[tuple[int, ...]]] = []  # by length of the gram, from 1 on
        for length in range(1, self.order + 1):
            longer = {padded[i : i + length + 1] for i in range(len(padded) - length)}
            self.counts.append(Counter(gram[1:] for gram in longer))
        length = self.order + 1
        ends = range(length + 1, len(padded) + 1)
        self.counts.append(Counter(padded[end - length : end] for end in ends))

    def discount(self, length: int, count: int) -> float:
        number = Counter(self.counts[length - 1].values())
        n = [0.0, *(number[i] + 1 for i in range(1, 5))]
        y = n[1] / (n[1] + 2 * n[2])
        found = [i - (i + 1) * y * n[i + 1] / n[i] for i in (1, 2, 3)]
        return max(found[: min(count, 3)])  # the discount never falls with the count

    def prob(self, context: tuple[int, ...], token: int) -> float:
        context = context[max(len(context) - self.order, 0) :]
        lower = self.prob(context[1:], token) if context else 1 / self.vocab_size
        after = {
            gram[-1]: count
            for gram, count in self.counts[len(context)].items()
            if gram[:-1] == context
        }
        if not after:
            return lower
        taken = {t: self.discount(len(context) + 1, count) for t, count in after.items()}
        own = after[token] - taken[token] if token in after else 0.0
        return (own + sum(taken.values()) * lower) / sum(after.values())


def assert_equal_to_slow(
    training: list[int], held_out: list[int], vocab_size: int, order: int
) -> None:
    slow = SlowKneserNey(training, vocab_size, order)
    expected = [math.log(slow.prob(tuple(held_out[:i]), token)) for i, token in enumerate(held_out)]
    model = NgramModel.fit(np.array(training, dtype=np.int64), vocab_size, order)
    np.testing.assert_allclose(model.log_probs(np.array(held_out)), expected, rtol=0, atol=1e-9)


tokens = st.lists(st.integers(0, 3), max_size=40)


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    training=tokens, held_out=tokens, order=st.integers(0, 4), spare=st.sampled_from([1, 2, 66_000])
)
def test_log_probs_equal_a_slow_kneser_ney(
    training: list[int], held_out: list[int], order: int, spare: int
) -> None:
    """Texts shorter than the order, unseen tokens and contexts, huge vocabularies."""
    vocab_size = 4 + spare
    held_out = [*held_out, vocab_size - 1, *held_out[:6]]  # a token that is not in training
    assert_equal_to_slow(training, held_out, vocab_size, order)


def test_log_probs_of_a_longer_text_equal_a_slow_kneser_ney() -> None:
    """The discounts are estimated from hundreds of grams, and contexts have five tokens."""
    tokenizer = CharTokenizer(" abcdefgh")
    training, held_out = (tokenizer.encode(prose(n, seed=n)).tolist() for n in (1500, 40))
    assert_equal_to_slow(training, held_out, 9, 5)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint32, np.uint64])
def test_the_type_of_the_ids_does_not_matter(dtype: type[np.integer[Any]]) -> None:
    """NumPy would turn uint64 into floats, and a product of uint8 would overflow."""
    ids = np.random.default_rng(0).integers(0, 100, 500)
    expected = NgramModel.fit(ids, 100, 3).log_probs(ids[:50])
    model = NgramModel.fit(ids.astype(dtype), 100, 3)
    np.testing.assert_array_equal(model.log_probs(ids[:50].astype(dtype)), expected)


def test_unigram_by_hand() -> None:
    """Add-one counts of a, b and an unseen c: 4, 2, 1 of 7."""
    train = np.array([0, 0, 0, 1], dtype=np.uint8)
    nats = unigram_nats(train, np.array([0, 1, 2, 2], dtype=np.uint8), 3)
    expected = -(math.log(4 / 7) + math.log(2 / 7) + 2 * math.log(1 / 7)) / 4
    assert nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [3, -1])
def test_ids_outside_the_vocabulary_are_named(bad: int) -> None:
    model = NgramModel.fit(np.array([0, 1]), 3)
    for call in (partial(NgramModel.fit, vocab_size=3), model.log_probs):
        with pytest.raises(UserError, match=f"token id {bad} is outside the vocabulary of 3"):
            call(np.array([0, 1, bad]))


def test_an_empty_held_out_text_and_a_negative_order_are_refused() -> None:
    none = np.array([], dtype=np.int64)
    assert NgramModel.fit(np.array([0, 1]), 2).log_probs(none).shape == (0,)
    with pytest.raises(UserError, match="held-out text is empty"):
        baselines(np.array([0]), none, CharTokenizer("ab"))
    with pytest.raises(UserError, match="held-out text is empty"):
        compressed_bits_per_char("", "training", method="xz")
    with pytest.raises(UserError, match="order is -1: give 0 or more"):
        NgramModel.fit(np.array([0]), 2, order=-1)


def xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=6))  # its 8 MiB dictionary holds every text here


def bzip2(data: bytes) -> int:
    return len(bz2.compress(data, 9))


@pytest.mark.parametrize(("method", "size"), [("xz", xz), ("bz2", bzip2)])
def test_compressed_sizes_are_the_compressors_own(
    method: Method, size: Callable[[bytes], int]
) -> None:
    training, held_out = prose(30_000, seed=0) + "é€", prose(5000, seed=1) + "ü" * 100
    alone = compressed_bits_per_char(held_out, method=method)
    assert alone == 8 * size(held_out.encode()) / 5100  # bits per character, not per byte
    after = compressed_bits_per_char(held_out, training, method=method)
    both = size((training + held_out).encode()) - size(training.encode())
    assert after == 8 * both / 5100


def test_bz2_sees_training_text_whatever_its_blocks() -> None:
    """The text to repeat ends a bz2 block: the plain difference would not see it."""
    needed = noise(20_000, seed=1)
    training = noise(900_000 - 19 - 20_000, seed=0) + needed  # ends with a block of bz2
    plain = 8 * (bzip2((training + needed).encode()) - bzip2(training.encode())) / 20_000
    ours = compressed_bits_per_char(needed, training, method="bz2")
    assert plain > 6.5
    assert ours < 0.9 * plain


def test_a_long_held_out_text_is_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pieces, each after a full window; the last window holds only held-out text."""
    monkeypatch.setitem(module._WINDOW_BYTES, "xz", 2000)
    training, held_out = prose(1500, seed=0), prose(4500, seed=1)
    stream = (training + held_out).encode()
    spans = [(500, 1500, 2500), (1500, 2500, 3500), (2500, 3500, 4500), (3500, 4500, 5500)]
    spans.append((4000, 5500, 6000))
    added = sum(xz(stream[a:c]) - xz(stream[a:b]) for a, b, c in spans)
    assert compressed_bits_per_char(held_out, training, method="xz") == 8 * added / 4500


def test_xz_looks_back_over_the_whole_training_text() -> None:
    """The text to repeat stands 9 MB before, beyond the 8 MiB of xz's default."""
    needed, between = noise(3000, seed=0), "x" * 9_000_000
    bits = compressed_bits_per_char(needed, needed + between, method="xz")
    assert bits < 0.5
    assert 8 * (xz((needed + between + needed).encode()) - xz((needed + between).encode())) > 18_000


def test_a_lone_surrogate_can_be_compressed() -> None:
    assert compressed_bits_per_char("\ud800x", "y\udfff", method="xz") > 0


def test_the_table_has_the_four_methods_in_order() -> None:
    training, held_out = prose(20_000, seed=0), prose(2000, seed=0)[::-1]
    tokenizer = CharTokenizer.fit([training], end_of_text=True)
    ids, held_out_ids = tokenizer.encode(training), tokenizer.encode(held_out)
    table = baselines(ids, held_out_ids, tokenizer, order=2)
    model = NgramModel.fit(ids, 10, 2)
    assert table == [
        Baseline("letters by frequency", unigram_nats(ids, held_out_ids, 10) / math.log(2)),
        Baseline("order-2 n-gram", model.nats_per_char(held_out_ids) / math.log(2)),
        Baseline("bz2", compressed_bits_per_char(held_out, training, method="bz2")),
        Baseline("xz", compressed_bits_per_char(held_out, training, method="xz")),
    ]


def test_the_table_takes_evenly_spread_parts_of_long_texts() -> None:
    training, held_out = prose(3000, seed=0), prose(500, seed=2)
    tokenizer = CharTokenizer.fit([training, held_out])
    ids, held_out_ids = tokenizer.encode(training), tokenizer.encode(held_out)
    parts = [start + np.arange(10) for start in np.linspace(0, 2990, 100).astype(int)]
    cut = baselines(ids, held_out_ids, tokenizer, most=1000)
    assert cut == baselines(ids[np.concatenate(parts)], held_out_ids, tokenizer)
    assert cut != baselines(ids, held_out_ids, tokenizer)
    assert describe_parts(ids, held_out_ids, most=1000) == (
        "the simple methods learn from 1,000 of 3,000 characters, evenly spread"
    )
    assert describe_parts(ids, held_out_ids) == ""
    assert len(evenly_spread(ids, 7)) <= 7


def test_a_long_text_is_scored_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored in chunks, each token still has its context."""
    ids = np.random.default_rng(0).integers(0, 3, 500)
    model = NgramModel.fit(ids, 3, order=4)
    monkeypatch.setattr("chargpt.measure.baselines._CHUNK", 7)
    assert model.nats_per_char(ids) == pytest.approx(-model.log_probs(ids).mean(), rel=1e-12)
