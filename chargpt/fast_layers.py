"""The layers of `chargpt.model` on the kernels of `chargpt.native`, and the swap of one for other.

A fast layer is a subclass with the same parameters and state; only `forward` differs, and where
the kernels do not suit (another device, another type, an odd width) it does what its parent does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chargpt import native
from chargpt.model import ACTIVATIONS, GPT2, FeedForward, ResidualSum


class FastLayerNorm(nn.LayerNorm):
    """LayerNorm in one pass, rounded for the matrix product that follows."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C) to (…, C)."""
        if x.dtype != torch.float32 or not native.suits(x, self.weight, widths=(x.size(-1),)):
            return super().forward(x)
        return native.layer_norm(x, self.weight, self.bias, self.eps)


class FastLinear(nn.Linear):
    """A matrix product whose weight is rounded and whose gradients are summed on the way."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        if not native.suits(x, self.weight, widths=(self.in_features, self.out_features)):
            return super().forward(x)
        return native.linear(x, self.weight, self.bias)


class FastFeedForward(FeedForward):
    """Both linear layers and the GELU between them, a block of tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        first, second = self.expand, self.projection
        widths = (first.in_features, first.out_features)
        if self.activation is not ACTIVATIONS["gelu"] or not native.suits(x, widths=widths):
            return super().forward(x)
        return native.feed_forward(x, first.weight, first.bias, second.weight, second.bias)


class FastResidualSum(ResidualSum):
    """x + dropout(update) in one pass."""

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Map two tensors (B, T, C) to one."""
        if x.dtype != torch.float32 or not native.suits(x, update, widths=(x.size(-1),)):
            return super().forward(x, update)
        return native.residual_sum(x, update, self.dropout.p if self.training else 0.0)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.LayerNorm: FastLayerNorm,
    nn.Linear: FastLinear,
    FeedForward: FastFeedForward,
    ResidualSum: FastResidualSum,
}


def use_kernels(model: GPT2) -> None:
    """Let a model compute on the kernels, in place; its parameters and state stay as they are.

    Raises:
        KernelsError: they cannot be compiled or loaded here; the model is as it was.
    """
    native.load_kernels()
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
