"""Texts: finding files, reading them, and decoding their bytes."""

from __future__ import annotations

import codecs
import difflib
import glob
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

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


class RawText(NamedTuple):
    """The bytes of one source, and what to call it in messages."""

    name: str
    data: bytes


# --- reading


def read_sources(sources: Sequence[str]) -> list[RawText]:
    """Return the bytes of each source, in the order given (a folder's files sorted by path).

    Raises:
        UserError: no source, or one that is missing, unreadable or empty.
    """
    if not sources:
        raise UserError(f"no text: give a file, or a data set ({', '.join(datasets.NAMES)})")
    raw_texts: list[RawText] = []
    for source in sources:
        if not source:
            raise UserError("the name of a text is empty: give a file, or - for standard input")
        if source == STANDARD_INPUT:
            raw_texts.append(RawText("standard input", sys.stdin.buffer.read()))
        elif source in datasets.NAMES:
            raw_texts.append(RawText(source, datasets.load_dataset(source)))
        else:
            try:
                paths = _find_files(source)
            except (OSError, RuntimeError) as error:  # a text given for a name, ~ of nobody
                shown = source if len(source) <= 60 else source[:60] + "…"
                raise UserError(
                    f"{shown}: cannot be looked up ({error}): give a text file, a folder, "
                    "a glob, or -"
                ) from error
            raw_texts += [RawText(str(path), _read_file(path)) for path in paths]
    for raw in raw_texts:
        if not raw.data:
            raise UserError(
                f"{raw.name} is empty: give a text with at least some thousand characters"
            )
    return raw_texts


def _find_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and _is_visible(file, path)
        )
        if not files:
            raise UserError(f"{source} is a folder without files: put some text files there")
        return files
    if path.exists():
        return [path]
    if any(character in source for character in "*?["):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        files = sorted({match for match in matches if match.is_file()})  # ** can match twice
        if files:
            return files
        raise UserError(f"{source}: no file matches this pattern; check it with ls")
    siblings = [*datasets.NAMES]
    if path.parent.is_dir():
        siblings += [str(path.parent / sibling.name) for sibling in path.parent.iterdir()]
    near = difflib.get_close_matches(source, siblings, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else "give a text file, a folder, a pattern, "
    hint += "" if near else f"- for standard input, or a data set ({', '.join(datasets.NAMES)})"
    raise UserError(f"{source}: no such file; {hint}")


def _is_visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a readable file"
        ) from error


def decode(raw: RawText, encoding: str) -> str:
    """Return the text of `raw`; a byte-order mark decides the encoding, line ends stay as they are.

    Raises:
        UserError: an unknown encoding, a binary file, or a byte that is not of the encoding; the
            message names the file, the byte's offset and its line.
    """
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if raw.data.startswith(mark)), None)
    codec = marked or encoding
    try:
        text = raw.data.decode(codec)
    except LookupError as error:  # no such codec, or one that is not for text
        raise UserError(
            f"unknown encoding {encoding!r}: give --encoding utf-8, latin-1, cp1252, utf-16, …"
        ) from error
    except UnicodeError as error:
        if not isinstance(error, UnicodeDecodeError):  # the codec of domain names, and the like
            raise UserError(f"{raw.name} is not {codec} ({error}): give --encoding") from error
        if b"\0" in raw.data[:8192]:
            raise UserError(f"{raw.name} is a binary file: give plain text") from error
        start = error.start + len(raw.data) - len(error.object)  # utf-8-sig leaves out its mark
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
        raise UserError(f"{raw.name} is empty: give a text with at least some thousand characters")
    return text
