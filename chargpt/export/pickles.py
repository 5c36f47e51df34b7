r"""Read a pickle of nothing but dictionaries, texts and whole numbers, without ``pickle``.

A pickle is a program for a machine with a stack and a memo (``pickletools`` in the standard library
describes it). This machine has only the instructions that such data needs, in protocols 0 to 5.
None of them names or calls anything. Every other instruction is refused before it is read further.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

MAX_BYTES = 2**24
MAX_INSTRUCTIONS = 2**20  # a vocabulary needs about five per character
MAX_STACK, MAX_DICTS = 2**12, 16  # Python writes 1,000 entries at a time
MAX_INT = 2**31  # larger ones could be chosen so that a dictionary becomes slow
_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


class PickleError(ValueError):
    """A pickle that is damaged, too large, or holds anything else."""


def read_pickle(path: Path) -> Any:
    """Return the value of a pickle file: a dict, str or int.

    A dictionary may hold others, but appears only once.

    Raises:
        PickleError: the file is damaged, too large, or holds anything else; nothing in it was run.
        OSError: the file cannot be read.
    """
    if not path.is_file():  # a pipe might never end
        raise PickleError("it is not a file")
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise PickleError(f"it has more than {MAX_BYTES:,} bytes")
    return _Machine(data).run()


class _Machine:
    def __init__(self, data: bytes) -> None:
        self.file, self.size = BytesIO(data), len(data)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.n_dicts = 0

    def run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            code = self.take(1)
            if code == b".":
                return self.result()
            if code not in _INSTRUCTIONS:
                name = _NAMES.get(code.decode("latin-1"), f"{code[0]:#04x}")
                at = self.file.tell() - 1
                raise PickleError(f"{name} at byte {at} does more than make a dictionary")
            _INSTRUCTIONS[code](self)
            if len(self.stack) > MAX_STACK:
                raise PickleError("it is nested too deeply")
        raise PickleError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")

    def result(self) -> Any:
        if self.file.tell() != self.size:
            raise PickleError(f"it has bytes after its end, at byte {self.file.tell()}")
        if len(self.stack) != 1 or self.stack[0] is _MARK:
            raise PickleError("it does not end with one value")
        return self.stack[0]

    # --- reading the bytes of an instruction

    def take(self, n: int) -> bytes:
        data = self.file.read(n)
        if len(data) != n:
            raise PickleError(f"it ends too early, at byte {self.size}")
        return data

    def number(self, n_bytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self.take(n_bytes), "little", signed=signed)

    def line(self) -> bytes:
        line = self.file.readline()
        if not line.endswith(b"\n"):
            raise PickleError(f"it ends too early, at byte {self.size}")
        return line[:-1]

    def decimal(self) -> int:
        line = self.line()
        if len(line) > 11 or not line.lstrip(b"-").isdigit() or line in (b"00", b"01"):
            raise PickleError(f"{line[:20]!r} is not a whole number of 32 bits")  # 00, 01: a bool
        return int(line)

    # --- instructions

    def check_protocol(self) -> None:
        if (version := self.number(1)) > 5:
            raise PickleError(f"it has protocol {version}")

    def check_frame(self) -> None:
        if self.number(8) > self.size - self.file.tell():
            raise PickleError("it ends too early, within a frame")

    def push(self, value: Any) -> None:
        if type(value) is int and not -MAX_INT <= value < MAX_INT:
            raise PickleError(f"{value} is not a whole number of 32 bits")
        self.stack.append(value)

    def push_text(self, data: bytes, encoding: str = "utf-8") -> None:
        try:
            self.push(data.decode(encoding))
        except UnicodeDecodeError as error:
            raise PickleError(f"a text is not {encoding}") from error

    def push_dict(self) -> None:
        self.n_dicts += 1
        if self.n_dicts > MAX_DICTS:
            raise PickleError(f"it has more than {MAX_DICTS} dictionaries")
        self.push({})

    def dict_of_entries(self) -> None:
        entries = self.pop_entries()
        self.push_dict()
        self.add(entries)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("it takes a value that is not there")
        return self.stack.pop()

    def pop_entries(self) -> list[Any]:
        """Remove and return the values above the last mark, and remove the mark."""
        entries = []
        while self.stack and self.stack[-1] is not _MARK:
            entries.append(self.stack.pop())
        if not self.stack:
            raise PickleError("it goes back to a mark that is not there")
        self.stack.pop()
        return entries[::-1]

    def add(self, entries: list[Any]) -> None:
        """Add keys and values, in turn, to the dictionary on top of the stack."""
        target = self.stack[-1] if self.stack else None
        if type(target) is not dict or len(entries) % 2:
            raise PickleError("it adds entries to something else than a dictionary")
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            if type(key) is dict:
                raise PickleError("a key is a dictionary")
            target[key] = value

    def add_one(self) -> None:
        value, key = self.pop(), self.pop()
        self.add([key, value])

    def remember(self, place: int) -> None:
        value = self.pop()
        self.push(value)
        self.memo[place] = value

    def recall(self, place: int) -> None:
        value = self.memo.get(place)
        if type(value) not in (str, int):  # a dictionary could come to hold itself
            what = "a dictionary twice" if place in self.memo else "a value that it never stored"
            raise PickleError(f"it uses {what}")
        self.push(value)


_MARK = object()
_INSTRUCTIONS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.check_protocol,  # PROTO
    b"\x95": _Machine.check_frame,  # FRAME
    b"(": lambda m: m.push(_MARK),  # MARK
    b"}": _Machine.push_dict,  # EMPTY_DICT
    b"d": _Machine.dict_of_entries,  # DICT
    b"s": _Machine.add_one,  # SETITEM
    b"u": lambda m: m.add(m.pop_entries()),  # SETITEMS
    b"I": lambda m: m.push(m.decimal()),  # INT
    b"J": lambda m: m.push(m.number(4, signed=True)),  # BININT
    b"K": lambda m: m.push(m.number(1)),  # BININT1
    b"M": lambda m: m.push(m.number(2)),  # BININT2
    b"V": lambda m: m.push_text(m.line(), "raw-unicode-escape"),  # UNICODE
    b"X": lambda m: m.push_text(m.take(m.number(4))),  # BINUNICODE
    b"\x8c": lambda m: m.push_text(m.take(m.number(1))),  # SHORT_BINUNICODE
    b"p": lambda m: m.remember(m.decimal()),  # PUT
    b"q": lambda m: m.remember(m.number(1)),  # BINPUT
    b"r": lambda m: m.remember(m.number(4)),  # LONG_BINPUT
    b"\x94": lambda m: m.remember(len(m.memo)),  # MEMOIZE
    b"g": lambda m: m.recall(m.decimal()),  # GET
    b"h": lambda m: m.recall(m.number(1)),  # BINGET
    b"j": lambda m: m.recall(m.number(4)),  # LONG_BINGET
}
