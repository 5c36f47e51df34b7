"""Filters and draws, compared with a slow implementation in plain Python floats."""

import itertools
import math
import random
from collections import Counter
from typing import Any

import pytest
import slow
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from chargpt.config import SampleConfig
from chargpt.engine.sampling import filter_logits, sample_next, uniform_stream

INF = math.inf

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"temperature": 0},
    {"top_k": 3},
    {"top_k": 99},
    {"top_p": 0.2},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.8, "seen": [0, 2, 7]},
    {"repetition_penalty": 0.6, "seen": [1, 2, 3]},
    {"bias": [0.5, -1, 0, 0, 3, 0, 0, -INF, -INF, 0, -7, 1.5]},
    {"temperature": 1.4, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.7, "top_k": 8, "min_p": 0.02, "repetition_penalty": 1.3, "seen": [0, 5, 11]},
    {"temperature": 3.0, "top_p": 0.7, "bias": [0.0] * 6 + [-INF] * 2 + [2.0] * 4},
]
FILTERS.append(FILTERS[-1] | FILTERS[-2])  # all filters
V = 12


def some_logits(seed: int) -> list[float]:
    rng = random.Random(seed)
    return torch.tensor([rng.gauss(0, 2) for _ in range(V)]).tolist()  # numbers of float32


def config_of(**filters: Any) -> SampleConfig:
    return SampleConfig(**{"temperature": 1.0} | filters)


def fast(logits: Tensor, filters: dict[str, Any]) -> Tensor:
    """Return filtered logits; `filters` has the form of `slow.probabilities`."""
    filters = dict(filters)
    seen, bias = filters.pop("seen", None), filters.pop("bias", None)
    if seen is not None:
        mask = torch.zeros(logits.size(-1), dtype=torch.bool)
        mask[seen] = True
        seen = mask.expand_as(logits)
    bias = None if bias is None else torch.tensor(bias, dtype=torch.float32)
    return filter_logits(logits, config_of(**filters), seen=seen, bias=bias)


def probabilities(logits: Tensor, **filters: Any) -> list[float]:
    return filter_logits(logits, config_of(**filters)).softmax(-1).tolist()


# --- filters


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_probabilities_equal_the_slow_implementation(filters: dict[str, Any]) -> None:
    for seed in range(25):
        logits = some_logits(seed)
        expected = slow.probabilities(logits, **filters)
        p = fast(torch.tensor(logits), filters).softmax(-1).tolist()
        assert p == pytest.approx(expected, abs=1e-6)
        assert [x > 0 for x in p] == [x > 0 for x in expected], "the same tokens are left"


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_rows_do_not_affect_each_other(filters: dict[str, Any]) -> None:
    """To the bit and for any shape; the input is not changed."""
    logits = torch.tensor([some_logits(seed) for seed in range(6)])
    untouched = logits.clone()
    alone = torch.stack([fast(row, filters) for row in logits])
    assert torch.equal(fast(logits, filters), alone)
    assert torch.equal(fast(logits.view(2, 3, V), filters), alone.view(2, 3, V))
    assert torch.equal(fast(logits[3:4], filters), alone[3:4])
    assert torch.equal(logits, untouched)


def test_each_row_has_its_own_seen_tokens() -> None:
    seen = torch.tensor([[True, False, True], [False, False, False]])
    logits = torch.tensor([[4.0, 4, -1]] * 2)
    filtered = filter_logits(logits, config_of(repetition_penalty=2), seen=seen)
    differences = filtered - filtered[:, 1:2]
    assert differences.tolist() == [[-2, 0, -6], [0, 0, -5]]
    unseen = filter_logits(logits, config_of(repetition_penalty=2))
    assert torch.equal(unseen, filter_logits(logits, config_of()))


@pytest.mark.parametrize("temperature", [0, 1e-30, 5e-324])
def test_temperatures_near_zero_take_the_likeliest_token(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])
    assert probabilities(logits, temperature=temperature) == [1, 0, 0, 0, 0]


def test_top_k_keeps_exactly_k_of_equal_logits() -> None:
    for n, k in itertools.product((2, 10, 65, 300), (1, 2, 3, 64)):
        kept = torch.tensor(probabilities(torch.zeros(n), top_k=k))
        assert int((kept > 0).sum()) == min(n, k)
        assert kept.max().item() == pytest.approx(1 / min(n, k))
    partly = torch.tensor(probabilities(torch.tensor([1.0, 3, 1, 1, 2, 1]), top_k=4))
    assert (partly[1] > 0 and partly[4] > 0) and int((partly > 0).sum()) == 4


def test_greedy_takes_one_of_equal_logits() -> None:
    assert sorted(probabilities(torch.zeros(5), temperature=0)) == [0, 0, 0, 0, 1]


def test_top_p_keeps_no_token_beyond_the_exact_share() -> None:
    """Two of four equal tokens hold exactly one half."""
    assert sorted(probabilities(torch.zeros(4), top_p=0.5)) == [0, 0, 0.5, 0.5]


NUMBERS = st.floats(-(2.0**120), 2.0**120, width=32)
LISTS = st.lists(
    st.one_of(NUMBERS, st.floats(-20, 20, width=32), st.sampled_from([0.0, 1.0, 1.0, -INF])),
    min_size=1,
    max_size=70,
)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    logits=LISTS,
    config=st.builds(
        SampleConfig,
        temperature=st.one_of(st.sampled_from([0.0, 5e-324, 1e300]), st.floats(0, 100)),
        top_k=st.integers(0, 80),
        top_p=st.one_of(
            st.sampled_from([1.0, math.nextafter(1, 0), 1e-50, 5e-324]), st.floats(1e-9, 1)
        ),
        min_p=st.one_of(st.sampled_from([0.0, 5e-324]), st.floats(0, 1)),
        repetition_penalty=st.one_of(st.just(1.0), st.floats(0.01, 100)),
    ),
    data=st.data(),
)
def test_an_allowed_token_is_left_to_draw(
    logits: list[float], config: SampleConfig, data: st.DataObject
) -> None:
    n = len(logits)
    bans = data.draw(st.lists(st.booleans(), min_size=n, max_size=n), label="bans")
    seen = data.draw(st.lists(st.booleans(), min_size=n, max_size=n), label="seen")
    allowed = [i for i in range(n) if logits[i] > -INF and not bans[i]]
    assume(allowed)
    bias = torch.tensor([-INF if ban else 0.0 for ban in bans])
    filtered = filter_logits(torch.tensor([logits]), config, seen=torch.tensor([seen]), bias=bias)
    p = filtered.softmax(-1)[0]
    assert torch.isfinite(p).all()
    assert p.sum().item() == pytest.approx(1, abs=1e-4)
    left = set(p.nonzero()[:, 0].tolist())
    assert left <= set(allowed)
    assert len(left) <= (1 if config.temperature == 0 else config.top_k or n)
    for uniform in (0.0, 0.5, 1 - 2**-53, data.draw(st.floats(0, 1, exclude_max=True))):
        drawn = sample_next(filtered, torch.tensor([uniform], dtype=torch.float64))
        assert drawn.tolist()[0] in left


# --- the draw


def chi_square_limit(degrees: int) -> float:
    """Return the 99.9 % quantile of chi-square (Wilson and Hilferty 1931)."""
    share = 2 / (9 * degrees)
    return degrees * (1 - share + 3.0902 * math.sqrt(share)) ** 3


def test_the_chi_square_limit_matches_published_tables() -> None:
    for degrees, limit in ((3, 16.27), (10, 29.59), (60, 99.61)):
        assert chi_square_limit(degrees) == pytest.approx(limit, rel=0.02)


def assert_distribution(draws: list[int], expected: list[float]) -> None:
    """Compare counts with probabilities; tokens expected fewer than five times share a cell."""
    n, counts = len(draws), Counter(draws)
    assert all(expected[i] > 0 for i in counts), "a token of probability 0 was drawn"
    cells = [(counts[i], n * p) for i, p in enumerate(expected) if n * p >= 5]
    rare = [(counts[i], n * p) for i, p in enumerate(expected) if 0 < n * p < 5]
    if rare:
        cells.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    if len(cells) > 1:
        chi_square = sum((c - e) ** 2 / e for c, e in cells)
        assert chi_square < chi_square_limit(len(cells) - 1)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_follow_the_probabilities(filters: dict[str, Any]) -> None:
    n, logits = 100_000, some_logits(3)
    uniforms = torch.tensor(list(itertools.islice(uniform_stream(5), n)), dtype=torch.float64)
    draws = sample_next(fast(torch.tensor(logits), filters).expand(n, -1), uniforms)
    assert_distribution(draws.tolist(), slow.probabilities(logits, **filters))


def test_a_draw_inverts_the_cumulative_distribution() -> None:
    p = [0.0, 0.25, 0.0, 0.5, 0.125, 0.125, 0.0]
    logits = torch.tensor(p).log()
    edges = {0.0: 1, 0.2499: 1, 0.2501: 3, 0.7499: 3, 0.7501: 4, 0.8749: 4, 1 - 2**-53: 5}
    uniforms = torch.tensor(list(edges), dtype=torch.float64)
    drawn = sample_next(logits.expand(len(edges), -1), uniforms)
    assert drawn.tolist() == list(edges.values())
    for uniform, token in edges.items():
        assert slow.draw(p, uniform) == token


def test_each_row_has_its_own_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(60, 500, generator=generator)
    uniforms = torch.rand(60, dtype=torch.float64, generator=generator)
    together = sample_next(rows, uniforms).tolist()
    assert together == [sample_next(rows[i : i + 1], uniforms[i : i + 1]).item() for i in range(60)]
    pairs = zip(rows.tolist(), uniforms.tolist(), strict=True)
    assert together == [slow.draw(slow.softmax(row), uniform) for row, uniform in pairs]


# --- random numbers


def test_a_stream_depends_on_its_seed_only() -> None:
    for seed in (0, 1, 2**63 - 1):
        ours = list(itertools.islice(uniform_stream(seed), 1000))
        assert ours == list(itertools.islice(slow.uniforms(seed), 1000))
        assert all(0 <= u < 1 for u in ours)
        assert len(set(ours)) == 1000
        for skip in (1, 4, 63, 998):
            assert next(uniform_stream(seed, skip)) == ours[skip]


def test_near_seeds_and_near_positions_are_unrelated() -> None:
    n = 1000
    rows = [list(itertools.islice(uniform_stream(seed), 20)) for seed in range(n)]
    table = torch.tensor(rows, dtype=torch.float64)
    for values in (table[:, 0], table[:, 19], table.flatten()):
        assert_distribution((values * 20).long().tolist(), [1 / 20] * 20)
    centred = (table - 0.5) * math.sqrt(12)  # mean 0, variance 1
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1])):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())
