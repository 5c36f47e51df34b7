"""Reading, cutting, splitting, and the windows: each with the message of each mistake."""

import codecs
import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data import datasets
from chargpt.data.corpus import Corpus, load_corpus, split_documents, split_point
from chargpt.data.texts import RawText, decode, read_sources
from chargpt.data.windows import Windows, blocks

TEXT = "".join(f"line {i}, à la carte\n" for i in range(20))
repeatable = settings(derandomize=True, deadline=None, max_examples=150)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with texts at two levels and hidden ones among them."""
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.md", ".hidden", ".git/e.txt"):
        file = tmp_path / "texts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<{name}>")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text_of(corpus: Corpus) -> str:
    return corpus.tokenizer.decode(np.concatenate([corpus.train, corpus.validation]))


# --- sources


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["texts/b.txt"], ["b.txt"]),
        (["texts/b.txt", "texts/a.txt"], ["b.txt", "a.txt"]),
        (["texts"], ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.md"]),
        (["texts/*.txt"], ["a.txt", "b.txt"]),
        (["texts/[b-z].t?t"], ["b.txt"]),
        (["texts/**/*.txt"], ["a.txt", "b.txt", "sub/c.txt"]),
        (["texts/**"], ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.md"]),
        (["texts/.hidden"], [".hidden"]),  # asked for by name
        (["texts/sub", "texts/a.txt"], ["sub/c.txt", "sub/deep/d.md", "a.txt"]),
    ],
)
def test_files_folders_and_patterns(folder: Path, sources: list[str], names: list[str]) -> None:
    raw = read_sources(sources)
    assert [text.data.decode() for text in raw] == [f"<{name}>" for name in names]
    assert [Path(text.name) for text in raw] == [Path("texts") / name for name in names]
    absolute = read_sources([str(folder / source) for source in sources])
    assert [text.data for text in absolute] == [text.data for text in raw]


def test_a_file_named_like_a_pattern(folder: Path) -> None:
    (folder / "odd[1]*.txt").write_text("odd")
    assert [text.data for text in read_sources(["odd[1]*.txt"])] == [b"odd"]


def test_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert len(read_sources(["~/texts/*.txt"])) == 2


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    corpus = load_corpus(["-"])
    assert text_of(corpus) == TEXT
    assert corpus.sources == ("-",)


def test_a_data_set_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = TEXT.encode()
    tiny = datasets.Dataset(
        name="tiny",
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        path="tiny/input.txt",
        url="http://127.0.0.1:1/closed",
    )
    monkeypatch.setitem(datasets.DATASETS, "tiny", tiny)
    monkeypatch.setattr(datasets, "NAMES", ("tiny",))
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(folder))
    (folder / "tiny").mkdir()
    (folder / "tiny" / "input.txt").write_bytes(data)
    assert read_sources(["tiny"]) == [RawText("tiny", data)]
    assert text_of(load_corpus(["tiny"])) == TEXT


GIVE = (
    r"give a text file, a folder, a pattern, - for standard input, "
    r"or a data set \(tiny-shakespeare\)$"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("texts/c.txt", r"texts/c\.txt: no such file; did you mean texts/[ab]\.txt\?$"),
        ("tiny-shakespear", r"tiny-shakespear: no such file; did you mean tiny-shakespeare\?$"),
        ("zzzzzz", r"zzzzzz: no such file; " + GIVE),
        ("no/where/x", r"no/where/x: no such file; " + GIVE),
        ("texts/*.csv", r"texts/\*\.csv: no file matches this pattern; check it with ls$"),
        ("empty", "empty is a folder without files: put some text files there$"),
        ("hollow.txt", "hollow.txt is empty: give a text with at least some thousand characters$"),
        ("mark.txt", "mark.txt is empty: give a text with at least some thousand characters$"),
    ],
)
def test_sources_that_give_nothing(folder: Path, source: str, message: str) -> None:
    (folder / "empty" / ".git").mkdir(parents=True)
    (folder / "empty" / ".git" / "config").write_text("hidden")
    (folder / "hollow.txt").touch()
    (folder / "mark.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(UserError, match="^" + message):
        load_corpus([source])


def test_no_source_at_all() -> None:
    message = r"^no text: give a file, or a data set \(tiny-shakespeare\)$"
    with pytest.raises(UserError, match=message):
        load_corpus([])


def test_an_unreadable_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    message = r"^texts.a.txt cannot be read \(Permission denied\): give a readable file$"
    with pytest.raises(UserError, match=message):
        load_corpus(["texts/a.txt"])


def test_a_file_that_a_pattern_matches_twice(folder: Path) -> None:
    assert len(read_sources(["texts/**/**/d.md"])) == 1


def test_a_text_given_for_a_file(folder: Path) -> None:
    with pytest.raises(UserError):
        load_corpus(["To be, or not to be, that is the question: " * 10])


# --- decoding


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF8 + TEXT.encode(), "utf-8"),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), "utf-8"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "utf-8"),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), "utf-8"),
        (codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"), "utf-8"),
        (TEXT.encode("latin-1"), "latin-1"),
        (TEXT.encode("cp1252"), "cp1252"),
        (TEXT.encode("utf-16-le"), "utf-16-le"),
    ],
)
def test_encodings_and_their_marks(tmp_path: Path, data: bytes, encoding: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(data)
    corpus = load_corpus([str(file)], DataConfig(encoding=encoding))
    assert text_of(corpus) == TEXT
    assert corpus.sha256 == hashlib.sha256(data).hexdigest()


def test_line_ends_stay(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"one\r\ntwo\rthree\nfour\r\n" * 10)
    assert text_of(load_corpus([str(tmp_path / "text")])) == "one\r\ntwo\rthree\nfour\r\n" * 10


NOT_OF = "give --encoding, e.g. --encoding latin-1 or cp1252"


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (b"ab\ncaf\xe9", "utf-8", f"t: byte 0xe9 at offset 6 (line 2) is not utf-8: {NOT_OF}"),
        (b"\x81", "cp1252", f"t: byte 0x81 at offset 0 (line 1) is not cp1252: {NOT_OF}"),
        (b"a\xe2\x82", "utf-8", f"t: byte 0xe2 at offset 1 (line 1) is not utf-8: {NOT_OF}"),
        (b"\x89PNG\0\0", "utf-8", "t is a binary file: give plain text"),
        (b"ab\0cd", "utf-8", "t is a binary file, or not utf-8: give plain text, or --encoding"),
        (
            b"abc",
            "utf-9",
            "unknown encoding 'utf-9': give --encoding utf-8, latin-1, cp1252, utf-16, …",
        ),
        (
            b"abc",
            "base64",
            "unknown encoding 'base64': give --encoding utf-8, latin-1, cp1252, utf-16, …",
        ),
        (
            codecs.BOM_UTF8 + b"a\n\xff",
            "utf-8",
            f"t: byte 0xff at offset 5 (line 2) is not utf-8-sig: {NOT_OF}",
        ),
    ],
)
def test_bytes_that_are_no_text(data: bytes, encoding: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        decode(RawText("t", data), encoding)
    assert str(caught.value) == message


# --- documents and the split


def test_one_text_is_split_like_nanogpt(tmp_path: Path) -> None:
    for n in (20, 21, 99, 1000, 12_345):
        text = (TEXT * 50)[:n]
        (tmp_path / "text").write_text(text)
        corpus = load_corpus([str(tmp_path / "text")])
        assert corpus.tokenizer.end_of_text_id is None
        assert corpus.tokenizer.decode(corpus.train) == text[: int(0.9 * n)]
        assert corpus.tokenizer.decode(corpus.validation) == text[int(0.9 * n) :]
        assert (corpus.n_characters, corpus.n_documents) == (n, 1)
        assert corpus.train.dtype == np.uint8


def test_documents_each_end_and_stay_whole(tmp_path: Path) -> None:
    names = [f"name{i:03}" for i in range(40)]
    (tmp_path / "names").write_text("\n" + "\n".join(names) + "\n\n")
    config = DataConfig(document_separator="\n", validation_fraction=0.25)
    corpus = load_corpus([str(tmp_path / "names")], config)
    end = corpus.tokenizer.end_of_text_id
    assert end == len(corpus.tokenizer.characters) == corpus.tokenizer.vocab_size - 1
    for part, expected in ((corpus.train, names[:30]), (corpus.validation, names[30:])):
        assert [
            corpus.tokenizer.decode(part[i : i + 7]) for i in range(0, len(part), 8)
        ] == expected
        assert np.flatnonzero(part == end).tolist() == list(range(7, len(part), 8))
    assert (corpus.n_characters, corpus.n_documents) == (280, 40)
    assert corpus.summary() == (
        "280 characters in 40 documents, 14 distinct; 240 to train on, 80 to validate"
    )


def test_files_are_documents_and_a_single_one_has_no_end(folder: Path) -> None:
    corpus = load_corpus(["texts/a.txt", "texts/b.txt"], DataConfig(validation_fraction=0.5))
    ids = np.concatenate([corpus.train, corpus.validation])
    assert np.flatnonzero(ids == corpus.tokenizer.end_of_text_id).tolist() == [7, 15]
    assert corpus.sha256 == hashlib.sha256(b"<a.txt><b.txt>").hexdigest()
    lone = load_corpus(["texts/a.txt"], DataConfig(document_separator="@", validation_fraction=0.4))
    assert lone.tokenizer.end_of_text_id is None
    assert lone.summary() == "7 characters, 6 distinct; 4 to train on, 3 to validate"


def test_nothing_but_separators(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n\n\n")
    with pytest.raises(UserError, match=r"text holds only document separators: give some text$"):
        load_corpus([str(tmp_path / "text")], DataConfig(document_separator="\n"))


@pytest.mark.parametrize(
    ("text", "separator", "documents"),
    [
        ("a\nb", "", ["a\nb"]),
        ("a\nb\n\nc\n", "\n", ["a", "b", "c"]),
        ("a\nb\n\nc\n", "\n\n", ["a\nb", "c\n"]),
        ("abc", "x", ["abc"]),
    ],
)
def test_split_documents(text: str, separator: str, documents: list[str]) -> None:
    assert split_documents(text, separator) == documents


@pytest.mark.parametrize(
    ("lengths", "fraction", "cut"),
    [
        ([100], 0.1, 90),
        ([9] * 10, 0.1, 90),  # with end-of-text, 10 tokens each: at a boundary
        ([9] * 10, 0.12, 90),  # the nearest boundary
        ([9] * 10, 0.16, 80),
        ([79, 19], 0.1, 80),  # twice what was asked for will do
        ([78, 20], 0.1, 90),  # more will not: cut within a document
        ([94, 4], 0.1, 95),  # half of it will do
        ([95, 3], 0.1, 90),  # less will not
        ([49, 49], 0.1, 90),
    ],
)
def test_split_point(lengths: list[int], fraction: float, cut: int) -> None:
    assert split_point(lengths, len(lengths) > 1, fraction) == cut


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.1), (10, 0.1), (3, 0.5), (10, 0.9)])
def test_too_short_to_split(n: int, fraction: float) -> None:
    with pytest.raises(UserError) as caught:
        split_point([n], False, fraction)
    assert str(caught.value) == (
        f"the text has {n} tokens, too few to hold out {fraction:.0%} of them: give more text"
    )
    with pytest.raises(UserError, match="too few to hold out"):
        split_point([1], False, 0.5)


# --- windows


def numbered(n: int) -> np.ndarray[Any, Any]:
    """A text in which every token says where it stands."""
    return np.arange(n, dtype=np.uint32)


SIZES = st.integers(1, 9).flatmap(
    lambda size: st.tuples(st.just(size), st.integers(size + 1, 12 * size))
)


@repeatable
@given(SIZES, st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_an_epoch_visits_the_text_once(sizes: tuple[int, int], seed: int, epoch: int) -> None:
    T, n = sizes
    windows = Windows(numbered(n), T, seed)
    inputs, targets = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
    assert inputs.shape == targets.shape == (windows.per_epoch, T)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # shifted exactly once
    visited = sorted(inputs.flatten().tolist())
    assert len(set(visited)) == len(visited)  # each at most once,
    assert visited == list(range(visited[0], visited[0] + len(visited)))  # without a gap,
    assert n - 1 - len(visited) < max(2 * T - 1, 1)  # and but for the ends, all


@repeatable
@given(SIZES, st.integers(0, 100), st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_a_batch_is_a_function_of_seed_and_number(
    sizes: tuple[int, int], seed: int, numbers: list[int]
) -> None:
    T, n = sizes
    one, other = Windows(numbered(n), T, seed), Windows(numbered(n), T, seed)
    whole = one.batch(0, 49)
    for number in numbers:  # in any order, of any size
        inputs, targets = other.batch(number, 8)
        assert torch.equal(inputs, whole.inputs[number : number + 8])
        halves = [other.batch(number, 4), other.batch(number + 4, 4)]
        assert torch.equal(inputs, torch.cat([half.inputs for half in halves]))
        assert torch.equal(targets, torch.cat([half.targets for half in halves]))


def test_epochs_and_seeds_differ_in_order_and_start() -> None:
    orders, phases = set(), set()
    for seed in (0, 1, 2**32, 2**63 - 1):
        windows = Windows(numbered(1000), 10, seed)
        for epoch in range(5):
            starts = windows.batch(epoch * windows.per_epoch, windows.per_epoch).inputs[:, 0]
            orders.add(tuple((starts // 10).tolist()))
            phases.add(int(starts[0] % 10))
            assert starts.tolist() != sorted(starts.tolist())
    assert len(orders) == 20
    assert len(phases) > 5


def test_every_start_comes_up() -> None:
    windows = Windows(numbered(100), 5, seed=0)
    first = [
        windows.batch(e * windows.per_epoch, windows.per_epoch).inputs.min() for e in range(60)
    ]
    assert {int(start) for start in first} == set(range(5))


@pytest.mark.parametrize(("n", "block_size"), [(29, 10), (99, 10), (1023, 256)])
def test_no_character_is_left_out_for_ever(n: int, block_size: int) -> None:
    windows = Windows(numbered(n), block_size, seed=0)
    _, targets = windows.batch(0, 20 * block_size * windows.per_epoch)
    assert targets.max() == n - 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_the_smallest_text(dtype: type) -> None:
    windows = Windows(np.arange(5, dtype=dtype), 4, seed=0)
    assert windows.per_epoch == 1
    inputs, targets = windows.batch(0, 3)
    assert inputs.tolist() == [[0, 1, 2, 3]] * 3
    assert targets.tolist() == [[1, 2, 3, 4]] * 3


@pytest.mark.parametrize("seed", [2**63, 2**64 - 2])
def test_large_seeds(seed: int) -> None:
    one, other = (Windows(numbered(1000), 10, s).batch(0, 99).inputs for s in (seed, seed + 1))
    assert not torch.equal(one, other)


def test_a_text_shorter_than_a_block() -> None:
    with pytest.raises(UserError) as caught:
        Windows(numbered(8), 8, seed=0)
    assert str(caught.value) == (
        "the text is too short: 8 tokens to train on, and block_size 8 needs 9; give more text, "
        "or a --block-size below 8"
    )
    Windows(numbered(8), 7, seed=0)


# --- the blocks of evaluation


@repeatable
@given(st.integers(1, 6), st.integers(0, 5), st.integers(-1, 1), st.integers(1, 4))
def test_blocks_have_each_token_but_the_first_as_target_once(
    block_size: int, count: int, more: int, batch_size: int
) -> None:
    n = max(2, block_size * count + more)
    batches = list(blocks(numbered(n), block_size, batch_size))
    inputs = [row for batch in batches for row in batch.inputs.tolist()]
    targets = [row for batch in batches for row in batch.targets.tolist()]
    assert [t for row in targets for t in row] == list(range(1, n))
    assert [i for row in inputs for i in row] == list(range(n - 1))
    assert all(len(row) == block_size for row in inputs[:-1])
    assert 1 <= len(inputs[-1]) <= block_size
    assert all(1 <= len(batch.inputs) <= batch_size for batch in batches)
    assert all(batch.inputs.dtype == torch.int64 for batch in batches)
