"""Pickles that make a folder when they are unpickled, each with other instructions."""

import struct
from collections.abc import Callable
from pathlib import Path

Attack = Callable[[Path], bytes]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def call(path: Path) -> bytes:
    """Leave the result of ``os.mkdir(path)`` on the stack."""
    return b"cos\nmkdir\n" + text(str(path)) + b"\x85R"


ATTACKS: dict[str, Attack] = {
    "GLOBAL and REDUCE": lambda p: b"\x80\x02" + call(p) + b".",
    "protocol 0": lambda p: b"cos\nmkdir\n(V" + str(p).encode("raw-unicode-escape") + b"\ntR.",
    "STACK_GLOBAL": lambda p: b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text(str(p)) + b"\x85R.",
    "INST": lambda p: b"(" + text(str(p)) + b"ios\nmkdir\n.",
    "OBJ": lambda p: b"(cos\nmkdir\n" + text(str(p)) + b"o.",
    "NEWOBJ": lambda p: b"\x80\x02cbuiltins\nset\n)\x81" + call(p) + b"\x86.",
    "NEWOBJ_EX": lambda p: b"\x80\x04cbuiltins\nset\n)}\x92" + call(p) + b"\x86.",
    "BUILD": lambda p: b"\x80\x02cargparse\nNamespace\n)\x81}" + text("a") + call(p) + b"sb.",
    "a value of a dictionary": lambda p: b"\x80\x02}" + text("itos") + call(p) + b"s.",
    "a key of a dictionary": lambda p: b"\x80\x02}(" + call(p) + b"K\x01u.",
    "from the memo": lambda p: (
        b"\x80\x02cos\nmkdir\nq\x00" + text(str(p)) + b"q\x010h\x00h\x01\x85R."
    ),
    "in a frame": lambda p: b"\x80\x04\x95" + struct.pack("<Q", len(call(p)) + 1) + call(p) + b".",
    "behind a vocabulary": lambda p: b"\x80\x02}" + call(p) + b"0.",
    "eval": lambda p: (
        b"cbuiltins\neval\n" + text(f"__import__('os').mkdir({str(p)!r})") + b"\x85R."
    ),
    "getattr": lambda p: (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n" + text("os") + b"\x85R"
        + text("mkdir") + b"tR" + text(str(p)) + b"\x85R."
    ),
}  # fmt: skip
