r"""Show a text coloured by how unexpected each character was, in a terminal or on a web page.

The surprise of a character is -log2 p, in bits: 1 bit is a coin flip, 6 bits one of 64 equally
likely choices. Control characters and other marks that a terminal or a browser would obey or hide
are shown as Python escapes, such as ``\x1b``.
"""

from __future__ import annotations

import html
import math
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
_TERMINAL = {
    level: f"\x1b[38;5;16;48;5;{background}m"
    for level, background in enumerate((230, 228, 220, 214, 208, 202, 196), start=1)
} | {_UNSCORED: "\x1b[4m"}


_NAMES = {"\n": "newline", "\t": "tab", " ": "space"}
_CHUNK = 4000  # characters that a browser lays out at a time, approximately


class _Surprise(NamedTuple):
    """A text with its scores."""

    text: str
    bits: npt.NDArray[np.float64]
    """(len(text),); NaN where a character has no score."""
    levels: npt.NDArray[np.int64]
    """(len(text),): 0 for calm, up to len(HEAT_BITS), or _UNSCORED."""
    mean: float
    """Mean bits of the characters that have a score."""
    visible: dict[str, str]
    """Each distinct character with its escaped form."""


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
    body = _coloured(surprise) if colour else _marked(surprise)
    if not body.endswith("\n"):
        body += "\n"
    mean = f"mean {surprise.mean:.2f} bits over {len(text):,} characters"
    if not colour:
        marks = "bits per character below each line: blank under 1, 9 for 9 or more, ? not scored"
        return f"{body}{marks}; {mean}"
    labels = [
        f"{_TERMINAL[level]} {label} {_RESET}" if level else label
        for level, label in enumerate(_LABELS)
    ]
    if (surprise.levels == _UNSCORED).any():
        labels.append(f"{_TERMINAL[_UNSCORED]}not scored{_RESET}")
    return f"{body}bits per character: {' '.join(labels)}; {mean}"


def _coloured(surprise: _Surprise) -> str:
    text, table = surprise.text, str.maketrans(surprise.visible)
    is_newline = np.fromiter((character == "\n" for character in text), bool, len(text))
    styles = np.where(is_newline, 0, surprise.levels)
    starts = [0, *(np.flatnonzero(np.diff(styles)) + 1).tolist(), len(text)]
    pieces = []
    for start, end in pairwise(starts):
        piece, style = text[start:end].translate(table), int(styles[start])
        pieces.append(f"{_TERMINAL[style]}{piece}{_RESET}" if style else piece)
    return "".join(pieces)


def _marked(surprise: _Surprise) -> str:
    """Return each line with a line of digits below; that of the newline stands at the end."""
    lines: list[str] = []
    start = 0
    for line in surprise.text.removesuffix("\n").split("\n"):
        written = [surprise.visible[character] for character in line]
        bits = surprise.bits[start : start + len(line) + 1].tolist()  # with those of the newline
        marks = [
            # A digit for a tab would shift the marks after it.
            "\t" if seen == "\t" else _mark(b).ljust(cell_len(seen))[: cell_len(seen)]
            for seen, b in zip(written, bits, strict=False)
        ]
        marks += map(_mark, bits[len(line) :])
        lines += ["".join(written), "".join(marks).rstrip()]
        start += len(line) + 1
    return "\n".join([*lines, ""])


def _mark(bits: float) -> str:
    if math.isnan(bits):
        return "?"
    return str(int(min(bits, 9))) if bits >= 1 else " "


# --- as a web page

_PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body {
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5;
  font-family: system-ui, sans-serif; background: #ffffff; color: #1a1a1a;
}
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
main, .legend { font-family: ui-monospace, Menlo, Consolas, monospace; }
main { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; tab-size: 8; }
main div { content-visibility: auto; contain-intrinsic-size: auto 100rem; }
span { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
.legend { display: flex; flex-wrap: wrap; }
.legend span { padding: 0.1rem 0.8rem; }
.legend .h0 { padding-left: 0; }
.n::before { content: "\\21B5"; }
.u { text-decoration: underline dotted; }
/* each darker than the one before; below, each brighter */
.h1 { background: #fff7cf; color: #1a1a1a; }
.h2 { background: #ffeda0; color: #1a1a1a; }
.h3 { background: #fed976; color: #1a1a1a; }
.h4 { background: #feb24c; color: #1a1a1a; }
.h5 { background: #fd8d3c; color: #1a1a1a; }
.h6 { background: #fc5a36; color: #000000; }
.h7 { background: #b8001f; color: #ffffff; }
@media (prefers-color-scheme: dark) {
body { background: #16181d; color: #dcdcdc; }
.h1 { background: #332b14; color: #f2f2f2; }
.h2 { background: #4d3c10; color: #f2f2f2; }
.h3 { background: #6b4a0a; color: #f7f7f7; }
.h4 { background: #8f4f00; color: #ffffff; }
.h5 { background: #b34700; color: #ffffff; }
.h6 { background: #d13a00; color: #ffffff; }
.h7 { background: #ff5545; color: #000000; }
}
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p>$count characters, $mean bits per character on average. Each character is coloured by its
surprise, &minus;log<sub>2</sub> of the probability p that the model gave it; point at one to
read it.</p>
<p>Bits per character, from expected to unexpected:</p>
<p class="legend">$legend</p>
</header>
<main lang="" dir="auto" translate="no">$body</main>
</body>
</html>
""")


def surprise_page(
    text: str, log_probabilities: npt.NDArray[Any], *, title: str = "Surprise"
) -> str:
    """Return a text as a self-contained HTML page, unexpected characters on a warm background.

    Each character of at least one bit is a span with its bits and probability as a tooltip; a run
    of characters below one bit shares a span. A page takes about 40 bytes per character. Write it
    as UTF-8.

    Args:
        text: at least one character.
        log_probabilities: ln p of each character, (len(text),); NaN: not scored.
        title: title of the page.

    Raises:
        UserError: no text, no scores, or not one score per character.
    """
    surprise = _examine(text, log_probabilities)
    legend = [f'<span class="h{level}">{label}</span>' for level, label in enumerate(_LABELS)]
    if (surprise.levels == _UNSCORED).any():
        legend.append('<span class="u">not scored</span>')
    title = "".join(" " if character in "\n\t" else visible(character) for character in title)
    return _PAGE.substitute(
        title=html.escape(title),
        count=f"{len(text):,}",
        mean=f"{surprise.mean:.2f}",
        legend="".join(legend),
        body=_spans(surprise),
    )


def _spans(surprise: _Surprise) -> str:
    text, bits, levels = surprise.text, surprise.bits, surprise.levels
    escaped = {c: html.escape(seen) for c, seen in surprise.visible.items()}
    names = {c: html.escape(_NAMES.get(c, seen)) for c, seen in surprise.visible.items()}
    table = str.maketrans(escaped)
    chunks = _chunk_starts(text)
    is_start = np.ones(len(text), dtype=bool)
    is_start[1:] = (levels[1:] != levels[:-1]) | (levels[1:] > 0)  # a coloured one is a span
    is_start[chunks] = True
    starts = [*np.flatnonzero(is_start).tolist(), len(text)]
    total = np.append(np.add.reduceat(np.nan_to_num(bits), starts[:-1]), 0.0).tolist()
    new_chunk, pieces = set(chunks[1:]), ["<div>"]
    for (start, end), sum_of_bits in zip(pairwise(starts), total, strict=False):
        if start in new_chunk:
            pieces.append("</div><div>")
        character, level = text[start], int(levels[start])
        if level == _UNSCORED:
            about = "not scored"
        elif end - start > 1:
            about = f"{end - start} characters: {sum_of_bits:.1f} bits"
        else:
            about = f"{names[character]}: {sum_of_bits:.1f} bits, p = {2.0**-sum_of_bits:.2g}"
        kind = f" class=h{level}" if level > 0 else " class=u" if level == _UNSCORED else ""
        if level > 0 and character == "\n":
            kind = f' class="h{level} n"'  # a sign that can show the colour
        written = text[start:end].translate(table)
        pieces.append(f'<span{kind} title="{about}">{written}</span>')
    return "".join([*pieces, "</div>"])


def _chunk_starts(text: str) -> list[int]:
    """Return where to cut a long text: after newlines, since a block ends the line anyway."""
    starts = [0]
    while (end := text.find("\n", starts[-1] + _CHUNK)) >= 0 and end + 1 < len(text):
        starts.append(end + 1)
    return starts


# --- for both


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
    return _Surprise(
        text=text,
        bits=bits,
        levels=np.where(scored, np.digitize(bits, HEAT_BITS), _UNSCORED),
        mean=float(bits[scored].mean()),
        visible={character: visible(character) for character in set(text)},
    )
