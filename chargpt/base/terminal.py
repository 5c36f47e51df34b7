"""Text of a model, a file or a prompt on its way to a terminal, which obeys what it is sent."""

from __future__ import annotations

import unicodedata
from typing import TextIO

_ESCAPED = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, formats, half pairs, odd line ends


def visible(text: str) -> str:
    r"""Return text that commands nothing: what a terminal would obey is shown as ``\x1b``.

    Line ends and tabs stay. Marks that turn the direction of the text or take no room are shown,
    too: they make one thing look like another.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if character not in "\n\t" and unicodedata.category(character) in _ESCAPED
        else character
        for character in text
    )


def for_stream(text: str, stream: TextIO) -> str:
    """Return text as a stream should get it: files and pipes get it as it is."""
    return visible(text) if stream.isatty() else text
