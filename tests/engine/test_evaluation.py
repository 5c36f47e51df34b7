"""The loss of a whole split, counted again by hand; units and counts."""

import math
from contextlib import nullcontext
from copy import deepcopy

import numpy as np
import pytest
import torch
from twin import shake

from chargpt.base.units import bits_per_char, human_count, human_time, perplexity
from chargpt.compute.counts import count_parameters, training_flops_per_token
from chargpt.config import GPT2Config
from chargpt.engine.scoring import evaluate
from chargpt.model import GPT2, evaluating

T = 6


@pytest.fixture
def model() -> GPT2:
    shape = GPT2Config(
        block_size=T, vocab_size=9, n_layer=1, n_head=2, d_model=8, dropout=0.5, bias=False
    )
    return shake(GPT2(shape))


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 9, n).astype(np.uint8)


def by_hand(model: GPT2, tokens: np.ndarray) -> float:
    """One window at a time, in float64."""
    model = deepcopy(model).double().eval()
    nats = []
    for start in range(0, len(tokens) - 1, T):
        window = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
        logits = model(window[None, :-1])[0].detach().numpy()
        for row, target in zip(logits, window[1:].tolist(), strict=True):
            nats.append(np.log(np.exp(row).sum()) - row[target])
    assert len(nats) == len(tokens) - 1
    return float(np.mean(nats))


@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 5 * T, 5 * T + 1, 5 * T + 2, 100])
def test_equals_the_loss_by_hand(model: GPT2, n: int) -> None:
    tokens = some_tokens(n)
    expected = by_hand(model, tokens)
    for batch_size in (1, 2, 3, 32):
        assert evaluate(model, tokens, T, batch_size=batch_size) == pytest.approx(
            expected, rel=1e-6
        )


def test_batch_size_changes_nothing(model: GPT2) -> None:
    tokens = some_tokens(200)
    losses = [evaluate(model, tokens, T, batch_size=size) for size in (1, 5, 32, 1000)]
    assert max(losses) - min(losses) <= 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_leaves_no_trace(model: GPT2, training: bool) -> None:
    model.train(training)
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    first = evaluate(model, some_tokens(50), T)
    assert first == evaluate(model, some_tokens(50), T)  # dropout rests
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
        assert parameter.grad is None


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_after_a_failure(model: GPT2, training: bool) -> None:
    model.train(training)
    with pytest.raises(KeyError), evaluating(model):
        assert not model.training
        raise KeyError
    assert model.training == training


def test_autocast_surrounds_the_forward_pass_only(model: GPT2) -> None:
    tokens = some_tokens(80)
    exact = evaluate(model, tokens, T)
    assert evaluate(model, tokens, T, autocast=nullcontext()) == exact
    rough = evaluate(model, tokens, T, autocast=torch.autocast("cpu", torch.bfloat16))
    assert 1e-6 < abs(rough - exact) < 0.05


# --- units


def test_units() -> None:
    assert bits_per_char(math.log(65)) == pytest.approx(math.log2(65))
    assert perplexity(math.log(65)) == pytest.approx(65)
    assert (bits_per_char(0.0), perplexity(0.0)) == (0.0, 1.0)


def test_flops_by_hand() -> None:
    """Each matrix product of the forward pass, two operations a multiply-add, times three."""
    shape = GPT2Config(vocab_size=10, block_size=7, n_layer=3, n_head=2, d_model=8, d_ff=20)
    per_layer = [(8, 24), (8, 8), (8, 20), (20, 8)]  # qkv, projection, expand, projection
    scores_and_average = [(8, 7), (7, 8)]  # q kᵀ and the weighted values, over all heads
    layer = sum(a * b for a, b in per_layer + scores_and_average)
    assert training_flops_per_token(shape) == 3 * 2 * (3 * layer + 8 * 10)


def test_the_tied_embedding_counts_once(model: GPT2) -> None:
    embeddings, norms = (9 + T) * 8, 3 * 8
    matrices = 8 * 24 + 8 * 8 + 2 * 8 * 32
    assert count_parameters(model) == embeddings + norms + matrices


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (1000, "1 k"),
        (1234, "1.23 k"),
        (818_048, "818 k"),
        (999_499, "999 k"),
        (999.6, "1 k"),
        (999_500, "1 M"),
        (999_999_999, "1 G"),
        (1_000_000, "1 M"),
        (10_700_000, "10.7 M"),
        (124_439_808, "124 M"),
        (1.5e9, "1.5 G"),
        (999e9, "999 G"),
        (1e12, "1e+12"),
    ],
)
def test_human_count(number: float, text: str) -> None:
    assert human_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (5, "5 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (65, "1 min 05 s"),
        (180, "3 min 00 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (3700, "1 h 01 min"),
        (7199, "1 h 59 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_human_time(seconds: float, text: str) -> None:
    assert human_time(seconds) == text
