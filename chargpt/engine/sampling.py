"""From logits to a token: filter the logits, then draw.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from chargpt.config import SampleConfig


def filter_logits(
    logits: Tensor,
    config: SampleConfig,
    *,
    seen: Tensor | None = None,
    counts: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return the logits to draw from: -inf for filtered tokens, at least one token is left.

    The filters apply in this order, each to the result of the one before: bias, repetition penalty
    (Keskar et al. 2019, section 4.1), presence and frequency penalty, temperature, top-k (exactly
    k, also with ties; Fan et al. 2018, section 5.3), top-p (Holtzman et al. 2020, section 3.1),
    min-p (Nguyen et al. 2024, section 3).

    Args:
        logits: (..., V).
        config: the filters.
        seen: tokens in the text, (..., V) of bool, for the repetition penalty: it divides their
            positive logits and multiplies their negative ones; None: no tokens.
        counts: how often each token occurs in the new text, (..., V), for the presence and the
            frequency penalty; None: never.
        bias: added to the logits, (V,); -inf forbids a token.
    """
    limits = torch.finfo(logits.dtype)
    top_k, temperature, penalty = config.top_k, config.temperature, config.repetition_penalty
    if bias is not None:
        logits = logits + bias
    if penalty != 1 and seen is not None:
        punished = torch.where(logits > 0, logits / penalty, logits * penalty)
        punished = punished.clamp(limits.min, limits.max)  # -inf would forbid, inf would win alone
        logits = torch.where(seen & logits.isfinite(), punished, logits)
    if counts is not None:
        logits = logits - config.frequency_penalty * counts - config.presence_penalty * (counts > 0)
    if temperature == 0:
        top_k, temperature = 1, 1.0
    # With a maximum of 0, a tiny temperature can only give -inf, never inf or NaN.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    if temperature != 1:
        logits = logits / min(max(temperature, limits.tiny), limits.max)
    if 0 < top_k < logits.size(-1):
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if config.top_p < 1:
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.values.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # sum over the likelier tokens
        beyond = before >= config.top_p
        beyond[..., 0] = False  # keep the likeliest token for any top_p
        values = ordered.values.masked_fill(beyond, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ordered.indices, values)
    if config.min_p > 0:  # the likeliest token has logit 0
        logits = logits.masked_fill(logits < math.log(config.min_p), -torch.inf)
    return logits


def sample_next(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row, by inverting the cumulative distribution.

    Args:
        logits: filtered, (B, V).
        uniforms: one random number in [0, 1) per row, (B,), float64.

    Returns:
        Token ids, (B,).
    """
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)  # (B, V)
    threshold = uniforms[:, None] * cumulative[:, -1:]  # (B, 1); the sum is 1 up to rounding
    return (cumulative <= threshold).sum(dim=-1).clamp_(max=logits.size(-1) - 1)  # (B,)


def uniform_stream(seed: int, skip: int = 0) -> Iterator[float]:
    """Yield an endless stream of random numbers in [0, 1), fixed by the seed.

    The first `skip` ones are left out, which takes no time.
    """
    philox = np.random.Philox(seed).advance(skip // 4)  # four numbers at a time
    generator = np.random.Generator(philox)
    generator.random(skip % 4)
    while True:
        yield from generator.random(64).tolist()
