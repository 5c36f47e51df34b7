"""Causal scaled-dot-product attention (Vaswani et al. 2017, 3.2.1): one signature, two backends.

``sdpa`` is PyTorch's fused kernel. ``matmul`` is the textbook, written out, and the faster one
where dropout is on and the fused kernel cannot drop (any CPU). The two agree, and are tested to.

Shapes: B batch, H heads, T queries, S keys, D head size; the queries are the last T of S positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from chargpt.dropout import dropout

Backend = Literal["sdpa", "matmul"]


class BackendChoice(NamedTuple):
    """A backend, and why it was chosen."""

    backend: Backend
    reason: str


def choose_backend(device_type: str, dropout_p: float) -> BackendChoice:
    """Return the backend for a device type ("cpu", "cuda", …) and a dropout probability."""
    if device_type == "cpu" and dropout_p > 0:
        return BackendChoice("matmul", "the fused CPU kernel cannot drop attention weights")
    return BackendChoice("sdpa", "the fused kernel")


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, backend: Backend | None = None
) -> Tensor:
    """Let each position average the values up to itself, weighted by how well keys fit its query.

    Args:
        q: queries, (B, H, T, D).
        k: keys, (B, H, S, D).
        v: values, (B, H, S, D).
        dropout_p: probability of dropping an attention weight; 0 when not training.
        backend: None lets `choose_backend` decide.

    Returns:
        softmax(q kᵀ / √D + mask) v, shape (B, H, T, D).
    """
    backend = backend or choose_backend(q.device.type, dropout_p).backend
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
