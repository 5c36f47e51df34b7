import bz2
import gzip
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from chargpt.base.errors import UserError
from chargpt.data.archives import decompress, is_compressed

zstd = pytest.importorskip("backports.zstd")
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}
TEXT = np.random.default_rng(0).integers(0, 60, 100_000).astype(np.uint8).tobytes()
formats = pytest.mark.parametrize("suffix", COMPRESS)


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@formats
@pytest.mark.parametrize("size", [7, 4096, 1 << 22])
def test_members_are_joined_wherever_the_chunks_are_cut(suffix: str, size: int) -> None:
    members = [TEXT, b"", TEXT[:1], TEXT[::-1]]
    data = b"".join(map(COMPRESS[suffix], members)) + bytes(8)
    read = list(decompress("a" + suffix, pieces(data, size), size=1000))
    assert b"".join(read) == b"".join(members)
    assert max(map(len, read)) <= 1000


@formats
def test_any_cut_off_file_is_refused(suffix: str) -> None:
    data = COMPRESS[suffix](TEXT)
    for length in [1, 5, len(data) // 2, len(data) - 1]:
        with pytest.raises(UserError, match=f"a{suffix}"):
            list(decompress("a" + suffix, [data[:length]]))


@formats
def test_what_follows_a_member_must_be_one(suffix: str) -> None:
    with pytest.raises(UserError, match=f"a{suffix}"):
        list(decompress("a" + suffix, [COMPRESS[suffix](TEXT) + b"no archive at all"]))


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])  # .zst has a checksum only if asked
def test_a_changed_byte_is_refused(suffix: str) -> None:
    data = bytearray(COMPRESS[suffix](TEXT))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(UserError, match=f"a{suffix}"):
        list(decompress("a" + suffix, [bytes(data)]))


@formats
def test_a_bomb_streams_in_bounded_memory(suffix: str) -> None:
    data = COMPRESS[suffix](bytes(64 << 20))
    tracemalloc.start()
    total = sum(map(len, decompress("a" + suffix, [data], size=1 << 20)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 64 << 20
    assert peak < 24 << 20


def test_names() -> None:
    assert is_compressed(str(Path("texts") / "A.TXT.GZ"))
    assert not is_compressed("gz") and not is_compressed("a.txt")
