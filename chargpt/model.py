"""GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), section 2.3.

    ids ─► token + position embedding ─► n_layer × Block ─► LayerNorm ─► head ─► logits

A block adds to the residual stream twice: attention, the one place where positions see each
other, then a feed-forward network that acts on each position by itself.

Shapes: B batch, T time, C = d_model, H heads, D = C / H head size, F = d_ff, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.compute.attention import Backend, self_attention
from chargpt.compute.dropout import Dropout
from chargpt.compute.kv_cache import Cache, LayerCache
from chargpt.config import ActivationFunction, GPT2Config

INIT_STD = 0.02

ACTIVATIONS: dict[ActivationFunction, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: H small attentions side by side, projected back to C."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout_p = _or(config.attention_dropout, config.dropout)
        self.backend: Backend | None = None
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.projection = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); with a cache, T new positions also see those before them."""
        dropout_p = self.dropout_p if self.training else 0.0
        qkv = self.qkv(x)  # (B, T, 3C)
        if cache is None:
            y = self_attention(qkv, self.n_head, dropout_p=dropout_p, backend=self.backend)
        else:
            y = cache.attend(qkv, self.n_head)  # (B, T, C)
        out: Tensor = self.projection(y)  # (B, T, C)
        return out


class FeedForward(nn.Module):
    """Two linear layers with an activation function between them."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation_function]
        self.projection = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        hidden = self.activation(self.expand(x))  # (B, T, F)
        out: Tensor = self.projection(hidden)  # (B, T, C)
        return out


class ResidualSum(nn.Module):
    """What a sublayer computes, some of it dropped, added to the residual stream.

    Args:
        p: probability of dropping a value, in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = Dropout(p)

    def forward(self, x: Tensor, update: Tensor) -> Tensor:
        """Map two tensors (B, T, C) to one."""
        out: Tensor = x + self.dropout(update)
        return out


class Residual(nn.Module):
    """A sublayer with its LayerNorms, dropout and residual connection.

    =========  ==============================  =====================================
    pre        x + f(norm(x))                  GPT-2
    post       norm(x + f(x))                  Vaswani et al. 2017
    sandwich   x + norm(f(norm(x)))            Ding et al. 2021 (CogView), section 2.4
    =========  ==============================  =====================================
    """

    def __init__(self, sublayer: nn.Module, config: GPT2Config) -> None:
        super().__init__()

        def norm_if(wanted: bool) -> nn.Module:
            return layer_norm(config) if wanted else nn.Identity()

        placement = config.norm_placement
        self.norm = norm_if(placement in ("pre", "sandwich"))
        self.sublayer = sublayer
        self.sublayer_norm = norm_if(placement == "sandwich")
        self.sum = ResidualSum(config.dropout)
        self.sum_norm = norm_if(placement == "post")

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map (B, T, C) to (B, T, C); the sublayer is given the context, too."""
        update = self.sublayer_norm(self.sublayer(self.norm(x), *context))
        out: Tensor = self.sum_norm(self.sum(x, update))
        return out


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.attention = Residual(CausalSelfAttention(config), config)
        self.feed_forward = Residual(FeedForward(config), config)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        out: Tensor = self.feed_forward(self.attention(x, cache))
        return out


class GPT2(nn.Module):
    """A decoder-only transformer over token ids.

    Args:
        config: the shape; its ``vocab_size`` must be known (not 0).

    Raises:
        UserError: the vocabulary size is 0.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        if config.vocab_size == 0:
            raise UserError("vocab_size is 0: give the number of distinct tokens, e.g. 65")
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.block_size, config.d_model)
        self.dropout = Dropout(_or(config.embedding_dropout, config.dropout))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = layer_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight  # tied: Press & Wolf 2017
        self.apply(_init_weights)
        # Each block adds to the residual stream twice; its variance must not grow with depth.
        for name, weight in self.named_parameters():
            if name.endswith("projection.weight"):
                nn.init.normal_(weight, std=INIT_STD / math.sqrt(2 * config.n_layer))

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Return logits for the token after each position.

        Args:
            ids: token ids, (B, T) with T ≤ block_size.
            cache: of the tokens before these, if any; see `chargpt.compute.kv_cache`.

        Returns:
            Unnormalised log-probabilities, (B, T, V).

        Raises:
            UserError: T is larger than block_size.
        """
        T = ids.size(1)
        if self.config.block_size < T:
            raise UserError(f"{T} tokens do not fit block_size {self.config.block_size}: crop them")
        positions = cache.positions if cache else torch.arange(T, device=ids.device)  # (…, T)
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for i, block in enumerate(self.blocks):
            x = block(x, cache.layers[i] if cache else None)  # (B, T, C)
        logits: Tensor = self.head(self.final_norm(x))  # (B, T, V)
        return logits


def layer_norm(config: GPT2Config) -> nn.LayerNorm:
    """Return a LayerNorm (Ba et al. 2016) over the last axis, of size C."""
    return nn.LayerNorm(config.d_model, eps=1e-5, bias=config.bias)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while, then back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
