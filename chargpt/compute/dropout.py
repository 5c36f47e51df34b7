"""Dropout (Srivastava et al. 2014) with masks that are cheap on a CPU.

On a CPU, PyTorch draws one random number per value in sequence, which takes longer than the layer
before it. This module draws a fixed table of random 64-bit words once. Each mask takes a section
of the table, maps every word w to a w + c with new random a (odd) and c, and lets each word decide
four values: arithmetic on whole vectors. On a GPU it uses PyTorch's own dropout.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 4  # 16-bit numbers per word
_LEVELS = 1 << 16
_WORDS = 1 << 18  # words per section: 2 MB fit the cache
_OFFSETS = 1 << 16  # possible starts of a section, so that masks do not line up
_TABLE_SEED = 0x5EED


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each value of `x` to zero with probability `p` and scale the rest by 1 / (1 - p).

    Random numbers come from torch's default generator of the device. On a CPU, `p`, in [0, 1), is
    first rounded to a multiple of 2^-16.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)  # p < 1
    lanes = _random_lanes(x.numel()).view(x.shape)
    keep = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.ge(lanes, dropped - _LEVELS // 2, out=keep)
    return x * keep.mul_(_LEVELS / (_LEVELS - dropped))


def _random_lanes(n: int) -> Tensor:
    """Return `n` uniform 16-bit numbers, int16, shape (n,)."""
    words = torch.empty(-(-n // _LANES), dtype=torch.int64)
    chunks = torch.split(words, _WORDS)
    draws = _random_words(3 * len(chunks), None).view(-1, 3).tolist()
    for chunk, (a, c, start) in zip(chunks, draws, strict=True):
        offset = start % _OFFSETS
        section = _table()[offset : offset + len(chunk)]
        # Modulo 2^64; an odd factor keeps different words different.
        torch.mul(section, a | 1, out=chunk).add_(c)
    return words.view(torch.int16)[:n]


@functools.cache
def _table() -> Tensor:
    """Return the table of words, int64; it is the same in every process."""
    return _random_words(_WORDS + _OFFSETS, torch.Generator().manual_seed(_TABLE_SEED))


def _random_words(n: int, generator: torch.Generator | None) -> Tensor:
    """Return `n` random 64-bit words, int64."""
    words = torch.empty(n, dtype=torch.int64)
    # The upper limit None includes the largest integer, so all 64 bits are random.
    return words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
