"""How a model is scored and timed, the same way in every script here.

Three ways to score, all in nats per character:

- `whole_loss`: over the whole validation part, in disjoint blocks; what `chargpt train` reports.
- `nanogpt_loss`: over random windows, as nanoGPT's ``estimate_loss`` does for its 1.4697.
- `half_losses`: 90/5/5; the last half of the validation part is a held-out test.

`learning_curve` returns when a run had which loss.
"""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from chargpt.base.errors import UserError
from chargpt.engine.evaluation import evaluate
from chargpt.model import evaluating
from chargpt.runs.report import read_metrics

NANOGPT_BATCHES, NANOGPT_BATCH_SIZE = 200, 64

Tokens = npt.NDArray[Any]
Autocast = AbstractContextManager[Any] | None
"""Context for a forward pass; see `chargpt.engine.evaluation.evaluate`."""


def whole_loss(
    model: nn.Module, tokens: Tokens, block_size: int, *, autocast: Autocast = None
) -> float:
    """Return the mean loss over all of `tokens`, (n,), in disjoint blocks of `block_size`."""
    return evaluate(model, tokens, block_size, autocast=autocast)


class Estimate(NamedTuple):
    """A mean over random batches, and its standard error."""

    loss: float
    standard_error: float


def nanogpt_loss(
    model: nn.Module,
    tokens: Tokens,
    block_size: int,
    *,
    n_batches: int = NANOGPT_BATCHES,
    batch_size: int = NANOGPT_BATCH_SIZE,
    seed: int = 0,
    autocast: Autocast = None,
) -> Estimate:
    """Return the mean loss over random batches of windows, as nanoGPT estimates it.

    The windows depend only on the seed, the sizes and the number of tokens, so that all models are
    scored on the same windows.

    Args:
        model: maps ids (B, T) to logits (B, T, V); its mode is restored.
        tokens: the validation part, (n,).
        block_size: T, tokens per window.
        n_batches: at least 2.
        batch_size: B, windows per batch.
        seed: seed of the windows' starts.
        autocast: context for each forward pass.

    Raises:
        UserError: fewer than T + 1 tokens.
    """
    if len(tokens) <= block_size:
        raise UserError(
            f"{len(tokens)} tokens to validate on are too few for a window of {block_size}: "
            "give more text"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # (n,)
    offsets = torch.arange(block_size + 1)
    losses: list[float] = []
    with evaluating(model), torch.inference_mode():
        for _ in range(n_batches):
            starts = torch.randint(len(ids) - block_size, (batch_size, 1), generator=generator)
            windows = ids[starts + offsets].to(device)  # (B, T + 1)
            with autocast or nullcontext():
                logits = model(windows[:, :-1])  # (B, T, V)
            targets = windows[:, 1:].flatten()  # (B × T,)
            losses.append(F.cross_entropy(logits.float().flatten(0, 1), targets).item())
    return Estimate(statistics.mean(losses), standard_error(losses))


class Halves(NamedTuple):
    """Losses over the two halves of the validation part, 5 % of the text each."""

    first: float
    last: float
    """The held-out test. It is valid only for a checkpoint that was not chosen by validation loss,
    which covers both halves: for "last", not for "best"."""


def half_losses(
    model: nn.Module, tokens: Tokens, block_size: int, *, autocast: Autocast = None
) -> Halves:
    """Return the mean loss over each half of `tokens`, (n,), in disjoint blocks of `block_size`."""
    middle = len(tokens) // 2
    first, last = (
        evaluate(model, half, block_size, autocast=autocast)
        for half in (tokens[:middle], tokens[middle:])
    )
    return Halves(first, last)


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean of at least two values."""
    return float(statistics.stdev(values) / len(values) ** 0.5)


class Evaluation(NamedTuple):
    """A point of a learning curve."""

    step: int
    seconds: float
    """Seconds of training before it, with compilation and without evaluations."""
    val_loss: float


def learning_curve(run: Path) -> list[Evaluation]:
    """Return the evaluations of a run that was trained with ``log_interval=1``."""
    rows = read_metrics(run)
    clock = {row["step"]: row["train_seconds"] for row in rows if row["split"] == "train"}
    return [
        Evaluation(row["step"], clock[row["step"]], row["val_loss"])
        for row in rows
        if row["split"] == "validation"
    ]
