"""Archives, tables, and files that are not text; each is compared with the text it was made of."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data.corpus import Corpus, load_corpus
from chargpt.data.encoding import Sizes

TEXT = "Straße, naïve, λόγος. " * 400
SMALL = Sizes(memory=1 << 20, unit=1 << 12, chunk=1 << 10)  # several units
STORED = SMALL._replace(memory=0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARGPT_CACHE_DIR", str(tmp_path / "cache"))


def load(source: Path, sizes: Sizes = SMALL, **changes: Any) -> tuple[Corpus, list[str]]:
    lines: list[str] = []
    corpus = load_corpus([str(source)], DataConfig(**changes), sizes=sizes, report=lines.append)
    return corpus, [line for line in lines if not line.startswith("tokens")]


def text_of(corpus: Corpus) -> str:
    return corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.validation]))


def zstd_bytes(data: bytes) -> bytes:
    zstd = pytest.importorskip("backports.zstd")
    compressed: bytes = zstd.compress(data)
    return compressed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd_bytes,
}


# --- archives


@pytest.mark.parametrize("suffix", PACKERS)
def test_an_archive_is_the_text_in_it(tmp_path: Path, suffix: str) -> None:
    plain, packed = tmp_path / "t.txt", tmp_path / f"t.txt.{suffix}"
    data = TEXT.encode()
    plain.write_bytes(data)
    # Two members, one after the other, are one text.
    packed.write_bytes(PACKERS[suffix](data[:5001]) + PACKERS[suffix](data[5001:]))
    expected = load(plain)[0]
    for sizes in (SMALL, STORED):
        corpus = load(packed, sizes)[0]
        assert text_of(corpus) == TEXT
        assert corpus.facts == expected.facts


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_damaged_archive_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t.{suffix}"
    whole = PACKERS[suffix](TEXT.encode())
    for data in (whole[: len(whole) // 2], b"no archive at all" * 10):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"t.{suffix} is damaged, or not .{suffix} "):
            load(path)


# --- tables


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(lines)


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl", "t.ndjson", "t.jsonl.gz"])
def test_each_row_of_a_column_is_a_document(tmp_path: Path, name: str) -> None:
    texts = [f"Zeile {i}: größer\nals {i}" for i in range(60)]
    rows: list[dict[str, Any]] = [{"id": i, "text": text} for i, text in enumerate(texts)]
    rows[10:10] = [{"id": 0, "text": None}, {"id": 0, "text": ""}]
    write_rows(tmp_path / name, rows)
    for sizes in (SMALL, STORED):
        corpus = load(tmp_path / name, sizes, text_column="text")[0]
        ids = np.concatenate([corpus.train, corpus.validation])
        documents = np.split(ids, np.flatnonzero(ids == corpus.tokenizer.end_of_text_id) + 1)
        assert [corpus.tokenizer.decode(d) for d in documents if len(d)] == texts
        assert corpus.facts.n_documents == 60


def test_half_a_character_in_a_row_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "\\ud800"}\n' * 30)
    with pytest.raises(UserError, match=r"t.jsonl, line 1: half a character"):
        load(tmp_path / "t.jsonl", text_column="text")


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl"])
def test_a_wrong_column_is_refused_with_the_ones_there_are(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, [{"id": 7, "text": "abc"}] * 30)
    with pytest.raises(UserError, match=r"no .*'txt': give --text-column one of its .*id, text"):
        load(tmp_path / name, text_column="txt")
    with pytest.raises(UserError, match=r"(row|line) 1: 'id' holds int, not text"):
        load(tmp_path / name, text_column="id")


def test_without_a_column_a_parquet_file_is_refused_and_json_lines_are_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.jsonl", [{"text": "abc"}] * 30)
    assert text_of(load(tmp_path / "t.jsonl")[0]).startswith('{"text": "abc"}')
    (tmp_path / "t.parquet").write_bytes(b"PAR1 but not whole" * 100)
    with pytest.raises(UserError, match=r"t.parquet is a table: give --text-column"):
        load(tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet is not a whole table"):
        load(tmp_path / "t.parquet", text_column="text")
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n{"text": \n')
    with pytest.raises(UserError, match=r"t.jsonl, line 2: not JSON"):
        load(tmp_path / "t.jsonl", text_column="text")


# --- files that are not text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five files, of which one has a latin-1 byte near its end, and one is binary."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a", "c", "e"):
        (texts / f"{name}.txt").write_text(f"{name}: {TEXT}", encoding="utf-8")
    (texts / "b.txt").write_bytes(TEXT.encode() + b"caf\xe9 au lait")
    (texts / "d.bin").write_bytes(b"\0\1\2\xff" * 1000)
    return texts


@pytest.mark.parametrize("sizes", [SMALL, STORED, SMALL._replace(unit=1 << 20)])
def test_files_that_are_not_text_are_left_out_when_asked_for(folder: Path, sizes: Sizes) -> None:
    kept = folder.parent / "kept"
    kept.mkdir()
    for name in ("a.txt", "c.txt", "e.txt"):
        (kept / name).write_bytes((folder / name).read_bytes())
    expected = load(kept)[0]
    for _ in range(2):  # made, and found in the cache
        corpus, lines = load(folder, sizes, on_error="skip-file")
        assert corpus.facts == expected.facts
        assert text_of(corpus) == text_of(expected)
        assert [line.split()[:2] for line in lines] == [["left", "out"]] * 2
        assert "b.txt: byte 0xe9 at offset" in lines[0] + lines[1]
    (folder / "d.bin").unlink()
    with pytest.raises(UserError, match=r"b.txt: byte 0xe9 at offset \d+ \(line 1\) is not utf-8"):
        load(folder, sizes)


@pytest.mark.parametrize("sizes", [SMALL, STORED])
def test_wrong_bytes_are_replaced_and_counted_when_asked_for(folder: Path, sizes: Sizes) -> None:
    (folder / "d.bin").unlink()
    corpus, lines = load(folder, sizes, on_error="replace")
    expected = (TEXT.encode() + b"caf\xe9 au lait").decode(errors="replace")
    assert expected in text_of(corpus)
    assert lines == ["replaced   1 wrong byte sequences by U+FFFD"]


def test_the_error_suggests_an_encoding_for_a_longer_text_only(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(
        ("Ночь, улица, фонарь, аптека, бессмысленный и тусклый свет. " * 20).encode("cp1251")
    )
    with pytest.raises(UserError, match=r"is not utf-8, perhaps cp1251: give --encoding, or --on"):
        load(path)
    for short in (b"caf\xe9", TEXT.encode() + b"caf\xe9" + TEXT.encode()):
        path.write_bytes(short)
        with pytest.raises(UserError, match=r"is not utf-8: give --encoding, e.g."):
            load(path)


def test_empty_files_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "__init__.py").touch()
    (tmp_path / "texts" / "t.py").write_text(TEXT, encoding="utf-8")
    for source in (tmp_path / "texts", tmp_path / "texts" / "*.py"):
        assert text_of(load(source)[0]) == TEXT
    (tmp_path / "texts" / "t.py").unlink()
    with pytest.raises(UserError, match="is a folder without texts"):
        load(tmp_path / "texts")


# --- rare characters


@pytest.mark.parametrize("sizes", [SMALL, STORED])
def test_rare_characters_become_one_and_are_named(tmp_path: Path, sizes: Sizes) -> None:
    path = tmp_path / "t.txt"
    text = TEXT + "漢字漢" + TEXT + "é"
    path.write_text(text, encoding="utf-8")
    corpus, lines = load(path, sizes, min_count=3)
    rare = {c for c in set(text) if text.count(c) < 3}
    assert text_of(corpus) == "".join("\ufffd" if c in rare else c for c in text)
    assert set(corpus.tokenizer.characters) == set(text) - rare | {"\ufffd"}
    assert lines == [
        "rare       3 characters with fewer than 3 occurrences, 4 in all, became U+FFFD: "
        "'é', '字', '漢'"
    ]
    assert load(path, sizes, min_count=1)[1] == []
