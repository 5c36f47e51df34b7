"""Stand-in until the real ones are merged."""

from __future__ import annotations
import codecs
from collections.abc import Iterator, Iterable
from pathlib import Path
from typing import NamedTuple
from chargpt.data.texts import find_files, decode, RawText, STANDARD_INPUT
from chargpt.data import datasets
import sys


class Source(NamedTuple):
    name: str
    path: Path | None


def find_sources(sources) -> list[Source]:
    return [
        Source(str(f), f if isinstance(f, Path) else None) for s in sources for f in find_files(s)
    ]


def raw_chunks(source: Source, size: int = 1 << 22) -> Iterator[bytes]:
    if source.path is None:
        yield datasets.load_dataset(source.name)
        return
    with source.path.open("rb") as f:
        while data := f.read(size):
            yield data


def is_plain(source: Source) -> bool:
    return source.path is not None


def decode_chunks(name: str, chunks: Iterable[bytes], encoding: str) -> Iterator[str]:
    yield decode(RawText(name, b"".join(chunks)), encoding)
