"""Finding text files, reading them, and decoding their bytes."""

from __future__ import annotations

import codecs
import glob
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chargpt.base.checks import did_you_mean
from chargpt.base.errors import UserError
from chargpt.data import datasets

STANDARD_INPUT = "-"

_BYTE_ORDER_MARKS = (  # the 32-bit marks start with the 16-bit ones: longest first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_EMPTY = "is empty: give a text with at least a few thousand characters"


class RawText(NamedTuple):
    """The bytes of one source, and its name in messages."""

    name: str
    data: bytes


# --- reading


def read_sources(sources: Sequence[str]) -> list[RawText]:
    """Return the bytes of each source, in the order given (a folder's files sorted by path).

    Raises:
        UserError: no source, or one that is missing, unreadable, empty, or named twice: the
            validation part could then hold text that is also trained on.
    """
    if not sources:
        raise UserError(f"no text: give a file, or a data set ({', '.join(datasets.NAMES)})")
    files: dict[str | Path, str | Path] = {}  # by name, or by path without links
    for file in chain.from_iterable(map(find_files, sources)):
        identity = file.resolve() if isinstance(file, Path) else file
        if identity in files:
            also = "" if files[identity] == file else f", also as {files[identity]}"
            raise UserError(f"{file} is given twice{also}: give each text once")
        files[identity] = file
    return [_read(file) for file in files.values()]


def find_files(source: str) -> Sequence[str | Path]:
    """Return the files that a source names; standard input and data sets by their names."""
    if not source:
        raise UserError("the name of a text is empty: give a file, or - for standard input")
    if source == STANDARD_INPUT or source in datasets.NAMES:
        return [source]
    try:
        return _find_files(source)
    except (OSError, RuntimeError) as error:  # too long for a name, or ~ of an unknown user
        shown = source if len(source) <= 60 else source[:60] + "…"
        raise UserError(
            f"{shown}: cannot be found ({error}): give a text file, a folder, a glob, or -"
        ) from error


def _find_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        below = {file: file.relative_to(path).parts for file in path.rglob("*") if file.is_file()}
        files = sorted(f for f, parts in below.items() if not any(p[0] == "." for p in parts))
        if not files:
            raise UserError(f"{source} is a folder without files: put some text files there")
        return files
    if path.exists():
        return [path]
    if any(character in source for character in "*?["):
        matches = set(map(Path, glob.glob(str(path), recursive=True)))  # ** can match twice
        files = sorted(match for match in matches if match.is_file())
        if not files:
            raise UserError(f"{source}: no file matches this pattern; check it with ls")
        return files
    siblings = map(str, path.parent.iterdir() if path.parent.is_dir() else ())
    names = ", ".join(datasets.NAMES)
    remedy = f"give a text file, a folder, a pattern, - for standard input, or a data set ({names})"
    hint = did_you_mean(source, [*datasets.NAMES, *siblings], otherwise=remedy, cutoff=0.8)
    raise UserError(f"there is no file {source}{hint}")


def _read(file: str | Path) -> RawText:
    name = "standard input" if file == STANDARD_INPUT else str(file)
    try:
        if isinstance(file, Path):
            data = file.read_bytes()
        elif file == STANDARD_INPUT:
            data = sys.stdin.buffer.read()
        else:
            data = datasets.load_dataset(file)
    except OSError as error:
        reason = f"{name} cannot be read ({error.strerror})"
        raise UserError(f"{reason}: give a readable file") from error
    if not data:
        raise UserError(f"{name} {_EMPTY}")
    return RawText(name, data)


# --- decoding


def decode(raw: RawText, encoding: str) -> str:
    """Return the text of `raw`; a byte-order mark decides the encoding, line ends stay unchanged.

    A UserError names an unknown encoding, a binary file, or the offset and line of a wrong byte.
    """
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if raw.data.startswith(mark)), None)
    codec = marked or encoding
    try:
        text = raw.data.decode(codec)
    except LookupError as error:  # an unknown codec, or one that is not for text
        raise UserError(
            f"unknown encoding {encoding!r}: give --encoding utf-8, latin-1, cp1252, utf-16, …"
        ) from error
    except UnicodeError as error:
        if not isinstance(error, UnicodeDecodeError):  # from codecs such as punycode
            raise UserError(f"{raw.name} is not {codec} ({error}): give --encoding") from error
        if b"\0" in raw.data[:8192]:
            raise UserError(f"{raw.name} is a binary file: give plain text") from error
        start = error.start + len(raw.data) - len(error.object)  # utf-8-sig drops the mark first
        line = raw.data.count(b"\n", 0, start) + 1
        raise UserError(
            f"{raw.name}: byte 0x{raw.data[start]:02x} at offset {start} (line {line}) "
            f"is not {codec}: give --encoding, e.g. --encoding latin-1 or cp1252"
        ) from error
    if "\0" in text[:8192]:
        raise UserError(
            f"{raw.name} is a binary file, or not {codec}: give plain text, or --encoding"
        )
    if not text:
        raise UserError(f"{raw.name} {_EMPTY}")
    return text
