"""Loss over a whole split: deterministic, and without a trace in the training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from chargpt.data import blocks


def evaluate(
    model: nn.Module,
    tokens: npt.NDArray[Any],
    block_size: int,
    *,
    batch_size: int = 32,
    autocast: AbstractContextManager[Any] | None = None,
) -> float:
    """Return the mean loss in nats a token over all of `tokens`, in disjoint blocks.

    Each block starts without context, so that a character is predicted from the 1 to block_size
    characters before it.

    Args:
        model: maps ids (B, T) to logits (B, T, V); left in the mode it was in.
        tokens: token ids, (n,) with n ≥ 2.
        block_size: T, tokens a block.
        batch_size: blocks in a forward pass; changes speed and memory only.
        autocast: context for each forward pass, entered again and again, such as
            ``torch.autocast("cpu", torch.bfloat16)``.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for inputs, targets in blocks(tokens, block_size, batch_size):
            with autocast or nullcontext():
                logits = model(inputs.to(device))  # (B, T, V)
            total += F.cross_entropy(
                logits.float().flatten(0, 1), targets.to(device).flatten(), reduction="sum"
            ).item()
            count += targets.numel()
    return total / count


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while, then back in the mode it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
