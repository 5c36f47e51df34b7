"""How likely is a text? The log-probability that a model gives to each of its characters.

A window of T = block_size tokens moves over the text by S = stride tokens, and scores the tokens
that the previous window did not score (Hugging Face, "Perplexity of fixed-length models"). After
the first window, a token has a context of T - S + 1 to T tokens; with S = T, as in `evaluate`, each
block starts without context. A small stride takes T / S times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.compute.step import token_losses
from chargpt.config import Unknown
from chargpt.data.tokenizer import CharTokenizer
from chargpt.data.windows import blocks
from chargpt.model import GPT2, evaluating

BATCH_SIZE = 32  # windows per forward pass


def mean_nats(scores: npt.NDArray[np.float32]) -> float:
    """Return the mean loss of log-probabilities, (n,) with n ≥ 1, in nats per token."""
    return -float(scores.sum(dtype=np.float64)) / len(scores)


def log_probabilities(
    model: nn.Module,
    tokens: npt.NDArray[Any],
    block_size: int | None = None,
    *,
    stride: int = 0,
    batch_size: int = BATCH_SIZE,
    autocast: AbstractContextManager[Any] | None = None,
) -> npt.NDArray[np.float32]:
    """Return ln p of each token but the first, given the tokens before it in a window.

    Args:
        model: maps ids (B, T) to logits (B, T, V); stays in its mode.
        tokens: token ids, (n,) with n ≥ 1.
        block_size: T, tokens per window; None: the block_size of a GPT2.
        stride: tokens from one window to the next, 1 to T; 0: T (disjoint blocks).
        batch_size: windows per forward pass; changes speed and memory only.
        autocast: a reusable context for each forward pass, such as a `torch.autocast`.

    Returns:
        Natural logarithms, (n - 1,): entry i belongs to ``tokens[i + 1]``.

    Raises:
        UserError: no tokens, or a stride outside 0 … T.
    """
    if block_size is None:
        assert isinstance(model, GPT2)
        block_size = model.config.block_size
    if not len(tokens):
        raise UserError("there are no tokens to score: give at least one")
    check_stride(stride, block_size)
    # On the model's device: copying each batch to the CPU would make a GPU wait.
    scores = torch.empty(len(tokens) - 1, device=next(model.parameters()).device)
    done = 0

    def take(nats: Tensor) -> None:
        nonlocal done
        scores[done : done + len(nats)] = -nats
        done += len(nats)

    score_windows(
        model, windows(tokens, block_size, stride or block_size, batch_size), take, autocast
    )
    result: npt.NDArray[np.float32] = scores.cpu().numpy()
    return result


def check_stride(stride: int, block_size: int) -> None:
    """Raise UserError for a stride outside 0 … `block_size`."""
    if not 0 <= stride <= block_size:
        most = f"{block_size} (block_size), or 0 for disjoint blocks"
        raise UserError(f"stride is {stride}: give 1 (most context) to {most}")


def score_windows(
    model: nn.Module,
    windows: Iterable[tuple[Tensor, Tensor]],
    take: Callable[[Tensor], None],
    autocast: AbstractContextManager[Any] | None = None,
) -> None:
    """Call `take` with the losses in nats, (B × ≤S,), of each batch of `windows` and targets."""
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for inputs, targets in windows:
            with autocast or nullcontext():
                logits = model(inputs.to(device))  # (B, ≤T, V)
            logits = logits[:, -targets.size(1) :]  # (B, ≤S, V)
            take(token_losses(model, logits, targets.to(device)))


def windows(
    tokens: npt.NDArray[Any], block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows (B, ≤T) and the targets (B, ≤S) of their last positions, in text order.

    A window is a block of S = stride tokens after the T - S tokens before it. The first T - S
    targets form their own block, so that every token but the first is a target once.
    """
    lead = block_size - stride
    if lead:
        yield from blocks(tokens[: lead + 1], lead, 1)
    if len(tokens) - lead < 2:
        return
    done = 0  # windows
    for inputs, targets in blocks(tokens[lead:], stride, batch_size):
        places = stride * np.arange(done, done + len(inputs))[:, None] + np.arange(lead)
        before = torch.from_numpy(tokens[places].astype(np.int64))  # (B, T - S)
        yield torch.cat([before, inputs], dim=1), targets  # (B, T), (B, S)
        done += len(inputs)


def score(
    model: GPT2,
    tokenizer: CharTokenizer,
    text: str,
    *,
    stride: int = 0,
    unknown: Unknown = "error",
    batch_size: int = BATCH_SIZE,
    autocast: AbstractContextManager[Any] | None = None,
) -> npt.NDArray[np.float32]:
    """Return ln p of each character of a text, given the characters before it.

    The text is one document: its first character follows the start of a document (see
    `CharTokenizer.encode_prompt`). The end of the document is not scored.

    Takes the model's own tokenizer, and the options of `log_probabilities`. For characters outside
    the vocabulary, `unknown` is ``error`` (refuse them), ``skip`` (hide them from the model and
    score them NaN) or ``replace`` (score the replacement).

    Returns:
        Natural logarithms, (len(text),); divide by -ln 2 for bits of surprise.

    Raises:
        UserError: an empty text, a text without a known character, an unknown character (with
            "error"), or a stride outside 0 … block_size.
    """
    if not text:
        raise UserError("the text to score is empty: give at least one character")
    ids = tokenizer.encode(text, unknown=unknown)  # (len(text),), fewer if some were skipped
    if not len(ids):
        raise UserError("the model has never seen any character of the text: give another text")
    start = np.array(tokenizer.encode_prompt(""), dtype=ids.dtype)  # (s,)
    tokens = np.concatenate([start, ids])  # (s + len(ids),)
    scores = log_probabilities(
        model, tokens, stride=stride, batch_size=batch_size, autocast=autocast
    )[len(start) - 1 :]  # (len(ids),)
    if len(ids) == tokenizer.n_tokens(text):
        return tokenizer.per_character(text, scores)
    known = set(tokenizer.characters)
    spread = np.full(len(text), np.nan, dtype=np.float32)
    spread[np.fromiter((character in known for character in text), bool, len(text))] = scores
    return spread
