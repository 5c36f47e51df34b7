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

from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt

from chargpt.config import SampleConfig, Unknown
from chargpt.errors import UserError
from chargpt.evaluation import BATCH_SIZE, log_probabilities
from chargpt.generation import encode_prompt
from chargpt.model import GPT2
from chargpt.tokenizer import CharTokenizer


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
    with (see `chargpt.generation.encode_prompt`), and how likely it is to end is not scored.

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
    start = np.array(encode_prompt("", tokenizer, SampleConfig()), dtype=ids.dtype)  # (s,)
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
