"""Bytes as tokens: 256 ids for any text, for texts with thousands of distinct characters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from chargpt.config import Unknown
from chargpt.data.mapped import count_tokens
from chargpt.data.streaming import ByteDecoder
from chargpt.data.tokenizer import CharTokenizer

BYTE_MARK = "\udcff"
"""Written as the byte 0xFF, which UTF-8 never has, by the error handler ``surrogateescape``."""


class ByteTokenizer(CharTokenizer):
    """Text to the bytes of its UTF-8 and back. Byte ``b`` has id ``b``; end-of-text has 256.

    Its `characters` are U+0000 to U+00FF, a name for each byte.
    """

    unit, units = "byte", "bytes"

    def __init__(self, *, end_of_text: bool = False) -> None:
        super().__init__(map(chr, range(256)), end_of_text=end_of_text)

    @property
    def byte_ids(self) -> npt.NDArray[Any]:
        """Ids of the bytes, (256,); 0xFF marks the end of a document, if that is a token."""
        ids = np.arange(256, dtype=self.dtype)
        if self.end_of_text_id is not None:
            ids[0xFF] = self.end_of_text_id
        return ids

    def encode(self, text: str, *, unknown: Unknown = "error") -> npt.NDArray[Any]:
        """Return the ids of `text`, (n,), one per byte of its UTF-8. No character is unknown."""
        data = text.encode("utf-8", "surrogatepass")
        return np.frombuffer(data, np.uint8).astype(self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; what is no UTF-8 becomes U+FFFD, end-of-text nothing."""
        return "".join(self._pieces(ids))

    def decoder(self) -> ByteDecoder:
        """Return an object that decodes ids as they come."""
        return ByteDecoder(self.vocab_size)

    def n_tokens(self, text: str) -> int:
        """Return the number of ids of a text."""
        return len(text.encode("utf-8", "surrogatepass"))

    def n_characters(self, ids: npt.NDArray[Any]) -> int:
        """Return the number of characters of a text; the end of a document counts as one."""
        counts = count_tokens(ids, self.vocab_size)
        return int(counts.sum() - counts[0x80:0xC0].sum())  # bytes that continue a character

    def per_character(self, text: str, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the sum of the scores of each character's bytes, (len(text),)."""
        widths = np.fromiter((self.n_tokens(c) for c in text), np.int64, len(text))
        starts = np.cumsum(widths) - widths
        return np.add.reduceat(scores, starts).astype(np.float32)

    def to_json(self) -> str:
        """Return the kind of tokenizer as JSON with a format version."""
        fields = json.loads(super().to_json()) | {"type": "byte", "characters": []}
        return json.dumps(fields, indent=1) + "\n"

    def __repr__(self) -> str:
        return f"ByteTokenizer(end_of_text={self.end_of_text_id is not None})"

    def _pieces(self, ids: Iterable[int]) -> Iterable[str]:
        decoder = self.decoder()
        for i in ids:
            yield decoder.push(int(i))
        yield decoder.rest()


def tokenizer_from_json(text: str) -> CharTokenizer:
    """Return the tokenizer that `to_json` of either kind wrote; a damaged text is a UserError."""
    try:
        fields = json.loads(text)
        is_byte = fields["type"] == "byte" and fields["format"] == 1
        end_of_text = bool(fields["end_of_text"])
    except (ValueError, KeyError, TypeError, RecursionError):
        is_byte = False
    return ByteTokenizer(end_of_text=end_of_text) if is_byte else CharTokenizer.from_json(text)
