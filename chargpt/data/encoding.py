"""Texts to documents, counts and token ids: the work that several processes share. No torch.

A text is read in units: a range of a large file, or some whole files. A unit is a sequence of
lists of strings, the *parts* of documents. A document ends between two parts of a list; the last
part continues in the next list, unless the list says that it ends.
"""

from __future__ import annotations

import codecs
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data.decoding import BINARY_CHECK, Replaced, text_chunks
from chargpt.data.documents import mark_ends, split_text, unix_line_ends
from chargpt.data.formats import is_plain, is_table, open_file, rows
from chargpt.data.texts import Source

Ids = npt.NDArray[np.unsignedinteger[Any]]
Ints = npt.NDArray[np.int64]

_SLICE = 1 << 14  # characters; one outside ASCII makes only its own slice slow
_UTF8_MARK = codecs.BOM_UTF8
_WINDOW = 1 << 16  # bytes read at a time to look for a place to cut
CHANGED = "{} changed while it was read: start again when it is complete"


class Sizes(NamedTuple):
    """How a text is divided."""

    memory: int = 32 << 20  # bytes of text whose ids stay in memory; those of more go into a file
    unit: int = 16 << 20  # bytes that one process reads at a time
    files: int = 500  # most files in a unit
    chunk: int = 1 << 19  # bytes read, or characters encoded, at once


class Unit(NamedTuple):
    """Whole sources, or a range of the bytes of one."""

    sources: tuple[Source, ...]
    n_bytes: int  # of the files, to show progress
    start: int = 0
    stop: int | None = None  # None: the sources are whole
    ends: bool = True  # the last document ends here, not in the next unit


# --- units


def is_utf8(encoding: str) -> bool:
    """Return whether an encoding's name means UTF-8; an unknown one is reported when it is used."""
    try:
        return codecs.lookup(encoding).name == "utf-8"
    except LookupError:
        return False


def units_of(
    sources: Iterable[Source], config: DataConfig, streamed: frozenset[str], sizes: Sizes
) -> Iterator[Unit]:
    """Yield the units of a text, in order: large UTF-8 files in ranges, the other sources whole.

    Sources whose names are in `streamed` are not cut.
    """
    some: list[Source] = []
    size = 0
    for source in sources:
        n_bytes = source.path.stat().st_size if source.path else 0
        if some and (size + n_bytes > sizes.unit or len(some) == sizes.files):
            yield Unit(tuple(some), size)
            some, size = [], 0
        can_be_cut = (
            n_bytes > sizes.unit
            and is_utf8(config.encoding)
            and is_plain(source, config.text_column)
        )
        if can_be_cut and source.name not in streamed:
            yield from _ranges(source, n_bytes, config.document_separator, sizes.unit)
        else:
            some.append(source)
            size += n_bytes
    if some:
        yield Unit(tuple(some), size)


def _ranges(source: Source, n_bytes: int, separator: str, size: int) -> Iterator[Unit]:
    with open_file(source) as file:
        start = len(_UTF8_MARK) if file.read(len(_UTF8_MARK)) == _UTF8_MARK else 0
        while start < n_bytes:
            stop = min(_safe_cut(file, start + size, unix_line_ends(separator).encode()), n_bytes)
            yield Unit((source,), stop - start, start, stop, stop == n_bytes)
            start = stop


def _safe_cut(file: BinaryIO, at: int, separator: bytes) -> int:
    """Return the first place from `at` on where a file may be cut, or its end."""
    reach = 2 * len(separator) + 1  # bytes to look at on both sides
    window = max(_WINDOW, 4 * reach)
    while True:
        begin = max(0, at - reach)
        file.seek(begin)
        data = file.read(window)
        last = len(data) - reach
        safe = (i for i in range(at - begin, last) if _is_safe(data, i, reach, separator))
        if (i := next(safe, None)) is not None:
            return begin + i
        if len(data) < window:
            return begin + len(data)
        at = begin + last


def _is_safe(data: bytes, i: int, reach: int, separator: bytes) -> bool:
    r"""Return whether a cut before byte `i` is not within a character, ``\r\n``, or a separator.

    The search for separators then finds after the cut what it would find in the whole text.
    """
    if data[i] & 0xC0 == 0x80:
        return False
    before, after = data[max(0, i - reach) : i], data[i : i + reach]
    if b"\n" in separator:
        if before[-1:] + after[:1] == b"\r\n":
            return False
        before, after = before.replace(b"\r\n", b"\n"), after.replace(b"\r\n", b"\n")
    overlap = len(separator) - 1
    return overlap < 1 or separator not in before[-overlap:] + after[:overlap]


# --- texts of a unit


class ReadAgain(NamedTuple):
    """Yielded for a unit whose source is not plain UTF-8: it cannot be read in ranges."""

    source: Source


class LeftOut(NamedTuple):
    """Yielded for a source that is left out, because it is not text."""

    source: Source
    reason: str  # begins with the source's name


def _parts_of(unit: Unit, config: DataConfig, chunk: int) -> Iterator[tuple[list[str], bool]]:
    """Yield the lists of a unit: those of short sources are one."""
    some: list[str] = []
    size = 0
    for source in unit.sources:
        for parts, ends in _lists_of(source, unit, config, chunk):
            some += parts
            if ends:
                size += sum(map(len, parts))
            if not ends or size >= chunk:
                yield some, ends
                some, size = [], 0
    if some:
        yield some, True


def _lists_of(
    source: Source, unit: Unit, config: DataConfig, chunk: int
) -> Iterator[tuple[list[str], bool]]:
    if unit.stop is not None:
        texts = _read_range(unit, chunk)
    elif is_table(source, config.text_column):
        yield from ((some, True) for some in rows(source, config.text_column))
        return
    else:
        texts = text_chunks(source, config.encoding, config.on_error, chunk)
    yield from split_text(texts, config.document_separator, unit.ends)


def refuse_wrong(source: Source, config: DataConfig) -> None:
    """Raise a UserError unless a source can be read to its end."""
    texts: Iterator[Any] = text_chunks(source, config.encoding, config.on_error)
    if is_table(source, config.text_column):
        texts = rows(source, config.text_column)
    for _ in texts:
        pass


def _read_range(unit: Unit, chunk: int) -> Iterator[str]:
    [source], start, stop = unit.sources, unit.start, unit.stop
    assert stop is not None
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open_file(source) as file:
        file.seek(start)
        for at in range(start, stop, chunk):
            data = file.read(min(chunk, stop - at))
            if at < BINARY_CHECK and b"\0" in data[: BINARY_CHECK - at]:
                decoder.decode(b"\xff")  # to fail: the whole file is decoded again, and refused
            yield decoder.decode(data, final=at + chunk >= stop)


# --- the first pass: counts


class Counted(NamedTuple):
    """What a list of parts holds."""

    lengths: npt.NDArray[np.unsignedinteger[Any]]  # of the parts, in the smallest type
    ends: bool
    points: npt.NDArray[np.uint32]  # the code points that occur
    counts: npt.NDArray[np.uint32]  # how often
    n_replaced: int  # wrong byte sequences


def count(unit: Unit, config: DataConfig, chunk: int) -> Iterator[Counted | ReadAgain | LeftOut]:
    """Yield what each list of a unit holds."""
    if config.on_error == "skip-file" and unit.stop is None:
        for source in unit.sources:  # to the end, before anything of it is used
            try:
                refuse_wrong(source, config)
            except UserError as error:
                yield LeftOut(source, str(error))
                unit = unit._replace(sources=tuple(s for s in unit.sources if s is not source))
    try:
        before = Replaced.count
        for parts, ends in _parts_of(unit, config, chunk):
            lengths = np.fromiter(map(len, parts), np.int64, len(parts))
            histogram = count_characters("".join(parts))
            points = np.flatnonzero(histogram)
            yield Counted(
                lengths=lengths.astype(np.min_scalar_type(int(lengths.max()))),
                ends=ends,
                points=points.astype(np.uint32),
                counts=histogram[points].astype(np.uint32),
                n_replaced=Replaced.count - before,
            )
            before = Replaced.count
    except UnicodeDecodeError:
        yield ReadAgain(unit.sources[0])


def count_characters(text: str) -> Ints:
    """Return how often each code point occurs, up to the highest one or more."""
    ascii_pieces: list[str] = []
    counts = np.zeros(256, dtype=np.int64)
    for piece in _slices(text):
        if piece.isascii():
            ascii_pieces.append(piece)
            continue
        counts, fewer = sorted((counts, np.bincount(_code_points(piece))), key=len, reverse=True)
        counts[: len(fewer)] += fewer
    data = "".join(ascii_pieces).encode("ascii")
    even = len(data) & ~1
    pairs = np.bincount(np.frombuffer(data[:even], np.uint16), minlength=1 << 16)  # 2 × as fast
    counts[:256] += pairs.reshape(256, 256).sum(0) + pairs.reshape(256, 256).sum(1)
    counts[list(data[even:])] += 1
    return counts


def _slices(text: str) -> Iterator[str]:
    if text.isascii():
        yield text
    else:
        yield from (text[i : i + _SLICE] for i in range(0, len(text), _SLICE))


def _code_points(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


# --- the second pass: token ids


@dataclass(frozen=True, slots=True, eq=False)
class Encoder:
    """Translates characters that the first pass counted into token ids."""

    table: Ids  # (code points,): ids
    mark: str  # a character that no text has, whose id is that of end-of-text; empty: none
    short: bytes | None  # the table for ASCII if its ids are below 256: 2 × as fast

    def encode(self, text: str) -> Ids:
        """Return the ids of a text with marks, (n,)."""
        return np.concatenate([self.table[:0], *map(self._encode_slice, _slices(text))])

    def _encode_slice(self, text: str) -> Ids:
        if not text.isascii():
            return self.table.take(_code_points(text), mode="clip")
        data = text.encode("ascii")
        if self.short is None:
            return self.table.take(np.frombuffer(data, np.uint8), mode="clip")
        return np.frombuffer(data.translate(self.short), np.uint8)


class ByteEncoder(Encoder):
    """Translates text into the bytes of its UTF-8. The mark is a byte that UTF-8 never has."""

    def encode(self, text: str) -> Ids:
        """Return the ids of a text with marks, (n,)."""
        data = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
        return self.table.take(data, mode="clip") if self.mark else data


def encode(
    unit: Unit, config: DataConfig, chunk: int, encoder: Encoder, is_open: bool
) -> Iterator[Ids]:
    """Yield the ids of a unit, end-of-text after each document that ends.

    `is_open`: whether the document that continues in this unit has characters before it.
    """
    for parts, ends in _parts_of(unit, config, chunk):
        text, is_open = mark_ends(parts, ends, is_open, encoder.mark)
        yield encoder.encode(text)


def encode_into(path: Path, start: int, stop: int, unit: Unit, *arguments: Any) -> Iterator[int]:
    """Write the ids of a unit to bytes `start` to `stop` of a file, and yield their CRC-32.

    `arguments` are the other ones of `encode`.

    Raises:
        UserError: the text has changed since the first pass.
    """
    checksum, begin = 0, start
    with path.open("r+b") as file:
        file.seek(start)
        for ids in encode(unit, *arguments):
            start += ids.nbytes
            if start > stop:
                break
            file.write(ids.data)
            checksum = zlib.crc32(ids.data, checksum)
        file.flush()
        if hasattr(os, "posix_fadvise"):  # the disk starts to write, so that fsync waits less
            os.posix_fadvise(file.fileno(), begin, start - begin, os.POSIX_FADV_DONTNEED)
    if start != stop:
        raise UserError(CHANGED.format(unit.sources[0].name))
    yield checksum
