"""Finding texts."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from chargpt.base.checks import did_you_mean
from chargpt.base.errors import UserError
from chargpt.data import datasets

STANDARD_INPUT = "-"

EMPTY = "is empty: give a text with at least a few thousand characters"


class Source(NamedTuple):
    """A text."""

    name: str  # in messages
    path: Path | None  # None: standard input, or a data set


def find_sources(sources: Sequence[str]) -> list[Source]:
    """Return the texts that `sources` name, in the order given (a folder's files sorted by path).

    Raises:
        UserError: no source, or one that is missing or named twice: the validation part could then
            hold text that is also trained on.
    """
    if not sources:
        raise UserError(f"no text: give a file, or a data set ({', '.join(datasets.NAMES)})")
    files: dict[str | tuple[int, int], str | Path] = {}  # by name, or by file number: links are one
    for file in chain.from_iterable(map(find_files, sources)):
        identity = _file_number(file) if isinstance(file, Path) else file
        if identity in files:
            also = "" if files[identity] == file else f", also as {files[identity]}"
            raise UserError(f"{file} is given twice{also}: give each text once")
        files[identity] = file
    return [Source(str(f), f if isinstance(f, Path) else None) for f in files.values()]


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
        files = [path.joinpath(*parts) for parts in sorted(_below(str(path)))]
        if not files:
            raise UserError(f"{source} is a folder without texts: put some text files there")
        return files
    if path.exists():
        return [path]
    if any(character in source for character in "*?["):
        matches = set(map(Path, glob.glob(str(path), recursive=True)))  # ** can match twice
        files = sorted(match for match in matches if _has_bytes(str(match)))
        if not files:
            raise UserError(f"{source}: no file matches this pattern; check it with ls")
        return files
    siblings = map(str, path.parent.iterdir() if path.parent.is_dir() else ())
    names = ", ".join(datasets.NAMES)
    remedy = f"give a text file, a folder, a pattern, - for standard input, or a data set ({names})"
    hint = did_you_mean(source, [*datasets.NAMES, *siblings], otherwise=remedy, cutoff=0.8)
    raise UserError(f"there is no file {source}{hint}")


def _below(folder: str, parts: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the parts of the paths of all files below a folder, without hidden and empty ones.

    A link to a folder is not followed. This takes a third of the time of `Path.rglob`.
    """
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _below(entry.path, (*parts, entry.name))
            elif _has_bytes(entry.path):
                yield (*parts, entry.name)


def _has_bytes(path: str) -> bool:
    """Return whether a path is a file that is not empty: a folder of code has many that are."""
    try:
        info = os.stat(path)  # noqa: PTH116 (a Path takes as long again)
    except OSError:  # a broken link
        return False
    return stat.S_ISREG(info.st_mode) and info.st_size > 0


def _file_number(file: Path) -> tuple[int, int]:
    info = file.stat()
    return info.st_dev, info.st_ino
