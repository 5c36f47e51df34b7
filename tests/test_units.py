"""Units, numbers as text, and counts of parameters and operations."""

import math

import pytest

from chargpt.base.units import bits_per_char, human_count, human_time, perplexity
from chargpt.compute.counts import count_parameters, training_flops_per_token
from chargpt.config import GPT2Config
from chargpt.model import GPT2


def test_loss_units() -> None:
    assert bits_per_char(math.log(65)) == pytest.approx(math.log2(65))
    assert perplexity(math.log(65)) == pytest.approx(65)
    assert (bits_per_char(0.0), perplexity(0.0)) == (0.0, 1.0)


def test_flops_by_hand() -> None:
    """Each matrix product: two operations per multiply-add, three times the forward pass."""
    shape = GPT2Config(vocab_size=10, block_size=7, n_layer=3, n_head=2, d_model=8, d_ff=20)
    per_layer = [(8, 24), (8, 8), (8, 20), (20, 8)]  # qkv, projection, expand, projection
    scores_and_average = [(8, 7), (7, 8)]  # q kᵀ and the weighted values, all heads
    layer = sum(a * b for a, b in per_layer + scores_and_average)
    assert training_flops_per_token(shape) == 3 * 2 * (3 * layer + 8 * 10)


def test_the_tied_embedding_counts_once() -> None:
    shape = {"block_size": 6, "vocab_size": 9, "n_layer": 1, "n_head": 2, "d_model": 8}
    model_config = GPT2Config(**shape, bias=False)
    embeddings, norms = (9 + 6) * 8, 3 * 8
    matrices = 8 * 24 + 8 * 8 + 2 * 8 * 32
    assert count_parameters(GPT2(model_config)) == embeddings + norms + matrices


def test_human_count() -> None:
    texts = {0: "0", 7: "7", 999: "999", 1000: "1 k", 1234: "1.23 k", 818_048: "818 k"}
    texts |= {999_499: "999 k", 999.6: "1 k", 999_500: "1 M", 999_999_999: "1 G"}
    texts |= {1_000_000: "1 M", 10_700_000: "10.7 M", 124_439_808: "124 M"}
    texts |= {1.5e9: "1.5 G", 999e9: "999 G", 1e12: "1 T", 1e15: "1e+15"}
    assert {number: human_count(number) for number in texts} == texts


def test_human_time() -> None:
    texts = {0: "0 s", 0.4: "0 s", 5: "5 s", 59.4: "59 s", 59.6: "1 min 00 s"}
    texts |= {65: "1 min 05 s", 180: "3 min 00 s", 3599.4: "59 min 59 s"}
    texts |= {3599.6: "1 h 00 min", 3700: "1 h 01 min", 7199: "1 h 59 min", 90_000: "25 h 00 min"}
    assert {seconds: human_time(seconds) for seconds in texts} == texts
