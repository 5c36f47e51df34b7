"""Reading, cutting and splitting texts, the windows, and the message for each mistake."""

import codecs
import hashlib
import io
import os
import sys
import tracemalloc
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data import datasets
from chargpt.data.corpus import Corpus, load_corpus, split_point
from chargpt.data.decoding import decode_chunks
from chargpt.data.documents import split_documents
from chargpt.data.formats import raw_chunks
from chargpt.data.permutation import ROUNDS, permuted
from chargpt.data.texts import find_sources
from chargpt.data.windows import Windows, blocks

TEXT = "".join(f"line {i}, à la carte\r\nand\rso on\n" for i in range(20))
repeatable = settings(derandomize=True, deadline=None, max_examples=150)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with visible and hidden texts at two levels."""
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
        (["texts/b.txt", "texts/a.txt"], ["b.txt", "a.txt"]),
        (["texts"], ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.md"]),
        (["texts/[b-z].t?t"], ["b.txt"]),
        (["texts/**/*.txt"], ["a.txt", "b.txt", "sub/c.txt"]),
        (["texts/.hidden"], [".hidden"]),  # named explicitly
        (["texts/**/**/d.md"], ["sub/deep/d.md"]),  # matches twice
        (["texts/sub", "texts/a.txt"], ["sub/c.txt", "sub/deep/d.md", "a.txt"]),
    ],
)
def test_files_folders_and_patterns(folder: Path, sources: list[str], names: list[str]) -> None:
    found = find_sources(sources)
    assert [b"".join(raw_chunks(text)).decode() for text in found] == [f"<{n}>" for n in names]
    assert [Path(text.name) for text in found] == [Path("texts") / name for name in names]
    absolute = find_sources([str(folder / source) for source in sources])
    assert [text.path for text in absolute] == [folder / text.name for text in found]


def test_a_file_name_may_look_like_a_pattern(folder: Path) -> None:
    (folder / "odd[1]*.txt").write_text("odd")
    assert [text.name for text in find_sources(["odd[1]*.txt"])] == ["odd[1]*.txt"]


def test_a_tilde_is_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert len(find_sources(["~/texts/*.txt"])) == 2


@pytest.mark.parametrize("source", ["-", "tiny-shakespeare"])
def test_reads_standard_input_and_data_sets(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    monkeypatch.setattr(datasets, "load_dataset", {"tiny-shakespeare": TEXT.encode()}.get)
    corpus = load_corpus([source])
    assert text_of(corpus) == TEXT
    assert corpus.sources == (source,)
    with pytest.raises(UserError, match=f"^{source} is given twice: give each text once$"):
        load_corpus([source, source])


GIVE = (
    r": give a text file, a folder, a pattern, - for standard input, "
    r"or a data set \(tiny-shakespeare\)$"
)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("texts/c.txt", r"there is no file texts/c\.txt: did you mean texts/[ab]\.txt\?$"),
        ("tiny-shakespear", "there is no file tiny-shakespear: did you mean tiny-shakespeare.$"),
        ("zzzzzz", "there is no file zzzzzz" + GIVE),
        ("no/where/x", "there is no file no/where/x" + GIVE),
        ("texts/*.csv", r"texts/\*\.csv: no file matches this pattern; check it with ls$"),
        ("empty", "empty is a folder without texts: put some text files there$"),
        ("hollow.txt", "hollow.txt is empty: give a text with at least a few thousand characters$"),
        ("mark.txt", "mark.txt is empty: give a text with at least a few"),
        ("To be, or not to be " * 20, "(To be, or not to be ){3}…: cannot be found .* give a text"),
    ],
)
def test_missing_and_empty_sources_are_refused(folder: Path, source: str, message: str) -> None:
    (folder / "empty" / ".git").mkdir(parents=True)
    (folder / "empty" / ".git" / "config").write_text("hidden")
    (folder / "hollow.txt").touch()
    (folder / "mark.txt").write_bytes(codecs.BOM_UTF8)
    with pytest.raises(UserError, match="^" + message):
        load_corpus([source])


def test_a_source_is_required() -> None:
    with pytest.raises(UserError, match=r"^no text: give a file, or a data set \(tiny-shakesp"):
        load_corpus([])


def test_an_unreadable_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = PermissionError(13, "Permission denied")
    monkeypatch.setattr(Path, "open", Mock(side_effect=refusal))
    message = r"^texts.a.txt cannot be read \(Permission denied\): give a readable file$"
    with pytest.raises(UserError, match=message):
        load_corpus(["texts/a.txt"])


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["texts/*.txt", "texts"], "texts.a.txt is given twice: "),
        (["texts/b.txt", "link"], "link is given twice, also as texts.b.txt: "),
        (["texts", "sub/../texts"], "sub.*texts.a.txt is given twice, also as texts.a.txt: "),
    ],
)
def test_a_file_given_twice_is_refused(folder: Path, sources: list[str], message: str) -> None:
    """Otherwise one copy could be in the training part and the other in the validation part."""
    (folder / "sub").mkdir()
    (folder / "link").symlink_to(folder / "texts" / "b.txt")
    with pytest.raises(UserError, match=f"^{message}give each text once$"):
        find_sources(sources)


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
        (TEXT.encode("utf-16-le"), "utf-16-le"),
    ],
)
def test_decodes_encodings_and_byte_order_marks(tmp_path: Path, data: bytes, encoding: str) -> None:
    file = tmp_path / "text"
    file.write_bytes(data)
    corpus = load_corpus([str(file)], DataConfig(encoding=encoding))
    assert text_of(corpus) == TEXT
    assert corpus.facts.sha256 == hashlib.sha256(data).hexdigest()


def test_line_ends_do_not_change_documents(tmp_path: Path) -> None:
    """A file from Windows gives the corpus of the same file with Unix line ends."""
    lines = ["", "anna", "bob", "", "carl", *(f"name{i}" for i in range(20)), ""]
    config = DataConfig(document_separator="\n")
    corpora = []
    for end in ("\n", "\r\n"):
        data = end.join(lines).encode()
        (tmp_path / "text").write_bytes(data)
        corpora.append(load_corpus([str(tmp_path / "text")], config))
        assert corpora[-1].facts.sha256 == hashlib.sha256(data).hexdigest()
    unix, windows = corpora
    assert windows.tokenizer == unix.tokenizer
    assert text_of(windows) == text_of(unix) == "".join(lines)
    assert windows.facts.boundaries == unix.facts.boundaries
    assert windows.facts.n_documents == 23


def chunks_of(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


NOT_OF = "give --encoding, e.g. --encoding latin-1 or cp1252, or --on-error skip-file or replace"
KNOWN = "give --encoding utf-8, latin-1, cp1252, utf-16, …"


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (b"ab\ncaf\xe9", "utf-8", f"t: byte 0xe9 at offset 6 (line 2) is not utf-8: {NOT_OF}"),
        (b"\x81", "cp1252", f"t: byte 0x81 at offset 0 (line 1) is not cp1252: {NOT_OF}"),
        (b"\x89PNG\0\0", "utf-8", "t is a binary file: give plain text"),
        (b"ab\0cd", "utf-8", "t is a binary file, or not utf-8: give plain text, or --encoding"),
        (b"abc", "utf-9", f"unknown encoding 'utf-9': {KNOWN}"),
        (b"abc", "base64", f"unknown encoding 'base64': {KNOWN}"),
        (
            b"\xef\xbb\xbf\n\xff",
            "utf-8",
            f"t: byte 0xff at offset 4 (line 2) is not utf-8-sig: {NOT_OF}",
        ),
    ],
)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_bytes_that_are_not_text_are_refused(
    data: bytes, encoding: str, message: str, size: int
) -> None:
    with pytest.raises(UserError) as caught:
        list(decode_chunks("t", chunks_of(data, size), encoding))
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
        assert (corpus.facts.n_characters, corpus.facts.n_documents) == (n, 1)
        assert corpus.train.dtype == np.uint8


def test_documents_end_with_end_of_text_and_stay_whole(tmp_path: Path) -> None:
    names = [f"name{i:03}" for i in range(40)]
    (tmp_path / "names").write_text("\n" + "\n".join(names) + "\n\n")
    config = DataConfig(document_separator="\n", validation_fraction=0.25)
    corpus = load_corpus([str(tmp_path / "names")], config)
    end = corpus.tokenizer.end_of_text_id
    assert end == len(corpus.tokenizer.characters) == corpus.tokenizer.vocab_size - 1
    for part, expected in ((corpus.train, names[:30]), (corpus.validation, names[30:])):
        rows = part.reshape(-1, 8)  # a name and its end-of-text
        assert [corpus.tokenizer.decode(row) for row in rows] == expected
        assert (rows[:, 7] == end).all()
    assert (corpus.facts.n_characters, corpus.facts.n_documents) == (280, 40)
    assert corpus.summary() == (
        "280 characters in 40 documents, 14 distinct; 240 to train on, 80 to validate"
    )


def test_each_file_is_a_document_and_a_single_one_has_no_end_of_text(folder: Path) -> None:
    corpus = load_corpus(["texts/a.txt", "texts/b.txt"], DataConfig(validation_fraction=0.5))
    ids = np.concatenate([corpus.train, corpus.validation])
    assert np.flatnonzero(ids == corpus.tokenizer.end_of_text_id).tolist() == [7, 15]
    assert corpus.facts.sha256 == hashlib.sha256(b"<a.txt><b.txt>").hexdigest()
    lone = load_corpus(["texts/a.txt"], DataConfig(document_separator="@", validation_fraction=0.4))
    assert lone.tokenizer.end_of_text_id is None
    assert lone.summary() == "7 characters, 6 distinct; 4 to train on, 3 to validate"


def test_a_text_of_separators_only_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("\n\n\n")
    with pytest.raises(UserError, match=r"text holds only document separators: give some text$"):
        load_corpus([str(tmp_path / "text")], DataConfig(document_separator="\n"))


@pytest.mark.parametrize(
    ("text", "separator", "documents"),
    [
        ("a\nb", "", ["a\nb"]),
        ("a\nb\n\nc\n", "\n", ["a", "b", "c"]),
        ("a\nb\n\nc\n", "\n\n", ["a\nb", "c\n"]),
        ("a\r\nb\r\n\r\nc\r\n", "\n\n", ["a\nb", "c\n"]),
        ("a\r\nb\n", "\r\n", ["a", "b"]),
        ("a\r\nxb\r\n", "x", ["a\r\n", "b\r\n"]),
        ("aaaaab", "aa", ["ab"]),
        ("abc", "x", ["abc"]),
    ],
)
def test_split_documents(text: str, separator: str, documents: list[str]) -> None:
    assert list(split_documents(text, separator)) == documents


def test_short_documents_take_little_memory(tmp_path: Path) -> None:
    """The token ids, and as much scratch memory as for any other text."""
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{i:06}\n" for i in range(1_000_000)))
    tracemalloc.start()
    try:
        load_corpus([str(names)], DataConfig(document_separator="\n"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * names.stat().st_size


@pytest.mark.parametrize(
    ("lengths", "fraction", "cut"),
    [
        ([100], 0.1, 90),
        ([9] * 10, 0.1, 90),  # with end-of-text, 10 tokens each: at a boundary
        ([9] * 10, 0.12, 90),  # the nearest boundary
        ([9] * 10, 0.16, 80),
        ([79, 19], 0.1, 80),  # twice the fraction is accepted
        ([78, 20], 0.1, 90),  # more is not: cut within a document
        ([94, 4], 0.1, 95),  # half the fraction is accepted
        ([95, 3], 0.1, 90),  # less is not
        ([49, 49], 0.1, 90),
    ],
)
def test_split_point(lengths: list[int], fraction: float, cut: int) -> None:
    ids = np.concatenate([np.array([0] * length + [1]) for length in lengths])
    tokens, end = (ids, 1) if len(lengths) > 1 else (ids[:-1], None)
    assert split_point(tokens, end, fraction) == cut


@repeatable
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=30),
    st.floats(0.05, 0.95),
    st.integers(1, 12),
)
def test_a_boundary_is_found_wherever_it_is(
    lengths: list[int], fraction: float, block: int
) -> None:
    """As in a text whose boundaries are all known."""
    tokens = np.concatenate([np.array([0] * length + [1]) for length in lengths])
    ends = np.cumsum(np.array(lengths) + 1)
    total = int(ends[-1])
    cut = int((1.0 - fraction) * total)
    nearest = int(ends[np.argmin(np.abs(ends - cut))])
    if 0.5 <= (total - nearest) / (fraction * total) <= 2.0:
        cut = nearest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("chargpt.data.corpus._BLOCK", block)
        if 2 <= cut <= total - 2:
            assert split_point(tokens, 1, fraction) == cut
        else:
            with pytest.raises(UserError, match="too few to hold out"):
                split_point(tokens, 1, fraction)


@pytest.mark.parametrize(("n", "fraction"), [(1, 0.1), (10, 0.1), (3, 0.5), (10, 0.9)])
def test_a_text_too_short_to_split_is_refused(n: int, fraction: float) -> None:
    with pytest.raises(UserError) as caught:
        split_point(np.zeros(n), None, fraction)
    assert str(caught.value) == (
        f"the text has {n} tokens, too few to hold out {fraction:.0%} of them: give more text"
    )


# --- windows


def numbered(n: int) -> np.ndarray[Any, Any]:
    """A text in which every token is its own position."""
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
    assert visited == list(range(visited[0], visited[0] + len(visited)))  # once, without a gap
    assert n - 1 - len(visited) < max(2 * T - 1, 1)  # all but the ends


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


def test_each_epoch_and_seed_has_its_own_order_and_start() -> None:
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


@pytest.mark.parametrize(("n", "block_size"), [(29, 10), (99, 10), (1023, 256)])
def test_every_character_is_trained_on_in_some_epoch(n: int, block_size: int) -> None:
    windows = Windows(numbered(n), block_size, seed=0)
    _, targets = windows.batch(0, 20 * block_size * windows.per_epoch)
    assert targets.max() == n - 1


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32])
def test_the_smallest_text_is_one_window_and_a_shorter_one_is_refused(dtype: type) -> None:
    windows = Windows(np.arange(5, dtype=dtype), 4, seed=0)
    assert windows.per_epoch == 1
    inputs, targets = windows.batch(0, 3)
    assert inputs.tolist() == [[0, 1, 2, 3]] * 3
    assert targets.tolist() == [[1, 2, 3, 4]] * 3
    with pytest.raises(UserError) as caught:
        Windows(numbered(8), 8, seed=0)
    assert str(caught.value) == (
        "the text is too short: 8 tokens to train on, and block_size 8 needs 9; give more text, "
        "or a --block-size below 8"
    )


def test_the_order_of_an_epoch_stays() -> None:
    """A run that was started with an earlier version resumes with the same batches."""
    windows = Windows(numbered(10_000), 8, seed=1337)
    starts = windows.batch(3 * windows.per_epoch + 5, 6).inputs[:, 0].tolist()
    assert starts == [4150, 2558, 430, 8766, 7662, 2790]


# --- very long texts


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> None:
    """An order that takes no memory, also for few windows."""
    monkeypatch.setattr("chargpt.data.windows.SORTED", 0)


@repeatable
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_permutation_reaches_each_place_once(size: int, key: int) -> None:
    keys = [(key + i) % 2**64 for i in range(ROUNDS)]
    assert sorted(permuted(np.arange(size), size, keys).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 37, 100, 2**20 + 1, 10**12])
def test_a_permutation_is_random(size: int) -> None:
    """Chi-squared, over seeds: where a place goes, and how two neighbours lie to each other."""
    generator = np.random.Generator(np.random.Philox(0))
    bins, seeds = min(size, 20), 4000
    place, distance = np.zeros(bins), np.zeros(bins)
    for _ in range(seeds):
        keys = generator.integers(0, 2**64, ROUNDS, dtype=np.uint64)
        first, second = permuted(np.array([0, 1]), size, keys).tolist()
        place[first * bins // size] += 1
        distance[(second - first) % size * bins // size] += 1
    numbers = np.arange(size) if size < 10**7 else np.arange(1, bins + 1) * (size // bins) - 1
    for counts, possible in ((place, numbers), (distance, numbers[numbers > 0])):
        shares = np.bincount(possible * bins // size, minlength=bins) / len(possible)
        usual = seeds * shares
        chi_squared = ((counts - usual)[usual > 0] ** 2 / usual[usual > 0]).sum()
        assert chi_squared < 50  # 20 bins: p = 1.3e-4


@pytest.mark.usefixtures("many")
def test_the_windows_of_a_very_long_text() -> None:
    """They are in a random order, each once an epoch, whatever the size of the batches."""
    T, n = 4, 1003
    windows, orders = Windows(numbered(n), T, seed=5), set()
    for epoch in range(3):
        whole = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        visited = sorted(whole.inputs.flatten().tolist())
        assert visited == list(range(visited[0], visited[0] + T * windows.per_epoch))
        orders.add(tuple(whole.inputs[:, 0].tolist()))
        pieces = [windows.batch(epoch * windows.per_epoch + i, 1) for i in (0, 9, 5)]
        assert torch.equal(torch.cat([p.inputs for p in pieces]), whole.inputs[[0, 9, 5]])
        assert torch.equal(whole.targets, whole.inputs + 1)
    assert len(orders) == 3
    across = windows.batch(windows.per_epoch - 2, 4)  # the end of an epoch, and the next
    assert torch.equal(across.inputs[:2], windows.batch(windows.per_epoch - 2, 2).inputs)
    assert torch.equal(across.inputs[2:], windows.batch(windows.per_epoch, 2).inputs)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_map_does_not_fill_memory(tmp_path: Path) -> None:
    """A text of 256 MB is read once by batches and once by blocks; 64 MB may stay in memory."""
    file = tmp_path / "tokens"
    with file.open("wb") as opened:
        opened.truncate(256 << 20)
    tokens = np.memmap(file, np.uint8, mode="r")[1:]
    windows = Windows(tokens, 1 << 16, seed=0)
    before, peak = resident_bytes(), 0
    for number in range(windows.per_epoch):
        windows.batch(number, 1)
        peak = max(peak, resident_bytes())
    for _ in blocks(tokens, 1 << 16, 8):
        peak = max(peak, resident_bytes())
    assert peak - before < 100 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


# --- blocks for evaluation


@repeatable
@given(st.integers(1, 6), st.integers(0, 5), st.integers(-1, 1), st.integers(1, 4))
def test_every_token_but_the_first_is_a_target_once(
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
