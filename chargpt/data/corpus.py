"""From texts to a corpus: read, cut into documents, encode, and split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from chargpt.base.checks import check_fields
from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data.texts import decode, read_sources
from chargpt.data.tokenizer import CharTokenizer

Lengths = npt.NDArray[np.int64]
_JOINED_AT_ONCE = 10_000  # documents; a short string takes ten times the memory of its text


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What the texts contain. Two corpora with equal facts are equal."""

    sha256: str  # of the bytes of all sources, concatenated
    boundaries: str  # SHA-256 of the documents' lengths
    n_characters: int
    n_documents: int

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text or many documents, encoded and split."""

    tokenizer: CharTokenizer
    train: npt.NDArray[Any]  # token ids, (n,), smallest unsigned type
    validation: npt.NDArray[Any]  # token ids, (m,)
    sources: tuple[str, ...]  # as the user named them, to read them again
    facts: TextFacts

    def summary(self) -> str:
        """Return one line about the corpus for the user."""
        n = self.facts.n_documents
        documents = f" in {n:,} documents" if n > 1 else ""
        return (
            f"{self.facts.n_characters:,} characters{documents}, {len(self.tokenizer.characters)} "
            f"distinct; {len(self.train):,} to train on, {len(self.validation):,} to validate"
        )


def load_corpus(sources: Sequence[str], config: DataConfig | None = None) -> Corpus:
    """Read, encode and split texts.

    `sources` are files, folders, globs, ``-`` for standard input, or names of data sets.

    Raises:
        UserError: a source that is missing, named twice, empty, binary or not of the encoding (with
            byte offset and line), or a text too short to split.
    """
    config = config or DataConfig()
    digest = hashlib.sha256()

    def documents() -> Iterator[str]:
        for raw in read_sources(sources):
            digest.update(raw.data)
            yield from split_documents(decode(raw, config.encoding), config.document_separator)

    text, lengths = _join(documents())
    if not text:
        raise UserError(f"{', '.join(sources)} holds only document separators: give some text")
    tokenizer = CharTokenizer.fit([text], end_of_text=len(lengths) > 1)
    tokens = _encode(text, lengths, tokenizer)
    cut = split_point(lengths, tokenizer.end_of_text_id is not None, config.validation_fraction)
    return Corpus(
        tokenizer=tokenizer,
        train=tokens[:cut],
        validation=tokens[cut:],
        sources=tuple(sources),
        facts=TextFacts(
            sha256=digest.hexdigest(),
            boundaries=hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
            n_characters=len(text),
            n_documents=len(lengths),
        ),
    )


# --- documents


def split_documents(text: str, separator: str) -> Iterator[str]:
    r"""Yield the parts of `text` between separators, without empty ones.

    An empty separator yields the whole text. For a separator with ``\n``, ``\r\n`` counts as
    ``\n``, so that a file from Windows gives the same documents.
    """
    if not separator:
        yield text
        return
    if "\n" in separator:
        text, separator = text.replace("\r\n", "\n"), separator.replace("\r\n", "\n")
    start = 0
    while start <= len(text):
        end = text.find(separator, start)
        end = len(text) if end < 0 else end
        if end > start:
            yield text[start:end]
        start = end + len(separator)


def encode_documents(documents: Iterable[str], tokenizer: CharTokenizer) -> npt.NDArray[Any]:
    """Return all documents as token ids, (n,), an end-of-text token (if any) after each one."""
    return _encode(*_join(documents), tokenizer)


def _join(documents: Iterable[str]) -> tuple[str, Lengths]:
    """Return the documents as one string, and the length of each."""
    documents = iter(documents)
    joined: list[str] = []
    lengths: list[Lengths] = [np.array([], dtype=np.int64)]
    while some := list(islice(documents, _JOINED_AT_ONCE)):
        joined.append("".join(some))
        lengths.append(np.fromiter(map(len, some), dtype=np.int64))
    return "".join(joined), np.concatenate(lengths)


def _encode(text: str, lengths: Lengths, tokenizer: CharTokenizer) -> npt.NDArray[Any]:
    ids = tokenizer.encode(text)
    end = tokenizer.end_of_text_id
    return ids if end is None else np.insert(ids, np.cumsum(lengths), end)


def split_point(lengths: npt.ArrayLike, end_of_text: bool, validation_fraction: float) -> int:
    """Return the number of training tokens; the rest is the validation part.

    A single text is cut at any character. Several documents (of `lengths` characters, plus one
    token with `end_of_text`) are cut at the nearest boundary between two of them, unless that makes
    the validation part less than half or more than twice as long as `validation_fraction` of the
    tokens. A part of fewer than two tokens is a UserError.
    """
    ends = np.cumsum(np.asarray(lengths) + end_of_text)
    total = int(ends[-1])
    cut = int((1.0 - validation_fraction) * total)
    nearest = int(ends[np.argmin(np.abs(ends - cut))])
    if 0.5 <= (total - nearest) / (validation_fraction * total) <= 2.0:
        cut = nearest
    if cut < 2 or total - cut < 2:
        raise UserError(
            f"the text has {total} tokens, too few to hold out {validation_fraction:.0%} of them: "
            "give more text"
        )
    return cut
