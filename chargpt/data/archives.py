"""Compressed texts: .gz, .bz2, .xz and .zst, in bounded memory."""

from __future__ import annotations

import bz2
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import PurePath
from typing import Any

from chargpt.base.errors import UserError

_GZIP = 16 + zlib.MAX_WBITS  # the window, with a header and a checksum around the data
_CUT_OFF = "the file ends too early"


def is_compressed(name: str) -> bool:
    """Return whether a file's name ends as that of a compressed file."""
    return _suffix(name) in _READERS


def decompress(name: str, chunks: Iterable[bytes], size: int = 1 << 22) -> Iterator[bytes]:
    """Yield the content of a compressed file, at most `size` bytes at a time.

    `name` decides the format. Several members (frames, streams) in a file are joined. Zero bytes
    after the last one, the padding of tapes and .xz files, are skipped.

    Raises:
        UserError: a damaged file, one that ends too early, or .zst without the extra ``data``.
    """
    read, errors = _READERS[_suffix(name)]()
    try:
        yield from read(chunks, size)
    except errors as error:
        raise UserError(
            f"{name} is damaged, or not {_suffix(name)} ({error or _CUT_OFF}): "
            "copy or download it again"
        ) from error


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()


def _members(new: Callable[[], Any], chunks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Read with decompressors that take a limit and keep the rest of their input."""
    member = None
    for chunk in chunks:
        data = chunk
        while True:
            if member is None:
                data = data.lstrip(b"\0")
                if not data:
                    break
                member = new()
            if piece := member.decompress(data, size):
                yield piece
            data = b""
            if member.eof:
                data, member = member.unused_data, None
            elif member.needs_input:
                break
    if member is not None:
        raise EOFError(_CUT_OFF)


class _Gzip:
    """A gzip member, with the interface of `bz2.BZ2Decompressor`."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(_GZIP)
        self._full = False  # the last piece reached its limit: more may be waiting

    def decompress(self, data: bytes, size: int) -> bytes:
        piece = self._member.decompress(self._member.unconsumed_tail + data, size)
        self._full = len(piece) == size
        return piece

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._full and not self._member.unconsumed_tail


_Errors = tuple[type[Exception], ...]
_Reader = tuple[Callable[[Iterable[bytes], int], Iterator[bytes]], _Errors]


def _zstd() -> _Reader:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError as error:
        raise UserError('a .zst file needs another package: pip install "chargpt[data]"') from error
    return partial(_members, zstd.ZstdDecompressor), (zstd.ZstdError, EOFError)


_READERS: dict[str, Callable[[], _Reader]] = {
    ".gz": lambda: (partial(_members, _Gzip), (zlib.error, EOFError)),
    ".bz2": lambda: (partial(_members, bz2.BZ2Decompressor), (OSError, EOFError)),
    ".xz": lambda: (partial(_members, lzma.LZMADecompressor), (lzma.LZMAError, EOFError)),
    ".zst": _zstd,
}
