"""Slow reference implementations of sampling and generation, in float64."""

import math
from collections.abc import Collection, Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chargpt.engine.scheduler import Token
from chargpt.model import GPT2


def softmax(values: Sequence[float]) -> list[float]:
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def probabilities(
    logits: Sequence[float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Collection[int] = (),
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    written: Sequence[int] = (),
    bias: Sequence[float] | None = None,
) -> list[float]:
    """Return the probability of each token after all filters."""
    logits = [x + b for x, b in zip(logits, bias or [0.0] * len(logits), strict=True)]
    for i in seen:
        logits[i] *= 1 / repetition_penalty if logits[i] > 0 else repetition_penalty
    for i in set(written):
        logits[i] -= presence_penalty + frequency_penalty * written.count(i)
    if temperature == 0:
        p = [float(i == logits.index(max(logits))) for i in range(len(logits))]
    else:
        p = softmax([(x - max(logits)) / temperature for x in logits])
    best_first = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k:
        p = keep(p, best_first[:top_k])
    if top_p < 1:
        nucleus: list[int] = []
        for i in best_first:
            if sum(p[j] for j in nucleus) < top_p:
                nucleus.append(i)
        p = keep(p, nucleus)
    return keep(p, [i for i in range(len(p)) if p[i] >= min_p * max(p)])


def keep(p: list[float], kept: list[int]) -> list[float]:
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def draw(p: Sequence[float], uniform: float) -> int:
    """Return the first token whose cumulative probability exceeds a random number."""
    total = 0.0
    for i, share in enumerate(p):
        total += share
        if total > uniform:
            return i
    raise AssertionError("the probabilities do not sum to 1")


def uniforms(seed: int) -> Iterator[float]:
    generator = np.random.Generator(np.random.Philox(seed))
    while True:
        yield generator.random()


def windows(
    n_prompt: int, n_new: int, block_size: int, context_kept: float
) -> Iterator[tuple[int, int]]:
    """Yield the context (first, last + 1) of each new token and of one more."""
    start = max(0, n_prompt - block_size)
    for end in range(n_prompt, n_prompt + n_new + 1):
        if end - start > block_size:
            start = end - max(1, round(context_kept * block_size))
        yield start, end


def predictions(
    model: GPT2, prompt: Sequence[int], new: Sequence[int], context_kept: float = 0.5
) -> Tensor:
    """Return logits of each new token and of one more, (n + 1, V), without a cache."""
    model = deepcopy(model).double().eval()
    T, ids = model.config.block_size, [*prompt, *new]
    seen = [ids[a:b] for a, b in windows(len(prompt), len(new), T, context_kept)]
    padded = torch.tensor([window + [0] * (T - len(window)) for window in seen])  # (n + 1, T)
    with torch.no_grad():
        logits: Tensor = model(padded)  # (n + 1, T, V); no position sees the zeros after it
    return torch.stack([row[len(window) - 1] for row, window in zip(logits, seen, strict=True)])


def continuation(
    model: GPT2,
    prompt: Sequence[int],
    new: Sequence[int],
    *,
    seed: int,
    context_kept: float = 0.5,
    end_id: int | None = None,
    **filters: Any,
) -> list[int]:
    """Return the token drawn after the prompt and each prefix of `new`: n + 1 tokens.

    `new` is a correct continuation if the result begins with it. End-of-text is never "seen".
    """
    rows = predictions(model, prompt, new, context_kept).tolist()
    stream = uniforms(seed)
    return [
        draw(
            probabilities(row, seen={*prompt, *new[:i]} - {end_id}, written=new[:i], **filters),
            next(stream),
        )
        for i, row in enumerate(rows)
    ]


def assert_likelihoods(tokens: Sequence[Token], logits: Tensor, n_top: int = 0) -> None:
    """Compare the log-probabilities of tokens and of their `n_top` alternatives with logits."""
    expected = logits[: len(tokens)].double().log_softmax(-1)  # (n, V)
    assert len(expected) == len(tokens)
    n_top = min(n_top, logits.size(-1))
    for i, token in enumerate(tokens):
        assert len({j for j, _ in token.top}) == len(token.top) == n_top, i
    ours = torch.tensor([[t.logprob, *(p for _, p in t.top)] for t in tokens], dtype=torch.float64)
    ids = torch.tensor([[t.id, *(j for j, _ in t.top)] for t in tokens], dtype=torch.long)
    if not tokens:
        return
    torch.testing.assert_close(ours, expected.gather(-1, ids), rtol=0, atol=2e-5)
    best = expected.topk(n_top, dim=-1).values
    torch.testing.assert_close(ours[:, 1:], best, rtol=0, atol=2e-5)
