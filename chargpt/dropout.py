"""Dropout (Srivastava et al. 2014), with masks that are cheap on a CPU.

PyTorch draws one serial random number a value on the CPU, which takes longer than the layer it
follows. Here one 64-bit draw decides four values. On a GPU PyTorch's own dropout is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LANES = 4  # 16-bit numbers in a 64-bit draw
_LEVELS = 1 << 16


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
    if x.device.type != "cpu":
        return F.dropout(x, p)
    dropped = round(p * _LEVELS)
    draws = torch.empty(-(-x.numel() // _LANES), dtype=torch.int64)
    draws.random_(torch.iinfo(torch.int64).min, None)  # None: up to the largest, all 64 bits
    lanes = draws.view(torch.int16)[: x.numel()].view(x.shape)
    keep = (lanes >= dropped - _LEVELS // 2).to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
    return x * keep


class Dropout(nn.Module):
    """`dropout` while training, the identity otherwise.

    Args:
        p: probability of dropping a value, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return dropout(x, self.p) if self.training else x

    def extra_repr(self) -> str:
        """Show p where the module is printed."""
        return f"p={self.p}"
