"""A text as the page shows it: a record for each character, with what the model thought of it.

The JavaScript engine writes the same records in a page without a server (``web/engine/writer.js``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from chargpt.config import SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.sampling import filter_logits
from chargpt.engine.scheduler import Token
from chargpt.serve.inside import odds_of

CONTEXT_KEPT = 0.5  # of a full context, as the JavaScript engine does


class Contexts:
    """Which part of a text the model reads to predict a character.

    It depends only on the index of the character, so that a text continued from any place sees the
    same contexts again. A full context restarts from its last half.
    """

    def __init__(self, tokenizer: CharTokenizer, block_size: int) -> None:
        self._tokenizer = tokenizer
        self._hidden = int(tokenizer.end_of_text_id is not None)  # the token before character 0
        self._block_size = block_size
        self._step = block_size + 1 - max(1, round(CONTEXT_KEPT * block_size))

    def first_of(self, index: int) -> int:
        """Return the index of the first character in the context of the character at `index`."""
        return max(0, self._start(index) - self._hidden)

    def end_of(self, index: int) -> int:
        """Return the index of the next character whose context starts elsewhere."""
        if index == 0 and not self._hidden:  # its context is a newline that no other one has
            return 1
        return self._start(index) + self._block_size + 1 - self._hidden

    def tokens(self, characters: Sequence[int], first: int) -> list[int]:
        """Return a context, given the ids of its characters and the index of the first one."""
        if first == 0 and len(characters) < self._block_size:
            start = self._tokenizer.encode_prompt("")
            return [*start, *characters] if self._hidden else list(characters) or start
        return list(characters)

    def _start(self, index: int) -> int:
        """Return the number of the context's first token; end-of-text at the start has number 0."""
        over = index + self._hidden - self._block_size
        return self._step * math.ceil(over / self._step) if over > 0 else 0


class Part(NamedTuple):
    """Characters that are predicted from contexts with the same start."""

    start: int
    """Index of the first one to report."""
    end: int
    """Index after the last one."""


def parts(contexts: Contexts, start: int, end: int) -> Iterator[Part]:
    """Yield the parts of a text from an index to another."""
    while start < end:
        until = min(end, contexts.end_of(start))
        yield Part(start, until)
        start = until


def record_of(
    token: Token, index: int, first: int, vocab_size: int, config: SampleConfig | None
) -> dict[str, Any]:
    """Return the record of a token as JSON values.

    Args:
        token: with the log-probabilities of all tokens.
        index: of the character in the text.
        first: index of the first character in its context.
        vocab_size: number of tokens.
        config: the filters that it was drawn with; None: it was given.
    """
    logprobs = torch.full((vocab_size,), -torch.inf)  # (V,)
    ids, values = zip(*token.top, strict=True)
    logprobs[list(ids)] = torch.tensor(values)
    odds = logprobs.double().exp()
    top = odds_of(odds)
    drawn = None
    if config is not None:
        filtered = filter_logits(logprobs, config).double().softmax(-1)
        drawn = {"p": filtered[token.id].item(), "top": filtered[top["ids"]].tolist()}
    return {
        "index": index,
        "id": token.id,
        "given": config is None,
        "p": odds[token.id].item(),
        "top": top,
        "drawn": drawn,
        "first": first,
    }
