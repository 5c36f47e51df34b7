"""Token ids to text as they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from chargpt.base.errors import UserError


class Decoder(Protocol):
    """Decodes ids as they come."""

    def push(self, token_id: int) -> str:
        """Add an id; return the text that is now known."""

    def rest(self) -> str:
        """Return what remains at the end."""


class CharDecoder:
    """Each id is a character, or nothing."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts

    def push(self, token_id: int) -> str:
        """Return the character."""
        return self._texts[token_id]

    def rest(self) -> str:
        """Return nothing."""
        return ""


class ByteDecoder:
    """Each id is a byte, or ends a document; a character appears with its last byte."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Add an id; return the text that is now known."""
        if not 0 <= token_id < self._vocab_size:
            raise UserError(
                f"token id {token_id} is outside the vocabulary of {self._vocab_size} tokens"
            )
        if token_id >= 256:
            return self.rest()
        return self._decoder.decode(bytes([token_id]))

    def rest(self) -> str:
        """Return what remains at the end: U+FFFD for bytes that never became a character."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
