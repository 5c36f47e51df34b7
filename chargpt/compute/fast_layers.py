"""The layers of `chargpt.model` on C++ kernels, and the functions that swap them in.

A fast layer is a subclass with the same parameters and state; only `forward` differs. Where the
kernels do not support its tensors (device, type or width), it calls its parent's `forward`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from chargpt.compute import native
from chargpt.compute.dropout import dropout
from chargpt.compute.muon import MuonSettings, Tensors, muon_update
from chargpt.model import ACTIVATIONS, GPT2, CausalSelfAttention, FeedForward, Residual, ResidualSum

Backend = Literal["matmul", "sdpa", "native"]
"""``native`` is the kernel; the other two are PyTorch: see `chargpt.model.AttentionBackend`."""


class FastLayerNorm(nn.LayerNorm):
    """LayerNorm in one pass, rounded to the type of the matrix product that follows."""

    dtype: torch.dtype | None = None  # of the result; None: that of matrix products

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, C) to (…, C)."""
        return self.fork(x)[0]

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm(x) and x, both (…, C); the gradients of the two are added in the kernel."""
        weights = (self.weight, self.bias)
        fits = x.dtype == torch.float32 and x.shape[-1:] == self.weight.shape
        if not fits or not native.supports(x, widths=x.shape[-1:], weights=weights):
            return super().forward(x), x
        return native.fork_layer_norm(x, self.weight, self.bias, self.eps, self.dtype)


class FastStreamNorm(FastLayerNorm):
    """The same for a norm in the residual stream: its result must not be rounded."""

    dtype = torch.float32

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return norm(x) and x, both (…, C)."""
        return super().fork(x.float() if x.dtype == torch.bfloat16 else x)


class FastResidual(Residual):
    """A sublayer whose norm also carries the residual connection's gradient."""

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map (B, T, C) to (B, T, C); the sublayer also receives the context."""
        if not isinstance(self.norm, FastLayerNorm):
            return super().forward(x, *context)
        normed, x = self.norm.fork(x)
        update = self.sublayer_norm(self.sublayer(normed, *context))  # (B, T, C)
        out: Tensor = self.sum_norm(self.sum(x, update))  # (B, T, C)
        return out


class FastLinear(nn.Linear):
    """A linear layer that rounds its weight and sums its gradients inside the product."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, inputs) to (…, outputs)."""
        widths = [self.in_features]
        if self.bias is not None:  # without one, any number of outputs
            widths.append(self.out_features)
        fits = x.size(-1) == self.in_features
        if not fits or not native.supports(x, widths=widths, weights=(self.weight, self.bias)):
            return super().forward(x)
        return native.linear(x, self.weight, self.bias)


class FastFeedForward(FeedForward):
    """Both linear layers and the GELU between them, computed on blocks of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        first, second = self.expand, self.projection
        widths = (first.in_features, first.out_features)
        weights = (first.weight, first.bias, second.weight, second.bias)
        fits = self.activation is ACTIVATIONS["gelu"] and x.size(-1) == first.in_features
        if not fits or not native.supports(x, widths=widths, weights=weights):
            return super().forward(x)
        return native.feed_forward(x, *weights)


class FastResidualSum(ResidualSum):
    """x + dropout(update) in one pass."""

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Map two tensors (B, T, C) to one."""
        fits = x.dtype == torch.float32 and x.shape == update.shape
        if not fits or not native.supports(x, update, widths=x.shape[-1:]):
            return super().forward(x, update)
        return native.residual_sum(x, update, self.dropout.p if self.training else 0.0)


class FastDropout(nn.Dropout):
    """Dropout with masks that are cheap on a CPU; it needs no kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return dropout(x, self.p) if self.training else x


class FastCausalSelfAttention(CausalSelfAttention):
    """Attention in one pass over queries, keys and values, without a (T, T) matrix."""

    def attend(self, qkv: Tensor) -> Tensor:
        """Map queries, keys and values side by side, (B, T, 3C), to (B, T, C)."""
        head_size, rest = divmod(qkv.size(2), 3 * self.n_head)
        if rest or not native.supports(qkv, widths=(head_size,)):
            return super().attend(qkv)
        return native.attention(qkv, self.n_head, self.dropout.p if self.training else 0.0)


class FastGPT2(GPT2):
    """A GPT-2 that sums its two embeddings, with dropout, in one pass.

    A model of this class computes on the kernels; see `chargpt.compute.step`.
    """

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Map ids, (B, T), and their positions, (T,) or (B, T), to (B, T, C)."""
        tables = (self.token_embedding.weight, self.position_embedding.weight)
        if not native.supports(*tables, widths=(self.config.d_model,), weights=tables):
            return super().embed(ids, positions)
        return native.embedding(ids, positions, *tables, self.dropout.p if self.training else 0.0)


FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FastLinear,
    FeedForward: FastFeedForward,
    Residual: FastResidual,
    GPT2: FastGPT2,
    ResidualSum: FastResidualSum,
}


def use_fast_dropout(model: nn.Module) -> None:
    """Use `FastDropout` in a model, in place; on a GPU and in compiled code it is PyTorch's."""
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout


def set_attention(model: nn.Module, backend: Backend) -> None:
    """Set the backend of every attention layer of a model, in place.

    ``native`` falls back to ``matmul`` for tensors that the kernel does not support.
    """
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            if backend == "native":
                module.__class__, module.backend = FastCausalSelfAttention, "matmul"
            else:
                module.__class__, module.backend = CausalSelfAttention, backend


def use_kernels(model: GPT2) -> None:
    """Swap a model's layers for those on the kernels, in place; parameters and state stay the same.

    Raises:
        KernelsError: the kernels cannot be compiled or loaded here; the model is unchanged.
    """
    native.load_kernels()
    for module in model.modules():
        if type(module) in FAST:
            module.__class__ = FAST[type(module)]
    before_products = [module.norm for module in model.modules() if isinstance(module, Residual)]
    for norm in (*before_products, model.final_norm):
        if type(norm) is nn.LayerNorm:
            norm.__class__ = FastLayerNorm
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = FastStreamNorm


def fast_muon_update(
    weights: Tensors,
    gradients: Tensors,
    momenta: Tensors,
    lengths: Sequence[float],
    settings: MuonSettings,
) -> None:
    """Call `native.muon_update` where the kernels support the tensors, else `muon_update`."""
    tensors = (*weights, *gradients, *momenta)
    widths = {size for weight in weights for size in weight.shape}
    contiguous = all(tensor.is_contiguous() for tensor in tensors)
    supported = settings.dtype in native.load_kernels().dtypes
    if contiguous and supported and native.supports(*tensors[:1], widths=widths, weights=tensors):
        native.muon_update(weights, gradients, momenta, lengths, settings)
    else:
        muon_update(weights, gradients, momenta, lengths, settings)
