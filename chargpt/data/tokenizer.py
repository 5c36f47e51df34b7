"""Text to token ids and back, one id per character.

The vocabulary is the sorted distinct characters of a text. Texts of several documents have one more
token, end-of-text, with the highest id; it decodes to nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.config import Unknown
from chargpt.data.streaming import CharDecoder, Decoder

FORMAT = 1
REPLACEMENT = "\ufffd"
_CHUNK = 1 << 20  # characters encoded at a time, with 12 bytes of scratch memory each
_REPLACEMENTS = "\ufffd?_ "  # for unknown characters: the first of these in the vocabulary


class CharTokenizer:
    """Characters to ids: character ``characters[i]`` has id ``i``.

    `characters` are one or more distinct characters, in any order; `end_of_text` adds a token that
    ends a document. `rare` are others, which become U+FFFD. Anything else is a UserError.
    """

    unit, units = "char", "characters"  # what a token is, in tables and in sentences

    def __init__(
        self, characters: Iterable[str], *, end_of_text: bool = False, rare: str = ""
    ) -> None:
        self.characters: tuple[str, ...] = tuple(sorted(characters))
        if not self.characters:
            raise UserError("the vocabulary is empty: give a text with at least one character")
        if any(len(character) != 1 for character in self.characters):
            raise UserError("a vocabulary entry is not one character: give single characters")
        if len(set(self.characters)) != len(self.characters):
            raise UserError("the vocabulary has a character twice: give distinct characters")
        self.end_of_text_id: int | None = len(self.characters) if end_of_text else None
        self.rare = rare
        if rare and (REPLACEMENT not in self.characters or {*rare} & {*self.characters}):
            raise UserError("rare characters need U+FFFD, and must not be tokens: train again")
        # Code point → id, or -1 if unknown; the last entry stands for all higher code points.
        points = np.array([ord(character) for character in self.characters])
        others = [ord(character) for character in rare]
        self.ids_of_points = np.full(max([*others, points.max()]) + 2, -1, dtype=np.int32)
        self.ids_of_points[points] = np.arange(len(points))
        if rare:
            self.ids_of_points[others] = self.ids_of_points[ord(REPLACEMENT)]

    @classmethod
    def fit(cls, texts: Iterable[str], *, end_of_text: bool = False) -> Self:
        """Return a tokenizer for the characters of `texts`, of which there must be one or more."""
        return cls(set().union(*texts), end_of_text=end_of_text)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, including end-of-text."""
        return len(self.characters) + (self.end_of_text_id is not None)

    @property
    def dtype(self) -> type[np.unsignedinteger[Any]]:
        """The smallest type that holds every id: one, two or four bytes."""
        if self.vocab_size <= 256:
            return np.uint8
        return np.uint16 if self.vocab_size <= 65_536 else np.uint32

    def encode(self, text: str, *, unknown: Unknown = "error") -> npt.NDArray[Any]:
        """Return the ids of `text`, shape (len(text),) unless characters were skipped.

        Unknown characters are a UserError with the position of the first one; with ``skip`` they
        are left out, and ``replace`` takes the first known of U+FFFD, ``?``, ``_`` and space.
        """
        ids = np.empty(len(text), dtype=np.int32)
        for start in range(0, len(text), _CHUNK):
            piece = text[start : start + _CHUNK].encode("utf-32-le", "surrogatepass")
            points = np.frombuffer(piece, dtype=np.uint32)
            points = np.minimum(points, len(self.ids_of_points) - 1)
            ids[start : start + _CHUNK] = self.ids_of_points[points]
        missing = ids < 0
        if missing.any():
            if unknown == "error":
                raise UserError(self._describe_unknown(text, missing))
            if unknown == "skip":
                ids = ids[~missing]
            else:
                ids[missing] = self._replacement_id()
        return ids.astype(self.dtype)

    def encode_prompt(self, prompt: str, *, unknown: Unknown = "error") -> list[int]:
        """Return the ids that a model continues; never empty (`unknown`: see `encode`).

        With end-of-text in the vocabulary, they are end-of-text and the prompt. Otherwise they are
        the prompt; for an empty one, a newline, or else the first character of the vocabulary.
        """
        ids: list[int] = self.encode(prompt, unknown=unknown).tolist()
        if self.end_of_text_id is not None:
            return [self.end_of_text_id, *ids]
        start = "\n" if "\n" in self.characters else self.characters[0]
        return ids or [self.characters.index(start)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; end-of-text becomes nothing, an unknown id is a UserError."""
        table = (*self.characters, "") if self.end_of_text_id is not None else self.characters
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(table):
            wrong = next(i for i in ids if not 0 <= i < len(table))
            raise UserError(f"token id {wrong} is outside the vocabulary of {len(table)} tokens")
        return "".join(table[i] for i in ids)

    def decoder(self) -> Decoder:
        """Return an object that decodes ids as they come."""
        return CharDecoder((*self.characters, ""))

    def n_tokens(self, text: str) -> int:
        """Return the number of ids of a text without unknown characters."""
        return len(text)

    def n_characters(self, ids: npt.NDArray[Any]) -> int:
        """Return the number of characters of a text; the end of a document counts as one."""
        return len(ids)

    def per_character(self, text: str, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the score of each character, (len(text),), from that of each token."""
        return scores

    def to_json(self) -> str:
        """Return the vocabulary as JSON with a format version."""
        fields = {
            "format": FORMAT,
            "type": "character",
            "end_of_text": self.end_of_text_id is not None,
            "characters": list(self.characters),
            **({"rare": self.rare} if self.rare else {}),
        }
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the tokenizer that `to_json` wrote; a damaged text is a UserError."""
        try:
            fields = json.loads(text)
            version, characters = fields["format"], fields["characters"]
            end_of_text, rare = bool(fields["end_of_text"]), fields.get("rare", "")
            "".join([*characters, rare])  # a TypeError, unless all are strings
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"not a tokenizer file ({error!r}): train the model again") from error
        if version != FORMAT:
            raise UserError(
                f"the tokenizer has format {version!r:.20}, this chargpt reads {FORMAT}: upgrade"
            )
        return cls(characters, end_of_text=end_of_text, rare=rare)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CharTokenizer):
            return NotImplemented
        return self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[Any, ...]:
        return type(self), self.characters, self.end_of_text_id, self.rare

    def __repr__(self) -> str:
        end = ", end_of_text=True" if self.end_of_text_id is not None else ""
        return f"CharTokenizer({''.join(self.characters)!r}{end})"

    def _describe_unknown(self, text: str, missing: npt.NDArray[np.bool_]) -> str:
        where = np.flatnonzero(missing)
        first = int(where[0])
        names = list(dict.fromkeys(f"{text[i]!r} (U+{ord(text[i]):04X})" for i in where[:1000]))
        shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
        line, column = text.count("\n", 0, first) + 1, first - text.rfind("\n", 0, first)
        return (
            f"the model has never seen {shown}; first at character {first} (line {line}, column "
            f"{column}): leave it out, or give --unknown skip or --unknown replace"
        )

    def _replacement_id(self) -> int:
        for character in _REPLACEMENTS:
            if character in self.characters:
                return self.characters.index(character)
        raise UserError(
            "the vocabulary lacks U+FFFD, '?', '_' and space to replace unknown characters by: "
            "give --unknown skip"
        )
