"""The masks of dropout: their rate, scale, independence and gradient."""

import math

import pytest
import torch

from chargpt.compute.dropout import _random_words, dropout
from chargpt.compute.dropout import _table as dropout_table
from chargpt.compute.fast_layers import use_fast_dropout

LANES = 4  # values that one 64-bit word decides
N = 1 << 18


def mask(p: float, n: int = N, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return dropout(torch.ones(n), p) != 0


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.5, 0.9])
def test_rate_of_each_lane(p: float) -> None:
    """Words without a random sign bit would never drop a value in the highest lane."""
    kept = mask(p).view(-1, LANES).double()
    for rate in kept.mean(dim=0).tolist():
        assert abs(rate - (1 - p)) < 5 * math.sqrt(p * (1 - p) / len(kept))


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.7])
def test_scale_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    out = dropout(torch.ones(N), p)
    rounded = round(p * 65536) / 65536
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - rounded)).item()}
    x = torch.randn(N, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    assert torch.equal(dropout(x, p), x * out)
    assert abs(out.double().mean().item() - 1) < 5 * math.sqrt(p / (1 - p) / N)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_positions_are_independent(p: float) -> None:
    """No correlation at any lag: within a word, between neighbouring words, and far apart."""
    kept = mask(p).double()
    centred = (kept - kept.mean()) / kept.std()
    for lag in (*range(1, 17), 64, 256, 4096):
        correlation = (centred[lag:] * centred[:-lag]).mean().item()
        assert abs(correlation) < 5 / math.sqrt(N - lag), lag
    lanes = torch.corrcoef(kept.view(-1, LANES).t())
    off_diagonal = lanes - torch.eye(LANES, dtype=lanes.dtype)
    assert off_diagonal.abs().max() < 5 / math.sqrt(N / LANES)


def test_positions_are_independent_from_mask_to_mask() -> None:
    """If all masks began at one place in the table, positions whose words share some bits would
    always drop together."""
    torch.manual_seed(0)
    n_masks, n = 400, 4096
    kept = torch.stack([dropout(torch.ones(n), 0.5) for _ in range(n_masks)])
    correlation = torch.corrcoef(kept.t()).fill_diagonal_(0)
    assert correlation.abs().max() < 7 / math.sqrt(n_masks)  # the largest of 8 million pairs
    between_masks = torch.corrcoef(kept).fill_diagonal_(0)
    assert between_masks.abs().max() < 6 / math.sqrt(n)


def test_a_mask_longer_than_the_table_does_not_repeat() -> None:
    served = 1 << 20
    kept = mask(0.5, n=2 * served + 5).double()
    first, second, rest = kept.split(served)
    agreement = (first == second).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(served)
    assert len(rest) == 5


def test_the_table_depends_on_neither_seed_nor_inference_mode() -> None:
    expected = mask(0.5, n=999, seed=7)
    dropout_table.cache_clear()
    torch.manual_seed(123)
    with torch.inference_mode():
        again = mask(0.5, n=999, seed=7)
    assert torch.equal(again, expected)
    x = torch.ones(999, requires_grad=True)
    torch.manual_seed(7)
    dropout(x, 0.5).sum().backward()
    assert torch.equal(x.grad != 0, expected)


def test_a_drawn_factor_of_zero_keeps_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factor of 0 would make all words equal, so the lowest bit is always set."""
    draw = _random_words

    def zeros(n: int, generator: torch.Generator | None) -> torch.Tensor:
        return draw(n, generator) if generator else torch.zeros(n, dtype=torch.int64)

    monkeypatch.setattr("chargpt.compute.dropout._random_words", zeros)
    test_rate_of_each_lane(0.5)
    test_positions_are_independent(0.5)


def test_torchs_seed_determines_the_mask() -> None:
    assert torch.equal(mask(0.5, seed=1), mask(0.5, seed=1))
    agreement = (mask(0.5, seed=1) == mask(0.5, seed=2)).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(N)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7), (0, 3)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    outs = [dropout(torch.ones(shape), 0.5) for _ in range(50)]
    assert all(out.shape == shape for out in outs)
    seen = {value for out in outs for value in out.unique().tolist()}
    assert seen == ({0.0, 2.0} if 0 not in shape else set())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_type_stays_the_same(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    out = dropout(torch.ones(N, dtype=dtype), 0.25)
    assert out.dtype == dtype
    rate = (out == 0).double().mean().item()
    assert abs(rate - 0.25) < 5 * math.sqrt(0.25 * 0.75 / N)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(4 / 3, dtype=dtype).item()}


def test_the_gradient_is_the_scaled_mask() -> None:
    torch.manual_seed(0)
    x = torch.randn(27, 37).t().requires_grad_()  # not contiguous
    out = dropout(x, 0.2)
    out.sum().backward()
    torch.testing.assert_close(out, x * x.grad)
    assert torch.equal(x.grad == 0, out == 0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_module_drops_only_in_training_mode(p: float, training: bool) -> None:
    x = torch.ones(64)
    layer = torch.nn.Sequential(torch.nn.Dropout(p)).train(training)
    use_fast_dropout(layer)
    state = torch.get_rng_state()
    out = layer(x)
    acts = training and p > 0
    assert torch.equal(out, x) != acts
    assert torch.equal(torch.get_rng_state(), state) != acts  # otherwise it draws nothing


def test_a_p_near_one_gives_finite_values() -> None:
    assert dropout(torch.ones(64), 1 - 1e-7).isfinite().all()
