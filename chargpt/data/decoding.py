"""From bytes to text, a chunk at a time, so that a file of any size takes little memory."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from itertools import chain

from chargpt.base.errors import UserError
from chargpt.config import OnError
from chargpt.data.formats import CHUNK, raw_chunks
from chargpt.data.texts import EMPTY, Source

_GUESSED, _LEAST_GUESSED = 1 << 16, 64  # bytes from which an encoding is guessed
_LEAST_WRONG = 5  # characters; fewer do not say that the text has another encoding
BINARY_CHECK = 8192  # bytes at the start of a file; text has no NUL among them
_EXAMPLE = ", e.g. --encoding latin-1 or cp1252"
_BYTE_ORDER_MARKS = (  # the 32-bit marks start with the 16-bit ones: longest first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(source: Source, encoding: str, on_error: OnError = "stop") -> str:
    """Return the whole text of a source; errors as `raw_chunks` and `decode_chunks`."""
    return "".join(text_chunks(source, encoding, on_error))


def text_chunks(
    source: Source, encoding: str, on_error: OnError = "stop", chunk: int = CHUNK
) -> Iterator[str]:
    """Yield the text of a source in pieces; errors as `raw_chunks` and `decode_chunks`."""
    return decode_chunks(source.name, raw_chunks(source, chunk), encoding, on_error)


def decode_chunks(
    name: str, chunks: Iterable[bytes], encoding: str, on_error: OnError = "stop"
) -> Iterator[str]:
    """Yield the text of bytes that may be cut anywhere; line ends stay unchanged.

    A byte-order mark decides the encoding. With `on_error` ``replace``, wrong bytes become U+FFFD
    and are counted in `Replaced`.

    Raises:
        UserError: it begins with the source's `name`, and names an unknown encoding, a binary file,
            or the offset and line of a wrong byte.
    """
    chunks = iter(chunks)
    data = b""
    for chunk in chunks:
        data += chunk
        if len(data) >= BINARY_CHECK:
            break
    has_nul = b"\0" in data[:BINARY_CHECK]
    codec = next((marked for mark, marked in _BYTE_ORDER_MARKS if data.startswith(mark)), encoding)
    decoder = _decoder(
        codec, "chargpt-replace" if on_error == "replace" and not has_nul else "strict"
    )
    n_bytes = n_lines = n_characters = 0
    for more in chain(chunks, [None]):  # what comes after the data; None: the end
        try:
            text = decoder.decode(data, final=more is None)
        except UnicodeError as error:
            if has_nul:
                raise UserError(f"{name} is a binary file: give plain text") from error
            wrong = _describe(error, data, n_bytes, n_lines)
            guess = _guess(error)
            raise UserError(
                f"{name}{wrong} is not {codec}{guess}: give --encoding{'' if guess else _EXAMPLE}, "
                "or --on-error skip-file or replace"
            ) from error
        if "\0" in text[: max(0, BINARY_CHECK - n_characters)]:
            raise UserError(
                f"{name} is a binary file, or not {codec}: give plain text, or --encoding"
            )
        n_bytes, n_lines = n_bytes + len(data), n_lines + data.count(b"\n")
        n_characters += len(text)
        if text:
            yield text
        data = more or b""
    if not n_characters:
        raise UserError(f"{name} {EMPTY}")


def _decoder(encoding: str, errors: str) -> codecs.IncrementalDecoder:
    try:
        b"\0".decode(encoding)  # finds no codec that is not for text
    except UnicodeError:
        pass
    except LookupError as error:
        raise UserError(
            f"unknown encoding {encoding!r}: give --encoding utf-8, latin-1, cp1252, utf-16, …"
        ) from error
    return codecs.getincrementaldecoder(encoding)(errors)


class Replaced:
    """How many wrong byte sequences became U+FFFD in this process."""

    count = 0


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    Replaced.count += 1
    return "\ufffd", error.end


codecs.register_error("chargpt-replace", _replace)


def _guess(error: UnicodeError) -> str:
    """Return a suggestion for the encoding; empty: nothing is likely enough.

    It is only a suggestion: short texts look like many encodings.
    """
    if not isinstance(error, UnicodeDecodeError):
        return ""
    from charset_normalizer import from_bytes  # here, for a quick `import chargpt`

    data = bytes(error.object)
    around = data[max(0, error.start - _GUESSED // 2) : error.start + _GUESSED // 2]
    if around.decode("utf-8", "replace").count("\ufffd") < _LEAST_WRONG:
        return ""  # a stray byte in a text of this encoding
    best = from_bytes(around).best()
    plausible = best is not None and best.chaos < 0.1 and len(around) >= _LEAST_GUESSED
    return f", perhaps {best.encoding}" if best is not None and plausible else ""


def _describe(error: UnicodeError, data: bytes, n_bytes: int, n_lines: int) -> str:
    """Return which byte is wrong in the `data` that came after so many bytes and lines."""
    if not isinstance(error, UnicodeDecodeError):  # from codecs such as punycode
        return f" ({error})"
    # The decoder looked at the end of the source so far: with what it kept, without the mark.
    offset = n_bytes + len(data) - len(error.object) + error.start
    line = n_lines + data.count(b"\n", 0, max(0, offset - n_bytes)) + 1
    return f": byte 0x{error.object[error.start]:02x} at offset {offset} (line {line})"
