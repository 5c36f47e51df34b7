"""From logits to a token: what may be drawn, how likely it is, and the draw.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor


def filter_logits(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return logits to draw from, -inf where a filter forbids; something is always left.

    In this order: bias, repetition penalty, temperature, top-k, top-p, min-p, each on what the one
    before leaves.

    Args:
        logits: (..., V).
        temperature: 0 leaves only the likeliest token.
        top_k: tokens to keep, exactly, ties or not (Fan et al. 2018, section 5.3); 0: all.
        top_p: keep the fewest likeliest tokens that hold at least this probability, in (0, 1]
            (Holtzman et al. 2020, section 3.1).
        min_p: keep tokens with at least this share of the likeliest one's probability, in [0, 1]
            (Nguyen et al. 2024, section 3).
        repetition_penalty: divides the positive and multiplies the negative logits of `seen`
            tokens (Keskar et al. 2019, section 4.1); 1 does nothing.
        seen: tokens that the text has, (..., V) of bool; None: none.
        bias: is added to the logits, (V,); -inf forbids a token.
    """
    if bias is not None:
        logits = logits + bias
    if repetition_penalty != 1 and seen is not None:
        limits = torch.finfo(logits.dtype)
        penalty = min(max(repetition_penalty, limits.tiny), limits.max)
        punished = torch.where(logits > 0, logits / penalty, logits * penalty)
        punished = punished.clamp(limits.min, limits.max)  # an infinity would forbid, or win alone
        logits = torch.where(seen & logits.isfinite(), punished, logits)
    if temperature == 0:
        top_k, temperature = 1, 1.0
    # From the largest down: dividing by a tiny temperature gives -inf at worst, never inf or NaN.
    logits = logits - logits.amax(dim=-1, keepdim=True)
    if temperature != 1:
        limits = torch.finfo(logits.dtype)
        logits = logits / min(max(temperature, limits.tiny), limits.max)
    if 0 < top_k < logits.size(-1):
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    if top_p < 1.0:
        ordered = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.values.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # held by the likelier ones
        beyond = before >= top_p
        beyond[..., 0] = False  # the likeliest stays, however small top_p is
        values = ordered.values.masked_fill(beyond, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, ordered.indices, values)
    if min_p > 0:  # the likeliest one has logit 0
        logits = logits.masked_fill(logits < math.log(min_p), -torch.inf)
    return logits


def sample_next(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token from each row of filtered logits, by the inverse of its distribution.

    Args:
        logits: (B, V).
        uniforms: a random number in [0, 1) for each row, (B,), float64.

    Returns:
        Token ids, (B,).
    """
    cumulative = logits.softmax(dim=-1).double().cumsum(dim=-1)  # (B, V)
    threshold = uniforms[:, None] * cumulative[:, -1:]  # (B, 1); the sum is 1 but for rounding
    return (cumulative <= threshold).sum(dim=-1).clamp_(max=logits.size(-1) - 1)  # (B,)


def uniform_stream(seed: int) -> Iterator[float]:
    """Yield random numbers in [0, 1) without end; the same seed yields the same."""
    generator = np.random.Generator(np.random.Philox(seed))
    while True:
        yield from generator.random(64).tolist()
