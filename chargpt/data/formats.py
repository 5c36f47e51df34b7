"""From a source to its bytes, or to the texts in a column of a table, a chunk at a time."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

from chargpt.base.errors import UserError
from chargpt.data import datasets
from chargpt.data.archives import decompress, is_compressed
from chargpt.data.texts import EMPTY, STANDARD_INPUT, Source

CHUNK = 1 << 20
_ROWS = 1000  # of a table, at once
_INSTALL = "pip install 'chargpt[data]'"


# --- bytes


def raw_chunks(source: Source, size: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes of a source, those of an archive decompressed.

    Raises:
        UserError: there are none, they cannot be read, or an archive is damaged.
    """
    chunk = b""
    for chunk in _chunks(source, size):
        yield chunk
    if not chunk:
        raise UserError(f"{source.name} {EMPTY}")


def _chunks(source: Source, size: int) -> Iterator[bytes]:
    if source.path is not None:
        with open_file(source) as file:
            read = iter(lambda: file.read(size), b"")
            yield from decompress(source.name, read, size) if is_compressed(source.name) else read
    elif source.name == STANDARD_INPUT:
        while data := sys.stdin.buffer.read(size):
            yield data
    else:
        yield datasets.load_dataset(source.name)


def open_file(source: Source) -> BinaryIO:
    """Open the file of a source; a UserError if that is not possible."""
    assert source.path is not None
    try:
        return source.path.open("rb")
    except OSError as error:
        reason = f"{source.name} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: give a readable file") from error


def is_plain(source: Source, column: str) -> bool:
    """Return whether a source is a file whose ranges can be read apart from each other."""
    if source.path is None or is_compressed(source.name):
        return False
    return not is_table(source, column)


@contextmanager
def standard_input_kept(sources: list[Source]) -> Iterator[list[Source]]:
    """Yield the sources with a file in place of standard input, which can be read only once."""
    if STANDARD_INPUT not in {source.name for source in sources}:
        yield sources
        return
    with TemporaryDirectory(prefix="chargpt-") as folder:
        path = Path(folder) / "text"
        try:
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        except OSError as error:
            raise UserError(
                f"standard input cannot be kept in {folder} ({error.strerror}): set TMPDIR to "
                "a folder with more room"
            ) from error
        kept = Source("standard input", path)
        yield [kept if source.name == STANDARD_INPUT else source for source in sources]


# --- tables


def is_table(source: Source, column: str) -> bool:
    """Return whether texts are to be taken from a `column` of a source.

    Raises:
        UserError: it is a table and no column is named.
    """
    kind = _kind(source)
    if kind == ".parquet" and not column:
        raise UserError(f"{source.name} is a table: give --text-column, the column with the text")
    return bool(column) and kind in (".parquet", ".jsonl", ".ndjson")


def _kind(source: Source) -> str:
    """Return the last suffix of a name, without that of an archive."""
    if source.path is None:
        return ""
    path = source.path.with_suffix("") if is_compressed(source.name) else source.path
    return path.suffix.lower()


def rows(source: Source, column: str) -> Iterator[list[str]]:
    """Yield the texts in a column of a table, some at a time; rows without one are left out.

    Raises:
        UserError: no such column, something else than text in it, or a damaged table.
    """
    values = _parquet if _kind(source) == ".parquet" else _json_lines
    some: list[str] = []
    for place, value in values(source, column):
        if value is None:
            continue
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{source.name}, {place}: {column!r} holds {kind}, not text")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{source.name}, {place}: half a character ({error})") from error
        some.append(value)
        if len(some) == _ROWS:
            yield some
            some = []
    yield some


def _json_lines(source: Source, column: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_lines(raw_chunks(source)), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{source.name}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict) or column not in row:
            found = ", ".join(map(str, row))[:200] if isinstance(row, dict) else "no object"
            raise UserError(
                f"{source.name}, line {number} has no {column!r}: give --text-column one of its "
                f"fields ({found})"
            )
        yield f"line {number}", row[column]


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    kept: list[bytes] = []  # the start of a line
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        kept.append(first)
        if others:
            yield b"".join(kept)
            yield from others[:-1]
            kept = [others[-1]]
    yield b"".join(kept)


def _parquet(source: Source, column: str) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{source.name} needs a package to be read: {_INSTALL}") from error
    number = 0
    try:
        with open_file(source) as opened, parquet.ParquetFile(opened) as file:
            names = file.schema_arrow.names
            if column not in names:
                found = ", ".join(names)[:200]
                raise UserError(
                    f"{source.name} has no column {column!r}: give --text-column one of its "
                    f"columns ({found})"
                )
            for batch in file.iter_batches(_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"row {number}", value
    except pyarrow.ArrowException as error:
        raise UserError(f"{source.name} is not a whole table ({error!s:.200})") from error
