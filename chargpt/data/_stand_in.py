"""Sources and their text, chunk by chunk."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chargpt.base.errors import UserError
from chargpt.data import datasets
from chargpt.data.texts import (
    _BYTE_ORDER_MARKS,
    _EMPTY,
    STANDARD_INPUT,
    RawText,
    decode,
    find_files,
)


class Source(NamedTuple):
    """A text, and its name in messages."""

    name: str
    path: Path | None


def find_sources(sources: Sequence[str]) -> list[Source]:
    """Return the sources, each once."""
    if not sources:
        raise UserError(f"no text: give a file, or a data set ({', '.join(datasets.NAMES)})")
    files: dict[str | Path, str | Path] = {}  # by name, or by path without links
    for file in chain.from_iterable(map(find_files, sources)):
        identity = file.resolve() if isinstance(file, Path) else file
        if identity in files:
            also = "" if files[identity] == file else f", also as {files[identity]}"
            raise UserError(f"{file} is given twice{also}: give each text once")
        files[identity] = file
    return [
        Source(
            "standard input" if f == STANDARD_INPUT else str(f), f if isinstance(f, Path) else None
        )
        for f in files.values()
    ]


def raw_chunks(source: Source, size: int = 1 << 22) -> Iterator[bytes]:
    """Yield the bytes of a source."""
    if source.path is None:
        yield datasets.load_dataset(source.name)
        return
    try:
        with source.path.open("rb") as file:
            while data := file.read(size):
                yield data
    except OSError as error:
        reason = f"{source.name} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: give a readable file") from error


def is_plain(source: Source) -> bool:
    """Return whether a source is a file that is read as it is."""
    return source.path is not None


def decode_chunks(name: str, chunks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Yield the text of chunks."""
    kept: list[bytes] = []
    chunks = iter(chunks)
    first = next(chunks, b"")
    if not first:
        raise UserError(f"{name} {_EMPTY}")
    marked = next((codec for mark, codec in _BYTE_ORDER_MARKS if first.startswith(mark)), None)
    n = 0
    try:
        decoder = codecs.getincrementaldecoder(marked or encoding)()
        for chunk in chain([first], chunks):
            kept.append(chunk)
            text = decoder.decode(chunk)
            if n < 8192 and "\0" in text[: 8192 - n]:
                raise UnicodeError
            n += len(text)
            yield text
        text = decoder.decode(b"", final=True)
    except (UnicodeError, LookupError, TypeError, AttributeError):
        decode(RawText(name, b"".join([*kept, *chunks])), encoding)
        raise
    if text:
        yield text
    if not n + len(text):
        raise UserError(f"{name} {_EMPTY}")
