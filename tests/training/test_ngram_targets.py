"""Soft targets: an n-gram without each position's own count, and the gradient toward it."""

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, words

from chargpt.compute.cost import memory_of
from chargpt.compute.fast_layers import use_kernels
from chargpt.compute.library import why_not_tried
from chargpt.compute.step import cross_entropy
from chargpt.config import GPT2Config, TrainConfig
from chargpt.model import GPT2
from chargpt.training.ngram_targets import GAIN_ORDER, PIECES, NgramTargets, context_gain

V, ORDER = 6, 3


def by_hand(
    tokens: npt.NDArray[np.uint8], place: int, pieces: list[range], order: int
) -> npt.NDArray[np.float64]:
    """Count every other place that follows the same context, by going through the whole text."""
    p = np.full(V, 1 / V)
    for size in range(min(order, place) + 1):
        context = tokens[place - size : place].tolist()
        counts = np.zeros(V)
        for piece in pieces:
            for i in piece[size:]:
                if i != place and tokens[i - size : i].tolist() == context:
                    counts[tokens[i]] += 1
        distinct = np.count_nonzero(counts)
        if distinct:
            p = (counts + distinct * p) / (counts.sum() + distinct)
    return p


@pytest.mark.parametrize("most", [10**6, 400])
def test_expectations_are_those_of_counting_by_hand(most: int) -> None:
    """Also at both ends of the text, and where only pieces of it are counted."""
    tokens = np.random.default_rng(0).integers(0, V - 1, 900).astype(np.uint8)
    tokens[300:600] = tokens[:300]  # so that long contexts come back
    ngram = NgramTargets.count(tokens, V, ORDER, most)
    n_pieces = 1 if most > len(tokens) else PIECES
    assert len(ngram.starts) == n_pieces
    pieces = [range(start, start + ngram.length) for start in ngram.starts]
    starts = np.array([0, 1, 289, 450, 879])
    expected = ngram.expected(starts, 20).double().numpy()
    assert np.allclose(expected.sum(-1), 1)
    for row, start in zip(expected, starts, strict=True):
        for t in range(20):
            assert np.allclose(row[t], by_hand(tokens, start + t + 1, pieces, ORDER), atol=1e-6)


def test_the_kernels_expect_the_same() -> None:
    if reason := why_not_tried():
        pytest.skip(reason)
    tokens = np.frombuffer(words(3000).encode(), np.uint8)
    ngram = NgramTargets.count(tokens, 128, 5)
    starts = np.arange(0, 2900, 97)
    slow, fast = (ngram.expected(starts, 64, fast=fast) for fast in (False, True))
    assert torch.allclose(slow, fast, rtol=1e-5, atol=1e-7)


@pytest.mark.usefixtures("kernels")
def test_the_gradient_is_that_of_a_mixture_and_the_loss_stays(kernels: str) -> None:
    model = GPT2(SMALL.replace(vocab_size=V))
    if kernels == "on":
        use_kernels(model)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, V, generator=generator, requires_grad=True)
    expected = torch.rand(2, 5, V, generator=generator)
    expected /= expected.sum(-1, keepdim=True)
    targets = torch.randint(V, (2, 5), generator=generator)
    loss = cross_entropy(model, logits, targets, expected - F.one_hot(targets, V), 0.3)
    exact = logits.double()
    hard = F.cross_entropy(exact.flatten(0, 1), targets.flatten())
    soft = F.cross_entropy(exact.flatten(0, 1), expected.double().flatten(0, 1))
    assert loss.item() == pytest.approx(hard.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(2 * loss, logits)
    (wanted,) = torch.autograd.grad(2 * (0.7 * hard + 0.3 * soft), logits)
    assert torch.allclose(gradient, wanted, atol=1e-7)


def test_counting_takes_about_the_memory_that_a_plan_says() -> None:
    tokens = np.random.default_rng(0).zipf(1.5, 300_000) % 60
    config = GPT2Config(vocab_size=60, n_layer=1, d_model=16, n_head=1)
    hardware: Any = {"precision": "fp32", "kernels": False, "pairs": False}
    train_config = TrainConfig(ngram_weight=0.9)
    with_ngram, without = (
        memory_of(config, train_config, **hardware, counted=counted).total
        for counted in (len(tokens), 0)
    )
    tracemalloc.start()
    NgramTargets.count(tokens, 60, 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak == pytest.approx(with_ngram - without, rel=0.5)


def test_what_context_tells_is_the_difference_of_two_n_grams() -> None:
    rng = np.random.default_rng(1)
    tokens = np.repeat(rng.integers(0, V, 200), rng.integers(1, 5, 200)).astype(np.uint8)
    losses = []
    for order in (0, GAIN_ORDER):
        expected = NgramTargets.count(tokens, V, order).expected(np.zeros(1, int), len(tokens) - 1)
        p = expected[0].numpy()[np.arange(len(tokens) - 1), tokens[1:]]
        losses.append(-np.log(p[GAIN_ORDER:]).mean())
    assert context_gain(tokens, V) == pytest.approx(losses[0] - losses[1], abs=0.02)
    assert context_gain(rng.integers(0, V, 5000), V) < 0.05
    assert context_gain(np.zeros(300, int), 1) == 0
