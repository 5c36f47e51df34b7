"""From texts to a corpus: read, cut into documents, split, and encode."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chargpt.base.checks import check_types
from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data.texts import decode, read_sources
from chargpt.data.tokenizer import CharTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What was found in the texts; two corpora with the same facts are the same."""

    sha256: str
    """SHA-256 of the bytes of all sources, one after the other."""
    boundaries: str
    """SHA-256 of the documents' lengths."""
    n_characters: int
    n_documents: int

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text or many documents, encoded and split."""

    tokenizer: CharTokenizer
    train: npt.NDArray[Any]
    """Token ids, (n,), smallest unsigned type."""
    validation: npt.NDArray[Any]
    """Token ids, (m,)."""
    sources: tuple[str, ...]
    """What the user named, to read it again."""
    facts: TextFacts

    def summary(self) -> str:
        """Return one line for the person who trains."""
        n_documents = self.facts.n_documents
        documents = f" in {n_documents:,} documents" if n_documents > 1 else ""
        return (
            f"{self.facts.n_characters:,} characters{documents}, {len(self.tokenizer.characters)} "
            f"distinct; {len(self.train):,} to train on, {len(self.validation):,} to validate"
        )


def load_corpus(sources: Sequence[str], config: DataConfig | None = None) -> Corpus:
    """Read, split and encode texts.

    Args:
        sources: files, folders, globs, ``-`` for standard input, or names of data sets.
        config: encoding, document separator, validation fraction.

    Raises:
        UserError: a source that is missing, empty, binary or not of the encoding (named with byte
            offset and line), or nothing left to validate on.
    """
    config = config or DataConfig()
    raw_texts = read_sources(sources)
    digest = hashlib.sha256()
    documents: list[str] = []
    for raw in raw_texts:
        digest.update(raw.data)
        documents += split_documents(decode(raw, config.encoding), config.document_separator)
    if not documents:
        raise UserError(f"{', '.join(sources)} holds only document separators: give some text")
    tokenizer = CharTokenizer.fit(documents, end_of_text=len(documents) > 1)
    lengths = [len(document) for document in documents]
    tokens = encode_documents(documents, tokenizer)
    cut = split_point(lengths, tokenizer.end_of_text_id is not None, config.validation_fraction)
    return Corpus(
        tokenizer=tokenizer,
        train=tokens[:cut],
        validation=tokens[cut:],
        sources=tuple(sources),
        facts=TextFacts(
            sha256=digest.hexdigest(),
            boundaries=hashlib.sha256(np.array(lengths, dtype="<i8").tobytes()).hexdigest(),
            n_characters=sum(lengths),
            n_documents=len(documents),
        ),
    )


# --- documents


def split_documents(text: str, separator: str) -> list[str]:
    """Cut `text` at each `separator` and leave out what is empty; no separator: one document."""
    return [document for document in text.split(separator) if document] if separator else [text]


def encode_documents(documents: Sequence[str], tokenizer: CharTokenizer) -> npt.NDArray[Any]:
    """Return all documents as token ids, (n,), each ended by end-of-text where there is one."""
    end = tokenizer.end_of_text_id
    ends = np.array([] if end is None else [end], dtype=tokenizer.dtype)
    # Joined before encoding: 32,000 names are one call, not 32,000.
    ids = tokenizer.encode("".join(documents))
    boundaries = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return np.insert(ids, boundaries, ends[0]) if ends.size else ids


def split_point(lengths: Sequence[int], end_of_text: bool, validation_fraction: float) -> int:
    """Return how many tokens are for training; the rest validates.

    A single text is cut at the character. Documents stay whole, unless they are so few that the
    nearest boundary would make the validation part less than half or more than twice what was
    asked for.

    Args:
        lengths: of the documents, in characters.
        end_of_text: whether a token follows each document.
        validation_fraction: share asked for.

    Raises:
        UserError: a part would be empty.
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
