"""Texts to documents, which a separator ends, in one pass over chunks that are cut anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from chargpt.config import DataConfig
from chargpt.data.decoding import read_text
from chargpt.data.formats import is_table, rows
from chargpt.data.texts import Source


def unix_line_ends(text: str) -> str:
    r"""Return the text with ``\n`` for ``\r\n``."""
    return text.replace("\r\n", "\n") if "\r" in text else text


def split_text(
    chunks: Iterable[str], separator: str, ends: bool
) -> Iterator[tuple[list[str], bool]]:
    r"""Yield the parts of documents in a text that arrives in chunks, cut anywhere.

    With ``\n`` in the separator, ``\r\n`` counts as ``\n``. `ends`: whether the end of the text
    ends a document.
    """
    if "\n" in separator:
        chunks, separator = _unix_chunks(chunks), unix_line_ends(separator)
    parts: list[str] = []
    kept = ""  # the start of a separator, perhaps
    for chunk in chunks:
        if parts:
            yield parts, False
        parts = (kept + chunk).split(separator) if separator else [chunk]
        known = len(parts[-1]) - max(0, len(separator) - 1)
        parts[-1], kept = parts[-1][: max(0, known)], parts[-1][max(0, known) :]
    yield [*parts[:-1], "".join(parts[-1:]) + kept], ends


def split_documents(text: str, separator: str) -> Iterator[str]:
    """Yield the documents of a whole text, without empty ones; see `split_text`."""
    for parts, _ in split_text([text], separator, ends=True):
        yield from filter(None, parts)


def documents(source: Source, config: DataConfig) -> Iterator[str]:
    """Yield the documents of a source, without empty ones; errors as when a corpus is read."""
    if is_table(source, config.text_column):
        yield from filter(None, chain.from_iterable(rows(source, config.text_column)))
    else:
        text = read_text(source, config.encoding, config.on_error)
        yield from split_documents(text, config.document_separator)


def _unix_chunks(chunks: Iterable[str]) -> Iterator[str]:
    kept = ""
    for chunk in chunks:
        text = kept + chunk
        kept = "\r" if text.endswith("\r") else ""
        yield unix_line_ends(text[: len(text) - len(kept)])
    if kept:
        yield kept


def mark_ends(parts: list[str], ends: bool, is_open: bool, mark: str) -> tuple[str, bool]:
    """Return a list's text with `mark` after each document, and whether the last one is open.

    `is_open` says whether the document before the list, which continues in it, has characters.
    Documents without characters are left out.
    """
    ended, rest = (parts, "") if ends else (parts[:-1], parts[-1])
    first, others = ended[: int(is_open)], ended[int(is_open) :]
    documents = [*first, *filter(None, others)]
    return mark.join([*documents, rest]), bool(rest) or (is_open and not documents)
