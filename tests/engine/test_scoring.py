"""Log-probabilities, compared with one forward pass per token in float64."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from twin import shake

import chargpt
from chargpt.base.errors import UserError
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.evaluation import evaluate
from chargpt.engine.scoring import log_probabilities, score
from chargpt.measure.scorecard import score_run
from chargpt.model import GPT2
from chargpt.train import TrainResult

V = 9


def some_model(block_size: int) -> GPT2:
    shape = {"vocab_size": V, "n_layer": 2, "n_head": 2, "d_model": 8, "dropout": 0.5}
    return shake(GPT2(GPT2Config(block_size=block_size, **shape)))


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, V, n).astype(np.uint8)


def one_by_one(model: GPT2, tokens: np.ndarray, stride: int) -> list[float]:
    """One forward pass per token, in float64, with the first window that reaches the token."""
    model = deepcopy(model).double().eval()
    T = model.config.block_size
    scores = []
    for i in range(1, len(tokens)):
        start = 0
        while start + T < i:
            start += stride
        prefix = torch.from_numpy(tokens[start:i].astype(np.int64))
        assert 1 <= len(prefix) <= T
        if start:
            assert len(prefix) > T - stride
        row = model(prefix[None])[0, -1].detach().numpy()
        scores.append(row[tokens[i]] - np.log(np.exp(row).sum()))
    return scores


# --- tokens


@pytest.mark.parametrize(
    ("block_size", "stride"),
    [(1, 1), (2, 1), (2, 2), (5, 1), (5, 2), (5, 3), (5, 4), (5, 5), (8, 3), (8, 4), (8, 7)],
)
def test_scores_equal_one_pass_per_token(block_size: int, stride: int) -> None:
    model, T = some_model(block_size), block_size
    for n in {1, 2, T - 1, T, T + 1, T + 2, T + stride + 1, 2 * T + 1, 29} - {0}:
        expected = one_by_one(model, some_tokens(n), stride)
        for batch_size in (1, 3, 32):
            scores = log_probabilities(model, some_tokens(n), stride=stride, batch_size=batch_size)
            assert (scores.shape, scores.dtype) == ((n - 1,), np.float32)
            np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)


def test_the_loss_is_the_mean_over_disjoint_blocks() -> None:
    model, tokens = some_model(6), some_tokens(50)
    scores = log_probabilities(model, tokens)
    np.testing.assert_array_equal(scores, log_probabilities(model, tokens, 6, stride=6))
    expected = -np.mean(one_by_one(model, tokens, stride=6))
    for batch_size in (1, 3, 32):
        loss = evaluate(model, tokens, 6, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stride", [0, 1, 3])
def test_passes_are_full_batches_without_extra_windows(stride: int) -> None:
    model, tokens = some_model(6), some_tokens(400)
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    log_probabilities(model, tokens, stride=stride, batch_size=4)
    assert max(shape[0] for shape in shapes) == 4
    windows = sum(shape[0] for shape in shapes)
    lead = 6 - (stride or 6)
    assert windows == (lead > 0) + -(-(len(tokens) - 1 - lead) // (stride or 6))


@pytest.mark.parametrize("training", [True, False])
def test_scoring_changes_neither_the_model_nor_random_states(training: bool) -> None:
    model = some_model(6).train(training)
    state, weights = torch.get_rng_state(), [p.clone() for p in model.parameters()]
    first = log_probabilities(model, some_tokens(50), stride=2)
    again = log_probabilities(model, some_tokens(50), stride=2)
    np.testing.assert_array_equal(first, again, "dropout is off")
    assert all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, model.parameters(), weights))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(IndexError):
        log_probabilities(model, np.array([0, V, 1]))  # V is not a token
    assert model.training == training


def test_autocast_applies_to_each_batch() -> None:
    model, tokens = some_model(6), some_tokens(80)
    autocast = torch.autocast("cpu", torch.bfloat16)
    exact = log_probabilities(model, tokens, stride=2)
    rough = log_probabilities(model, tokens, stride=2, batch_size=2, autocast=autocast)
    assert rough.dtype == np.float32
    difference = np.abs(rough - exact)
    assert (difference > 0).mean() > 0.9
    assert difference.max() < 0.5


@pytest.mark.parametrize("stride", [-1, 7, 1000])
def test_a_stride_out_of_range_is_refused(stride: int) -> None:
    model, tokenizer = some_model(6), CharTokenizer("abcdefghi")
    with pytest.raises(UserError, match=rf"^stride is {stride}: give 1 .* to 6 \(block_size\)"):
        log_probabilities(model, some_tokens(20), stride=stride)
    with pytest.raises(UserError, match=f"^stride is {stride}: give 1"):
        score(model, tokenizer, "abc", stride=stride)


# --- characters

LETTERS = CharTokenizer("\n ?abcdef")


@pytest.mark.parametrize("stride", [0, 1, 4])
@pytest.mark.parametrize("text", ["a", "\n", "abc", "fade a face\nbad cab?\n\nd" * 2])
def test_every_character_has_a_score(text: str, stride: int) -> None:
    model = some_model(6)
    scores = score(model, LETTERS, text, stride=stride)
    assert (scores.shape, scores.dtype) == ((len(text),), np.float32)
    tokens = LETTERS.encode("\n" + text)  # a single text starts after a line end
    np.testing.assert_allclose(scores, one_by_one(model, tokens, stride or 6), rtol=0, atol=1e-5)


def test_a_document_starts_after_end_of_text() -> None:
    tokenizer = CharTokenizer("\n ?abcde", end_of_text=True)
    tokens = np.array([tokenizer.end_of_text_id, *tokenizer.encode("bed a cab")])
    expected = one_by_one(some_model(6), tokens, 2)
    found = score(some_model(6), tokenizer, "bed a cab", stride=2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_unknown_characters_are_refused_skipped_or_replaced() -> None:
    model = some_model(6)
    with pytest.raises(UserError, match=r"never seen 'x' .*; first at character 1 "):
        score(model, LETTERS, "axbé")
    skipped = score(model, LETTERS, "axbéécab", unknown="skip", stride=1)
    assert np.isnan(skipped).tolist() == [False, True, False, True, True, False, False, False]
    known = score(model, LETTERS, "abcab", stride=1)
    np.testing.assert_array_equal(skipped[~np.isnan(skipped)], known)
    replaced = score(model, LETTERS, "axbéécab", unknown="replace", stride=1)
    np.testing.assert_array_equal(replaced, score(model, LETTERS, "a?b??cab", stride=1))
    with pytest.raises(UserError, match="never seen any character of the text: give another"):
        score(model, LETTERS, "xé", unknown="skip")


def test_empty_input_is_refused() -> None:
    with pytest.raises(UserError, match="text to score is empty: give at least one character"):
        score(some_model(6), LETTERS, "")
    with pytest.raises(UserError, match="no tokens to score: give at least one"):
        log_probabilities(some_model(6), np.array([], dtype=np.uint8))


# --- a run


def test_a_saved_run_is_scored_with_any_stride(result: TrainResult, text_file: Path) -> None:
    validation = chargpt.load_corpus([str(text_file)]).validation
    model = chargpt.load(result.run).model
    losses = {}
    for stride in (0, 1, 5):
        losses[stride] = score_run(result.run, stride=stride, with_baselines=False).nats_per_char
        expected = -np.mean(one_by_one(model, validation, stride or 16))
        assert losses[stride] == pytest.approx(expected, rel=1e-6)
    assert losses[0] == pytest.approx(evaluate(model, validation, 16), rel=1e-9)
    assert len(set(losses.values())) == 3
