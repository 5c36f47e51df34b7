"""From a source to its bytes, a chunk at a time."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from chargpt.base.errors import UserError
from chargpt.data import datasets
from chargpt.data.texts import EMPTY, STANDARD_INPUT, Source

CHUNK = 1 << 20


def raw_chunks(source: Source, size: int = CHUNK) -> Iterator[bytes]:
    """Yield the bytes of a source; a UserError if there are none, or they cannot be read."""
    chunk = b""
    for chunk in _chunks(source, size):
        yield chunk
    if not chunk:
        raise UserError(f"{source.name} {EMPTY}")


def _chunks(source: Source, size: int) -> Iterator[bytes]:
    if source.path is not None:
        with open_file(source) as file:
            while data := file.read(size):
                yield data
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


def is_plain(source: Source) -> bool:
    """Return whether a source is a file whose ranges can be read apart from each other."""
    return source.path is not None


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
