"""What happens inside a model while it predicts one token: what the page's "See inside" shows.

The JavaScript engine computes the same in a page without a server (``web/engine/probe.js``).

Shapes: T positions of the context, H heads, C = d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from chargpt.model import (
    GPT2,
    Block,
    CausalSelfAttention,
    Residual,
    attention_weights,
    evaluating,
    split_heads,
)

N_LIKELIEST = 12  # tokens of each odds


@torch.inference_mode()
def inspect(model: GPT2, context: Sequence[int]) -> dict[str, Any]:
    """Return, as JSON values, how a model predicts the token after a context.

    Args:
        model: on any device.
        context: token ids, at least one and at most block_size.

    Returns:
        ``context``, the ids; ``embedding``: ``token``, ``position`` and ``sum`` of the last token,
        (C,) each; ``lens0`` and ``odds``: what the model would predict after the embedding, and
        what it does predict, as `odds_of`; ``layers``, each with ``attention`` from the last
        position, (H, T), ``lens``, and ``attentionNorm`` and ``feedForwardNorm``, the size of each
        update as a share of the residual stream's.
    """
    with evaluating(model):
        device = model.token_embedding.weight.device
        ids = torch.tensor([list(context)], device=device)
        positions = torch.arange(len(context), device=device)
        token, position = model.token_embedding(ids[0, -1]), model.position_embedding(positions[-1])
        x = model.embed(ids, positions)  # (1, T, C)
        vectors = {"token": token, "position": position, "sum": x[0, -1]}
        result: dict[str, Any] = {
            "context": list(context),
            "embedding": {name: vector.tolist() for name, vector in vectors.items()},
            "lens0": _lens(model, x),
            "layers": [],
        }
        for block in model.blocks:
            assert isinstance(block, Block)
            attention = _last_row(block.attention, x)
            x, attention_norm = _add_update(block.attention, x)
            x, feed_forward_norm = _add_update(block.feed_forward, x)
            result["layers"].append(
                {
                    "attention": attention,
                    "lens": _lens(model, x),
                    "attentionNorm": attention_norm,
                    "feedForwardNorm": feed_forward_norm,
                }
            )
        return result | {"odds": _lens(model, x)}


def odds_of(probabilities: Tensor) -> dict[str, list[Any]]:
    """Return the likeliest tokens of (V,), best first, as ``ids`` and ``p``; none of p = 0."""
    ordered = probabilities.sort(descending=True, stable=True)  # of equal ones, the lower id first
    p: list[float] = [each for each in ordered.values[:N_LIKELIEST].tolist() if each > 0]
    return {"ids": ordered.indices[: len(p)].tolist(), "p": p}


def _add_update(residual: Residual, x: Tensor) -> tuple[Tensor, float]:
    """Return the stream after a sublayer, (1, T, C), and the size of its update at the end."""
    update = residual.sublayer_norm(residual.sublayer(residual.norm(x)))
    share = update[0, -1].norm() / x[0, -1].norm()
    return residual.sum_norm(residual.sum(x, update)), share.item()


def _last_row(residual: Residual, x: Tensor) -> list[list[float]]:
    """Return how much each head looks from the last position at each one, (H, T)."""
    layer = residual.sublayer
    assert isinstance(layer, CausalSelfAttention)
    queries, keys, _ = split_heads(layer.qkv(residual.norm(x)), layer.n_head)  # (1, H, T, D)
    rows: list[list[float]] = attention_weights(queries, keys)[0, :, -1].tolist()
    return rows


def _lens(model: GPT2, x: Tensor) -> dict[str, list[Any]]:
    """Return the odds if the model ended here ("logit lens", nostalgebraist 2020)."""
    logits = model.head(model.final_norm(x[0, -1]))  # (V,)
    return odds_of(logits.double().softmax(-1).cpu())
