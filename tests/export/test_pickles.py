"""Vocabularies are read as ``pickle`` reads them; a pickle that does anything else does nothing."""

import contextlib
import os
import pickle
import pickletools
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pickle_attacks import ATTACKS, Attack, text

from chargpt.export.pickles import MAX_BYTES, PickleError, read_pickle


def read(path: Path, data: bytes) -> Any:
    path.write_bytes(data)
    return read_pickle(path)


def vocabulary(characters: str) -> dict[str, Any]:
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps])  # type: ignore[attr-defined]
def test_reads_what_pickle_writes(tmp_path: Path, protocol: int, dumps: Any) -> None:
    rng = random.Random(0)
    many = "".join(map(chr, rng.sample(range(32, 0xD800), 16_000)))
    values = [vocabulary("ab\n\\'é€𝄞\0"), vocabulary(many), {}, -5, 2**31 - 1, "\n\\u0041"]
    for value in values:
        assert read(tmp_path / "meta.pkl", dumps(value, protocol)) == value


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_an_attack_does_nothing(tmp_path: Path, attack: Attack) -> None:
    pickle.loads(attack(tmp_path / "control"))
    assert (tmp_path / "control").exists()
    with pytest.raises(PickleError):
        read(tmp_path / "meta.pkl", attack(tmp_path / "it-ran"))
    assert not (tmp_path / "it-ran").exists()


def test_every_other_instruction_is_refused(tmp_path: Path) -> None:
    used = b"\x80\x95(}dsuIJKMVX\x8cpqr\x94ghj.".decode("latin-1")
    others = [opcode for opcode in pickletools.opcodes if opcode.code not in used]
    assert len(others) > 40
    for opcode in others:
        with pytest.raises(PickleError, match=rf"^{opcode.name} at byte 2 "):
            read(tmp_path / "meta.pkl", b"\x80\x04" + opcode.code.encode("latin-1") + 99 * b"1\n")


u4, u8 = struct.Struct("<I").pack, struct.Struct("<Q").pack
WRONG = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "no value": b"\x80\x02.",
    "two values": b"K\x01K\x02.",
    "only a mark": b"(.",
    "bytes after the end": b"}.}",
    "a second pickle": pickle.dumps({}) + pickle.dumps({}),
    "protocol 6": b"\x80\x06}.",
    "unknown instruction": b"\xff.",
    "text": b"vocab_size = 65\n",
    "memo: missing": b"h\x07.",
    "memo: missing, protocol 0": b"g7\n.",
    "memo: negative place": b"}p-1\ng-1\n.",
    "memo: nothing to store": b"q\x00.",
    "memo: a mark": b"(q\x00.",
    "memo: a dictionary in itself": b"}q\x00K\x01h\x00s.",
    "memo: a dictionary as key": b"}q\x00h\x00K\x01s.",
    "memo: a dictionary twice": b"}(K\x01}q\x00K\x02h\x00u.",
    "memo: itself, MEMOIZE": b"\x80\x04}\x94h\x00h\x00s.",
    "dict: as key": b"}}K\x01s.",
    "dict: odd number of values": b"}(K\x01u.",
    "dict: without mark": b"}K\x01K\x02u.",
    "dict: a mark as value": b"}K\x01(s.",
    "dict: something else": b"K\x00K\x01K\x02s.",
    "dict: nothing": b"K\x01K\x02s.",
    "int: 33 bits": b"I4294967296\n.",
    "int: a million digits": b"I" + 10**6 * b"9" + b"\n.",
    "int: text": b"Iabc\n.",
    "int: empty": b"I\n.",
    "int: a bool": b"I01\n.",
    "int: no line end": b"I123",
    "LONG4 of 2 GB": b"\x8b\xff\xff\xff\x7f\x00.",
    "LONG4 of negative length": b"\x8b\xff\xff\xff\xff\x00.",
    "LONG1": b"\x8a\x01\x05.",
    "text: 4 GB": b"X" + u4(2**32 - 1) + b"abc.",
    "text: BINUNICODE8 of 4 GB": b"\x8d" + u8(2**32) + b"abc.",
    "text: BINUNICODE8 of 2^63": b"\x8d" + u8(2**63) + b"abc.",
    "text: not UTF-8": b"X" + u4(2) + b"\xff\xfe.",
    "text: bad escape": b"V\\Uffffffff\n.",
    "text: cut": b"\x8c\x05abc",
    "frame: longer than the file": b"\x80\x04\x95" + u8(2**40) + b"}.",
    "frame: cut": b"\x80\x04\x95\x01",
    "persistent id": b"P42\n.",
    "persistent id on the stack": text("42") + b"Q.",
    "extension": b"\x82\x01.",
    "list": pickle.dumps([1]),
    "tuple": pickle.dumps((1,)),
    "bool": pickle.dumps({"vocab_size": True}),
    "float": pickle.dumps({"vocab_size": 6.5}),
    "None": pickle.dumps(None),
    "bytes": pickle.dumps(b"abc", protocol=4),
    "nested dictionaries": b"}" + 16 * b"K\x01}" + 16 * b"s" + b".",
    "a million open marks": 10**6 * b"(" + b".",
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_a_wrong_pickle_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(PickleError):
        read(tmp_path / "meta.pkl", data)


@pytest.mark.parametrize("data", [pickle.dumps(vocabulary("abc"), n) for n in range(6)])
def test_a_cut_or_changed_vocabulary_raises_nothing_else(tmp_path: Path, data: bytes) -> None:
    rng = random.Random(0)
    for end in range(len(data)):
        with pytest.raises(PickleError):
            read(tmp_path / "meta.pkl", data[:end])
    for _ in range(500):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] = rng.randrange(256)
        with contextlib.suppress(PickleError):
            read(tmp_path / "meta.pkl", bytes(changed))


LARGE = {
    "marks": b"(" * MAX_BYTES,
    "dictionaries": b"}" * MAX_BYTES,
    "numbers": b"K\x00" * (MAX_BYTES // 2),
    "memo": b"}" + b"\x94" * (MAX_BYTES - 1),
    "memo places": b"}" + b"".join(b"r" + u4(i << 10) for i in range(MAX_BYTES // 5 - 1)),
    "one key": b"}" + b"K\x00K\x00s" * (MAX_BYTES // 5 - 1),
    "lines": b"V\n0" * (MAX_BYTES // 3),
    "one line": b"V" + b"a" * (MAX_BYTES - 1),
    "digits": b"I" + b"1" * (MAX_BYTES - 1),
    "too large": b"}" * (4 * MAX_BYTES),
}
IN_LIMITS = """
import resource, sys
from pathlib import Path
from chargpt.export.pickles import PickleError, read_pickle
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for name in sys.argv[1:]:
    try:
        print(read_pickle(Path(name)))
    except PickleError as error:
        print("refused")
"""


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_large_pickles_take_neither_much_memory_nor_time(tmp_path: Path) -> None:
    for name, data in LARGE.items():
        (tmp_path / name).write_bytes(data)
    files = [str(tmp_path / name) for name in LARGE]
    done = subprocess.run(
        [sys.executable, "-c", IN_LIMITS, *files], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["refused"] * len(files)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PickleError, match="not a file"):
        read_pickle(tmp_path)
