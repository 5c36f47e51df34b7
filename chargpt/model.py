"""GPT-2: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), section 2.3.

    ids ─► token + position embedding ─► n_layer × Block ─► LayerNorm ─► head ─► logits

A block adds to the residual stream twice: first attention, the only layer where positions see each
other, then a feed-forward network, which acts on each position separately.

This file is plain PyTorch. `chargpt.compute.fast_layers` can replace its layers with faster ones.

Shapes: B batch, T time, C = d_model, H heads, D = C / H head size, F = d_ff, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.base.errors import UserError
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

# --- attention (Vaswani et al. 2017, section 3.2)

AttentionBackend = Literal["matmul", "sdpa"]
"""``matmul`` is the textbook formula; ``sdpa`` is PyTorch's fused kernel."""


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Map (B, T, 3C) to queries, keys and values, each (B, H, T, D)."""
    heads = qkv.view(*qkv.shape[:2], 3, n_head, qkv.size(2) // (3 * n_head))  # (B, T, 3, H, D)
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
    return q, k, v


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D + mask), (B, H, T, T): how much positions attend to each other.

    Queries and keys are (B, H, T, D).
    """
    B, H, T, D = q.shape
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)  # (T, T)
    # A single call, because each pass over (B, H, T, T) takes as long as a product.
    scores = torch.baddbmm(mask, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=D**-0.5)  # (B×H, T, T)
    return scores.softmax(dim=-1).view(B, H, T, T)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout, backend: AttentionBackend | None = None
) -> Tensor:
    """Average the values up to each position, weighted by how well their keys match its query.

    The default backend is ``sdpa``, or ``matmul`` for dropout on a CPU, which ``sdpa`` cannot do.

    Returns:
        dropout(softmax(q kᵀ / √D + mask)) v, (B, H, T, D) like the queries, keys and values.
    """
    dropout_p = dropout.p if dropout.training else 0.0
    if backend is None:
        backend = "matmul" if q.device.type == "cpu" and dropout_p > 0 else "sdpa"
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)
    weights: Tensor = dropout(attention_weights(q, k))  # (B, H, T, T)
    return weights @ v


# --- the key-value cache


class LayerCache(NamedTuple):
    """The keys and values of one layer, and what a forward pass reads and writes of them."""

    keys: Tensor  # (slots, H, block_size, D)
    values: Tensor  # (slots, H, block_size, D)
    slots: Tensor  # the slot of each sequence, (B,)
    positions: Tensor  # positions of the new tokens, (B, T)
    length: int  # S, the positions in the longest sequence, including the new ones

    def attend(self, qkv: Tensor, n_head: int) -> Tensor:
        """Store the new keys and values, and attend from each new token to all tokens up to it.

        `qkv` holds those of the new tokens side by side, (B, T, 3C); the result is (B, T, C).
        """
        q, k, v = split_heads(qkv, n_head)  # 3 × (B, H, T, D)
        self.keys[self.slots[:, None], :, self.positions] = k.transpose(1, 2)  # (B, T, H, D)
        self.values[self.slots[:, None], :, self.positions] = v.transpose(1, 2)
        keys = self.keys[self.slots, :, : self.length]  # (B, H, S, D)
        values = self.values[self.slots, :, : self.length]  # (B, H, S, D)
        all_positions = torch.arange(self.length, device=qkv.device)  # (S,)
        visible = all_positions <= self.positions[:, None, :, None]  # (B, 1, T, S)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


class Cache(NamedTuple):
    """The cache of all layers, for one forward pass."""

    layers: Sequence[LayerCache]
    positions: Tensor  # positions of the new tokens, (B, T)


# --- the layers


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: H attentions side by side, then a projection to C."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.backend: AttentionBackend | None = None
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=config.bias)
        self.dropout = nn.Dropout(_or(config.attention_dropout, config.dropout))
        self.projection = nn.Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, cache: LayerCache | None = None) -> Tensor:
        """Map (B, T, C) to (B, T, C); with a cache, the T new positions also see earlier ones."""
        qkv = self.qkv(x)  # (B, T, 3C)
        y = self.attend(qkv) if cache is None else cache.attend(qkv, self.n_head)  # (B, T, C)
        out: Tensor = self.projection(y)  # (B, T, C)
        return out

    def attend(self, qkv: Tensor) -> Tensor:
        """Map queries, keys and values side by side, (B, T, 3C), to (B, T, C)."""
        q, k, v = split_heads(qkv, self.n_head)  # 3 × (B, H, T, D)
        y = causal_attention(q, k, v, self.dropout, self.backend)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


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
    """Add a sublayer's output to the residual stream, with dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

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

        def norm_if(*placements: str) -> nn.Module:
            return layer_norm(config) if config.norm_placement in placements else nn.Identity()

        self.norm = norm_if("pre", "sandwich")
        self.sublayer = sublayer
        self.sublayer_norm = norm_if("sandwich")
        self.sum = ResidualSum(config.dropout)
        self.sum_norm = norm_if("post")

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """Map (B, T, C) to (B, T, C); the sublayer also receives the context."""
        update = self.sublayer_norm(self.sublayer(self.norm(x), *context))  # (B, T, C)
        out: Tensor = self.sum_norm(self.sum(x, update))  # (B, T, C)
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


# --- the model


class GPT2(nn.Module):
    """A decoder-only transformer over token ids.

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
        self.dropout = nn.Dropout(_or(config.embedding_dropout, config.dropout))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.final_norm = layer_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight  # tied: Press & Wolf 2017
        self.apply(_init_weights)
        # Each block adds to the residual stream twice. Its variance must not grow with depth.
        for name, weight in self.named_parameters():
            if name.endswith("projection.weight"):
                _draw_normal(weight, INIT_STD / math.sqrt(2 * config.n_layer))

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Map token ids, (B, T), to logits for the token after each position, (B, T, V).

        With a cache, the T new positions also see earlier ones.

        Raises:
            UserError: T is larger than block_size.
        """
        T = ids.size(1)
        if self.config.block_size < T:
            raise UserError(f"{T} tokens do not fit block_size {self.config.block_size}: crop them")
        positions = cache.positions if cache else torch.arange(T, device=ids.device)  # (…, T)
        x = self.embed(ids, positions)  # (B, T, C)
        for i, block in enumerate(self.blocks):
            x = block(x, cache.layers[i] if cache else None)  # (B, T, C)
        logits: Tensor = self.head(self.final_norm(x))  # (B, T, V)
        return logits

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Map ids, (B, T), and their positions, (T,) or (B, T), to (B, T, C)."""
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (B, T, C)
        out: Tensor = self.dropout(x)
        return out


def layer_norm(config: GPT2Config) -> nn.LayerNorm:
    """Return a LayerNorm (Ba et al. 2016) over the last axis, of size C."""
    return nn.LayerNorm(config.d_model, eps=1e-5, bias=config.bias)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode inside the context, then restore its mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        _draw_normal(module.weight, INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _draw_normal(weight: Tensor, std: float) -> None:
    # PyTorch's normal numbers in float32 have other bits on other processors.
    weight.copy_(torch.empty_like(weight, dtype=torch.float64).normal_(std=std))
