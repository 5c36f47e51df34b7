"""Escape control characters before printing a model's text, a file or a prompt to a terminal."""

from __future__ import annotations

import unicodedata
from typing import TextIO

_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, lone surrogates, odd line ends


def visible(text: str) -> str:
    r"""Return text with control characters escaped: ESC becomes ``\x1b``.

    Line ends and tabs stay. Invisible characters and changes of direction are escaped, too, because
    they can make one text look like another.
    """
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t" and unicodedata.category(character) in _ESCAPED
        else character
        for character in text
    )


def for_stream(text: str, stream: TextIO) -> str:
    """Return text as it should be written to a stream: escaped for a terminal, else unchanged."""
    return visible(text) if stream.isatty() else text
