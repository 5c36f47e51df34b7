"""Dropout (Srivastava et al. 2014), with masks that are cheap on a CPU.

PyTorch draws one serial random number a value on the CPU, which takes longer than the layer it
follows. Here a fixed table of random 64-bit words is drawn once; a mask takes a stretch of it, maps
each word to another by w -> a w + c with fresh random a (odd) and c, and lets each word decide four
values. That is arithmetic on whole vectors. On a GPU PyTorch's own dropout is used.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

_LANES = 4  # 16-bit numbers in a word
_LEVELS = 1 << 16
_WORDS = 1 << 18  # of the table that one map serves: 2 MB stay in the cache
_OFFSETS = 1 << 16  # where a stretch may begin, so that no two masks line up
_TABLE_SEED = 0x5EED


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each value of `x` to zero with probability `p` and scale the rest by 1 / (1 - p).

    Random numbers come from torch's default generator of the device. On a CPU `p` is rounded to
    a multiple of 2^-16, and the scale is that of the rounded value.

    Args:
        x: floating point, any shape.
        p: in [0, 1).

    Returns:
        A tensor shaped as `x`.
    """
    if p == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)  # something is always kept
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
        stretch = _table()[offset : offset + len(chunk)]
        torch.mul(stretch, a | 1, out=chunk).add_(c)  # modulo 2^64; odd: no two words become one
    return words.view(torch.int16)[:n]


@functools.cache
def _table() -> Tensor:
    """Return the words that every mask is made of, int64; the same in every process."""
    return _random_words(_WORDS + _OFFSETS, torch.Generator().manual_seed(_TABLE_SEED))


def _random_words(n: int, generator: torch.Generator | None) -> Tensor:
    """Return `n` random 64-bit words, int64."""
    words = torch.empty(n, dtype=torch.int64)
    # None: up to the largest, so that all 64 bits are random
    return words.random_(torch.iinfo(torch.int64).min, None, generator=generator)
