"""Causal scaled-dot-product attention (Vaswani et al. 2017, 3.2.1): one signature, three backends.

========  ==================================================================================
matmul    the textbook, written out; CPUs multiply it fast, and memory pays (T × T a head)
sdpa      PyTorch's fused kernel; the one for GPUs
native    the kernel of ``kernels.cpp``; CPUs only, and only where it compiles
========  ==================================================================================

They agree, and are tested to.

Shapes: B batch, H heads, T queries, S keys, D head size; the queries are the last T of S positions.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.compute import native
from chargpt.compute.dropout import dropout

Backend = Literal["sdpa", "matmul", "native"]


def self_attention(
    qkv: Tensor, n_head: int, *, dropout_p: float = 0.0, backend: Backend | None = None
) -> Tensor:
    """Attend among the positions of each sequence.

    Args:
        qkv: queries, keys and values side by side, (B, T, 3C).
        n_head: H.
        dropout_p: probability of dropping an attention weight; 0 when not training.
        backend: see `causal_attention`. ``native`` falls back to ``matmul`` where it does not fit.

    Returns:
        (B, T, C).
    """
    if backend == "native":
        if native.suits(qkv, widths=(qkv.size(2) // (3 * n_head),)):
            return native.attention(qkv, n_head, dropout_p)
        backend = "matmul"
    q, k, v = split_heads(qkv, n_head)  # 3 × (B, H, T, D)
    y = causal_attention(q, k, v, dropout_p=dropout_p, backend=backend)
    return y.transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, C)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Map (B, T, 3C) to queries, keys and values, each (B, H, T, D)."""
    heads = qkv.view(*qkv.shape[:2], 3, n_head, qkv.size(2) // (3 * n_head))  # (B, T, 3, H, D)
    q, k, v = heads.permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, D)
    return q, k, v


def default_backend(device_type: str, dropout_p: float) -> Backend:
    """Return the backend to use where none was measured."""
    # On a CPU the fused kernel cannot drop attention weights.
    return "matmul" if device_type == "cpu" and dropout_p > 0 else "sdpa"


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, backend: Backend | None = None
) -> Tensor:
    """Let each position average the values up to itself, weighted by how well keys fit its query.

    Args:
        q: queries, (B, H, T, D).
        k: keys, (B, H, S, D).
        v: values, (B, H, S, D).
        dropout_p: probability of dropping an attention weight; 0 when not training.
        backend: ``sdpa`` or ``matmul``; None takes `default_backend`.

    Returns:
        softmax(q kᵀ / √D + mask) v, shape (B, H, T, D).
    """
    backend = backend or default_backend(q.device.type, dropout_p)
    return _BACKENDS[backend](q, k, v, dropout_p)


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q kᵀ / √D + mask), shape (B, H, T, S): what each position looks at.

    Args:
        q: queries, (B, H, T, D).
        k: keys, (B, H, S, D).
    """
    hidden = torch.zeros(q.size(-2), k.size(-2), dtype=q.dtype, device=q.device)
    hidden.masked_fill_(~_visible(q, k), float("-inf"))  # (T, S)
    # One call scales, multiplies and masks: each pass over (B, H, T, S) costs as much as a product.
    scores = torch.baddbmm(
        hidden, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.size(-1) ** -0.5
    )  # (B × H, T, S)
    weights: Tensor = scores.softmax(dim=-1).view(*q.shape[:2], *hidden.shape)  # (B, H, T, S)
    return weights


def _matmul(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    return dropout(attention_weights(q, k), dropout_p) @ v  # (B, H, T, D)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    square = q.size(-2) == k.size(-2)
    mask = None if square else _visible(q, k)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=square, dropout_p=dropout_p
    )


def _visible(q: Tensor, k: Tensor) -> Tensor:
    """Return which key each query may see, shape (T, S)."""
    queries, keys = q.size(-2), k.size(-2)
    return torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)


_BACKENDS = {"sdpa": _sdpa, "matmul": _matmul}
