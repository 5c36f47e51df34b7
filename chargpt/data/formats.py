"""From a source to its bytes, or to the texts in a column of a table, a chunk at a time."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

from chargpt.base.errors import UserError
from chargpt.data import datasets
from chargpt.data.texts import EMPTY, STANDARD_INPUT, Source

CHUNK = 1 << 20
_ROWS = 1000  # of a table, at once
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
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
        with open_file(source) as file, _whole(source):
            while data := file.read(size):
                yield data
    elif source.name == STANDARD_INPUT:
        while data := sys.stdin.buffer.read(size):
            yield data
    else:
        yield datasets.load_dataset(source.name)


def open_file(source: Source) -> BinaryIO:
    """Open the file of a source, to read its bytes; a UserError if that is not possible."""
    assert source.path is not None
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    opener: Any = openers.get(source.path.suffix.lower(), Path.open)
    try:
        return cast(BinaryIO, opener(source.path, "rb"))
    except OSError as error:
        reason = f"{source.name} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: give a readable file") from error


def _open_zstd(path: Path, mode: str) -> Any:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UserError(f"{path} needs a package to be read: {_INSTALL}") from error
    return cast(Any, zstd).open(path, mode)


@contextmanager
def _whole(source: Source) -> Iterator[None]:
    """Report an archive that is damaged or cut off."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each library has its own
        damaged = isinstance(error, EOFError | zlib.error | lzma.LZMAError | OSError)
        if is_compressed(source) and (damaged or type(error).__name__ == "ZstdError"):
            raise UserError(
                f"{source.name} is damaged, or not what its name says ({error}): get it again"
            ) from error
        raise


def is_compressed(source: Source) -> bool:
    """Return whether the bytes of a source are decompressed as they are read."""
    return source.path is not None and source.path.suffix.lower() in _COMPRESSED


def is_plain(source: Source, column: str) -> bool:
    """Return whether a source is a file whose ranges can be read apart from each other."""
    return source.path is not None and not is_compressed(source) and not is_table(source, column)


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
    suffixes = [suffix.lower() for suffix in source.path.suffixes]
    return next((s for s in reversed(suffixes) if s not in _COMPRESSED), "")


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
        some.append(value)
        if len(some) == _ROWS:
            yield some
            some = []
    yield some


def _json_lines(source: Source, column: str) -> Iterator[tuple[str, Any]]:
    with open_file(source) as file, _whole(source):
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{source.name}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict) or column not in row:
                found = ", ".join(map(str, row))[:200] if isinstance(row, dict) else "no object"
                raise UserError(
                    f"{source.name}, line {number} has no {column!r}: give --text-column one of "
                    f"its fields ({found})"
                )
            yield f"line {number}", row[column]


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
