r"""Show a text coloured by how unexpected each character was, in a terminal or on a web page.

The surprise of a character is -log2 p, in bits: 1 bit is a coin flip, 6 bits one of 64 equally
likely choices. Control characters and other marks that a terminal or a browser would obey or hide
are shown as Python escapes, such as ``\x1b``.
"""

from __future__ import annotations

import html
import math
from importlib.resources import files
from itertools import pairwise
from string import Template
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len

from chargpt.base.errors import UserError
from chargpt.base.terminal import visible

HEAT_BITS = (1, 2, 3, 4, 6, 8, 10)
"""Least bits of each colour; characters with fewer than the first have no colour."""
_LABELS = ("under 1", "1", "2", "3", "4", "6", "8", "10 or more")
_UNSCORED = -1  # in place of a level: the character has no score

_RESET = "\x1b[0m"
# Black on backgrounds that no theme of a terminal changes, so that dark and light ones show them.
# They get darker with the bits, for people who cannot tell the hues apart.
_BACKGROUNDS = enumerate((230, 228, 220, 214, 208, 202, 196), start=1)
_STYLES = {level: f"\x1b[38;5;16;48;5;{code}m" for level, code in _BACKGROUNDS}
_STYLES[_UNSCORED] = "\x1b[4m"

_NAMES = {"\n": "newline", "\t": "tab", " ": "space"}
_CHUNK = 4000  # characters that a browser lays out at a time, approximately


class _Surprise(NamedTuple):
    text: str
    bits: npt.NDArray[np.float64]  # (len(text),); NaN where a character has no score
    levels: npt.NDArray[np.int64]  # (len(text),): 0 for calm, to len(HEAT_BITS), or _UNSCORED
    mean: float  # bits of the characters that have a score
    visible: dict[str, str]  # each distinct character with its escaped form


def _examine(text: str, log_probabilities: npt.NDArray[Any]) -> _Surprise:
    scores = np.asarray(log_probabilities, dtype=np.float64)
    if not text:
        raise UserError("the text to colour is empty: give at least one character")
    if scores.shape != (len(text),):
        raise UserError(
            f"{len(text)} characters have scores of shape {scores.shape}: give one per character"
        )
    bits = np.maximum(-scores / math.log(2), 0.0)  # rounding can make ln p positive
    scored = ~np.isnan(bits)
    if not scored.any():
        raise UserError("no character of the text has a score: give a text that the model knows")
    levels = np.where(scored, np.digitize(bits, HEAT_BITS), _UNSCORED)
    escaped = {character: visible(character) for character in set(text)}
    return _Surprise(text, bits, levels, float(bits[scored].mean()), escaped)


# --- for a terminal


def surprise_ansi(text: str, log_probabilities: npt.NDArray[Any], *, colour: bool = True) -> str:
    """Return a text for a terminal, with unexpected characters on a warm background and a legend.

    Line ends and tabs are kept; a line end shows no colour.

    Args:
        text: at least one character.
        log_probabilities: ln p of each character, (len(text),), as `chargpt.engine.scoring.score`
            returns them; NaN: not scored.
        colour: use 256 colours; False: print a line of digits below each line, whole bits up to 9.

    Raises:
        UserError: no text, no scores, or not one score per character.
    """
    surprise = _examine(text, log_probabilities)
    mean = f"mean {surprise.mean:.2f} bits over {len(text):,} characters"
    if not colour:
        marks = "bits per character below each line: blank under 1, 9 for 9 or more, ? not scored"
        return f"{_marked(surprise)}{marks}; {mean}"
    labels = [_LABELS[0]]
    labels += [_styled(level, f" {label} ") for level, label in enumerate(_LABELS[1:], start=1)]
    if (surprise.levels == _UNSCORED).any():
        labels.append(_styled(_UNSCORED, "not scored"))
    end = "" if text.endswith("\n") else "\n"
    return f"{_coloured(surprise)}{end}bits per character: {' '.join(labels)}; {mean}"


def _coloured(surprise: _Surprise) -> str:
    text, table = surprise.text, str.maketrans(surprise.visible)
    levels = np.where([character == "\n" for character in text], 0, surprise.levels)
    starts = [0, *(np.flatnonzero(np.diff(levels)) + 1).tolist(), len(text)]
    return "".join(
        _styled(int(levels[start]), text[start:end].translate(table))
        for start, end in pairwise(starts)
    )


def _styled(level: int, text: str) -> str:
    return f"{_STYLES[level]}{text}{_RESET}" if level else text


def _marked(surprise: _Surprise) -> str:
    """Return each line with a line of digits below; that of the newline stands at the end."""
    lines: list[str] = []
    start = 0
    for line in surprise.text.removesuffix("\n").split("\n"):
        written = [surprise.visible[character] for character in line]
        marks = list(map(_mark, surprise.bits[start : start + len(line) + 1].tolist()))
        for i, seen in enumerate(written):
            # A digit for a tab would shift the marks after it.
            marks[i] = "\t" if seen == "\t" else marks[i].ljust(cell_len(seen))[: cell_len(seen)]
        lines += ["".join(written), "".join(marks).rstrip()]
        start += len(line) + 1
    return "\n".join([*lines, ""])


def _mark(bits: float) -> str:
    if math.isnan(bits):
        return "?"
    return str(int(min(bits, 9))) if bits >= 1 else " "


# --- as a web page


def surprise_page(
    text: str, log_probabilities: npt.NDArray[Any], *, title: str = "Surprise"
) -> str:
    """Return a text as a self-contained HTML page, unexpected characters on a warm background.

    Each character of at least one bit is a span with its bits and probability as a tooltip; a run
    of characters below one bit shares a span. A page takes about 40 bytes per character. Write it
    as UTF-8. Arguments and errors are those of `surprise_ansi`.
    """
    surprise = _examine(text, log_probabilities)
    legend = [f'<span class="h{level}">{label}</span>' for level, label in enumerate(_LABELS)]
    if (surprise.levels == _UNSCORED).any():
        legend.append('<span class="u">not scored</span>')
    title = "".join(" " if character in "\n\t" else visible(character) for character in title)
    page = files("chargpt.measure").joinpath("surprise.html").read_text("utf-8")
    return Template(page).substitute(
        title=html.escape(title),
        count=f"{len(text):,}",
        mean=f"{surprise.mean:.2f}",
        legend="".join(legend),
        body=_spans(surprise),
    )


def _spans(surprise: _Surprise) -> str:
    text, levels = surprise.text, surprise.levels
    table = str.maketrans({c: html.escape(seen) for c, seen in surprise.visible.items()})
    chunks = set(_chunk_starts(text))
    is_start = np.ones(len(text), dtype=bool)
    is_start[1:] = (levels[1:] != levels[:-1]) | (levels[1:] > 0)  # a coloured one is a span
    is_start[list(chunks)] = True
    starts = np.flatnonzero(is_start)
    sums = np.add.reduceat(np.nan_to_num(surprise.bits), starts).tolist()
    pieces = []
    for (start, end), bits in zip(pairwise([*starts.tolist(), len(text)]), sums, strict=True):
        if start in chunks:
            pieces.append("</div><div>" if start else "<div>")
        level, written = int(levels[start]), text[start:end].translate(table)
        kind = f" class=h{level}" if level > 0 else ""
        if level == _UNSCORED:
            kind, about = " class=u", "not scored"
        elif end - start > 1:
            about = f"{end - start} characters: {bits:.1f} bits"
        else:
            name = _NAMES.get(written, written)
            about = f"{name}: {bits:.1f} bits, p = {2.0**-bits:.2g}"
        if level > 0 and written == "\n":
            kind = f' class="h{level} n"'  # a sign that can show the colour
        pieces.append(f'<span{kind} title="{about}">{written}</span>')
    return "".join([*pieces, "</div>"])


def _chunk_starts(text: str) -> list[int]:
    """Return where to cut a long text: after newlines, since a block ends the line anyway."""
    starts = [0]
    while (end := text.find("\n", starts[-1] + _CHUNK)) >= 0 and end + 1 < len(text):
        starts.append(end + 1)
    return starts
