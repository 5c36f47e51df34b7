"""The layers of `chargpt.model` on the kernels of `chargpt.compute.native`, and the swap of one for other.

A fast layer is a subclass with the same parameters and state; only `forward` differs, and where
the kernels do not suit (another device, another type, an odd width) it does what its parent does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from chargpt.compute import native
from chargpt.compute.dropout import dropout
from chargpt.compute.muon import MuonSettings, Tensors, muon_update
from chargpt.model import (
    ACTIVATIONS,
    GPT2,
    CausalSelfAttention,
    FeedForward,
    Residual,
    ResidualSum,
)

Backend = Literal["matmul", "sdpa", "native"]
"""How attention computes: the two of `chargpt.model`, or the kernel."""


class FastLayerNorm(nn.LayerNorm):
    """LayerNorm in one pass, rounded for the matrix product that follows."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C) to (…, C)."""
        weights = (self.weight, self.bias)
        if x.dtype != torch.float32 or not native.supports(x, widths=x.shape[-1:], weights=weights):
            return super().forward(x)
        return native.layer_norm(x, self.weight, self.bias, self.eps)


class FastLinear(nn.Linear):
    """A matrix product whose weight is rounded and whose gradients are summed on the way."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        widths, weights = (self.in_features, self.out_features), (self.weight, self.bias)
        if not native.supports(x, widths=widths, weights=weights):
            return super().forward(x)
        return native.linear(x, self.weight, self.bias)


class FastFeedForward(FeedForward):
    """Both linear layers and the GELU between them, a block of tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        first, second = self.expand, self.projection
        widths = (first.in_features, first.out_features)
        weights = (first.weight, first.bias, second.weight, second.bias)
        is_gelu = self.activation is ACTIVATIONS["gelu"]
        if not is_gelu or not native.supports(x, widths=widths, weights=weights):
            return super().forward(x)
        return native.feed_forward(x, *weights)


class FastResidualSum(ResidualSum):
    """x + dropout(update) in one pass."""

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Map two tensors (B, T, C) to one."""
        if x.dtype != torch.float32 or not native.supports(x, update, widths=x.shape[-1:]):
            return super().forward(x, update)
        return native.residual_sum(x, update, self.dropout.p if self.training else 0.0)


class FastDropout(nn.Dropout):
    """Dropout with masks that are cheap on a CPU; needs no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return dropout(x, self.p) if self.training else x


class FastCausalSelfAttention(CausalSelfAttention):
    """Attention in one pass over queries, keys and values, without the (T, T) weights."""

    def attend(self, qkv: Tensor) -> Tensor:
        """Map queries, keys and values side by side, (B, T, 3C), to (B, T, C)."""
        if not native.supports(qkv, widths=(qkv.size(2) // (3 * self.n_head),)):
            return super().attend(qkv)
        return native.attention(qkv, self.n_head, self.dropout.p if self.training else 0.0)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    FeedForward: FastFeedForward,
    ResidualSum: FastResidualSum,
}


def use_fast_dropout(model: nn.Module) -> None:
    """Replace a model's dropout, in place; on a GPU and in compiled code it stays PyTorch's."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout


def set_attention(model: nn.Module, backend: Backend) -> None:
    """Choose how every attention layer of a model computes, in place.

    Args:
        model: its layers are changed.
        backend: ``native`` is the kernel; where that does not suit, ``matmul`` is used.
    """
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            if backend == "native":
                module.__class__, module.backend = FastCausalSelfAttention, "matmul"
            else:
                module.__class__, module.backend = CausalSelfAttention, backend


def use_kernels(model: GPT2) -> None:
    """Let a model compute on the kernels, in place; its parameters and state stay as they are.

    Raises:
        KernelsError: they cannot be compiled or loaded here; the model is as it was.
    """
    native.load_kernels()
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
    # A norm whose output joins the residual stream must not round it.
    before_products = [module.norm for module in model.modules() if isinstance(module, Residual)]
    for norm in (*before_products, model.final_norm):
        if type(norm) is nn.LayerNorm:
            norm.__class__ = FastLayerNorm


def fast_muon_update(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    lengths: Sequence[float],
    settings: MuonSettings,
) -> None:
    """Do what `chargpt.compute.muon.muon_update` does, on the kernels where they suit; see there."""
    tensors = (*weights, *gradients, *momenta)
    widths = {size for weight in weights for size in weight.shape}
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    known = settings.dtype in native.load_kernels().dtypes
    if contiguous and known and native.supports(*tensors[:1], widths=widths, weights=tensors):
        native.muon_update(weights, gradients, momenta, lengths, settings)
    else:
        muon_update(weights, gradients, momenta, lengths, settings)
