"""How likely is a text? The log-probability that a model gives to each of its characters.

A window of block_size tokens moves over the text by `stride` tokens, and scores those that the
window before it has not: Hugging Face documents the same under "Perplexity of fixed-length models".
A small stride gives each character more context, and takes block_size / stride times as long:

=============  ===============================================================================
stride         tokens that a token past the first window is predicted from
=============  ===============================================================================
0, block_size  1 to block_size, as in `chargpt.evaluate`: each block starts without context
S              block_size - S + 1 to block_size
1              block_size, all that the model can take
=============  ===============================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.config import Unknown
from chargpt.data.tokenizer import CharTokenizer
from chargpt.data.windows import blocks
from chargpt.model import GPT2, evaluating

BATCH_SIZE = 32
"""Windows in a forward pass, where nobody asks for another number."""


def evaluate(
    model: nn.Module,
    tokens: npt.NDArray[Any],
    block_size: int,
    *,
    batch_size: int = BATCH_SIZE,
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
    scores = log_probabilities(model, tokens, block_size, batch_size=batch_size, autocast=autocast)
    return mean_nats(scores)


def mean_nats(scores: npt.NDArray[np.float32]) -> float:
    """Return the loss, in nats a token, of log-probabilities (n,) with n ≥ 1."""
    return -float(scores.sum(dtype=np.float64)) / len(scores)


def log_probabilities(
    model: nn.Module,
    tokens: npt.NDArray[Any],
    block_size: int,
    *,
    stride: int = 0,
    batch_size: int = BATCH_SIZE,
    autocast: AbstractContextManager[Any] | None = None,
) -> npt.NDArray[np.float32]:
    """Return ln p of each token but the first, given those before it in a window.

    A window of T tokens moves by `stride` and scores the tokens that the one before it has not.

    Args:
        model: maps ids (B, T) to logits (B, T, V); left in the mode it was in.
        tokens: token ids, (n,) with n ≥ 1.
        block_size: T, tokens a window.
        stride: tokens that a window moves, 1 to T; 0: T, which makes disjoint blocks.
        batch_size: windows in a forward pass; changes speed and memory only.
        autocast: context for each forward pass, entered again and again.

    Returns:
        Natural logarithms, (n - 1,): entry i is of ``tokens[i + 1]``.

    Raises:
        UserError: a stride outside 0 … T.
    """
    if not 0 <= stride <= block_size:
        raise UserError(
            f"stride is {stride}: give 1 (all the context there is) to {block_size} (block_size), "
            "or 0 for disjoint blocks"
        )
    device = next(model.parameters()).device
    # Collected where they are computed: waiting for each batch would leave a GPU idle.
    scores = torch.empty(len(tokens) - 1, dtype=torch.float32, device=device)
    done = 0
    with evaluating(model), torch.inference_mode():
        for inputs, targets in _windows(tokens, block_size, stride or block_size, batch_size):
            with autocast or nullcontext():
                logits = model(inputs.to(device))  # (B, ≤T, V)
            logits = logits[:, -targets.size(1) :].float().flatten(0, 1)  # (B × ≤S, V)
            nats = F.cross_entropy(logits, targets.to(device).flatten(), reduction="none")
            scores[done : done + len(nats)] = -nats
            done += len(nats)
    assert done == len(scores)
    result: npt.NDArray[np.float32] = scores.cpu().numpy()
    return result


def _windows(
    tokens: npt.NDArray[Any], block_size: int, stride: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows (B, ≤T) and the targets (B, ≤S) of their last positions, in order of the text.

    They are blocks of S = stride tokens, each after the T - S tokens that stand before it. What the
    first window has too much is a block of its own, so that every token but the first is a target
    once.
    """
    lead = block_size - stride
    if lead:
        yield from blocks(tokens[: lead + 1], lead, 1)
    if len(tokens) - lead < 2:
        return
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # (n,)
    before = ids.unfold(0, lead, stride) if lead else ids.new_empty(len(ids), 0)  # (·, T - S)
    done = 0
    for inputs, targets in blocks(tokens[lead:], stride, batch_size):
        context = before[done : done + len(inputs)]  # (B, T - S)
        yield torch.cat([context, inputs], dim=1), targets  # (B, T), (B, S)
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
    """Return ln p of each character of a text, given those before it.

    The text is taken for one document: its first character is predicted from what a document starts
    with (see `CharTokenizer.encode_prompt`), and how likely it is to end is not scored.

    Args:
        model: any GPT2 with this tokenizer's vocabulary; left in the mode it was in.
        tokenizer: of the model.
        text: at least one character.
        stride: 1 (most context, slowest) to block_size; 0: block_size.
        unknown: of characters outside the vocabulary. ``error`` refuses them; ``skip`` hides them
            from the model and scores them NaN; ``replace`` gives them the score of the replacement.
        batch_size: windows in a forward pass; changes speed and memory only.
        autocast: context for each forward pass, entered again and again.

    Returns:
        Natural logarithms, (len(text),); divide by -ln 2 for bits of surprise.

    Raises:
        UserError: an empty text, one with no known character, a character that the model has never
            seen (under "error"), a stride outside 0 … block_size.
    """
    if not text:
        raise UserError("the text to score is empty: give at least one character")
    ids = tokenizer.encode(text, unknown=unknown)  # (len(text),), fewer where some were skipped
    if not len(ids):
        raise UserError("the model has never seen any character of the text: give another text")
    start = np.array(tokenizer.encode_prompt(""), dtype=ids.dtype)  # (s,)
    tokens = np.concatenate([start, ids])  # (s + len(ids),)
    scores = token_log_probabilities(
        model, tokens, stride=stride, batch_size=batch_size, autocast=autocast
    )[len(start) - 1 :]  # (len(ids),)
    if len(ids) == len(text):
        return scores
    known = set(tokenizer.characters)
    spread = np.full(len(text), np.nan, dtype=np.float32)
    spread[np.fromiter((character in known for character in text), bool, len(text))] = scores
    return spread


def token_log_probabilities(
    model: GPT2,
    tokens: npt.NDArray[Any],
    *,
    stride: int = 0,
    batch_size: int = BATCH_SIZE,
    autocast: AbstractContextManager[Any] | None = None,
) -> npt.NDArray[np.float32]:
    """Return ln p of each token but the first, given those before it.

    Args:
        model: any GPT2; left in the mode it was in.
        tokens: token ids, (n,).
        stride: 1 (most context, slowest) to block_size; 0: block_size.
        batch_size: windows in a forward pass; changes speed and memory only.
        autocast: context for each forward pass, entered again and again.

    Returns:
        Natural logarithms, (n - 1,): entry i is of ``tokens[i + 1]``.

    Raises:
        UserError: no tokens, or a stride outside 0 … block_size.
    """
    if not len(tokens):
        raise UserError("there are no tokens to score: give at least one")
    return log_probabilities(
        model,
        tokens,
        model.config.block_size,
        stride=stride,
        batch_size=batch_size,
        autocast=autocast,
    )
