"""The loss over all blocks of a text, or over some of them; the reference scores each token."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL

from chargpt.compute.world import World
from chargpt.engine.evaluation import evaluate, scored_tokens
from chargpt.engine.scoring import log_probabilities
from chargpt.model import GPT2

T = SMALL.block_size


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 11, n).astype(np.uint8)


def test_a_part_is_whole_blocks_spread_evenly_over_the_text(model: GPT2) -> None:
    tokens = some_tokens(100 * T + 5)
    scores = -log_probabilities(model, tokens).astype(np.float64)
    by_block = scores[: 100 * T].reshape(100, T)
    for most, blocks in ((10 * T, range(0, 100, 10)), (4 * T + 3, (0, 25, 50, 75)), (1, (0,))):
        assert evaluate(model, tokens, T, most=most) == pytest.approx(
            by_block[list(blocks)].mean(), rel=1e-6
        )
        assert scored_tokens(len(tokens), T, most) == len(blocks) * T
    for most in (None, len(tokens), 10**9):
        assert evaluate(model, tokens, T, most=most) == pytest.approx(scores.mean(), rel=1e-6)
        assert scored_tokens(len(tokens), T, most) == len(tokens) - 1


@pytest.mark.parametrize("n", [2, T, T + 1, 7 * T, 9 * T + 3])
@pytest.mark.parametrize("most", [None, 3 * T])
def test_the_shares_of_ranks_add_up_and_take_as_many_forward_passes(
    model: GPT2, n: int, most: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = some_tokens(n)
    expected = evaluate(model, tokens, T, most=most)
    sums: list[tuple[float, float]] = []
    shapes: list[list[Any]] = []

    def total(world: World, *numbers: float) -> list[float]:
        sums.append((numbers[0], numbers[1]))
        return [1.0, 1.0]

    forward = GPT2.forward

    def recorded(gpt2: GPT2, ids: torch.Tensor) -> torch.Tensor:
        shapes[-1].append(ids.shape)
        return forward(gpt2, ids)

    monkeypatch.setattr(World, "total", total)
    monkeypatch.setattr(GPT2, "forward", recorded)
    for rank in range(3):
        shapes.append([])
        evaluate(model, tokens, T, most=most, batch_size=2, world=World(rank=rank, size=3))
    nats, counts = zip(*sums, strict=True)
    assert sum(counts) == scored_tokens(n, T, most)
    assert sum(nats) / sum(counts) == pytest.approx(expected, rel=1e-6)
    assert shapes[0] == shapes[1] == shapes[2]
