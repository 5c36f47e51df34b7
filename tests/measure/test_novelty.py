"""Copies, against a slow search and in texts where they were planted."""

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, SMALL, words
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data.corpus import load_corpus
from chargpt.data.tokenizer import CharTokenizer
from chargpt.measure import novelty as module
from chargpt.measure.novelty import (
    THRESHOLDS,
    CopyFinder,
    Novelty,
    Overlap,
    Place,
    TrainingText,
    measure_novelty,
    novelty_of_run,
    novelty_table,
)
from chargpt.train import TrainResult, train

# 300 ideographs and a few characters beyond 16 bits: ids of two bytes.
MANY = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) + "\U0001f600\U0001f601\U00020000"
# 70,000 characters, all but the surrogates: ids of three bytes.
MOST = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0xE000 + 70_000 - 0xD7FF)]))
FEW = st.text("ab\n", min_size=1, max_size=40)
STRANGE = "一丁\U0001f600\U00020000"
EXAMPLES = settings(deadline=None, max_examples=150, derandomize=True)


def slow_lengths(documents: Sequence[str], text: str) -> list[int]:
    """Try every length at every character."""
    return [
        max(
            length
            for length in range(len(text) - start + 1)
            if any(text[start : start + length] in document for document in documents)
        )
        for start in range(len(text))
    ]


def slow_n_copied(lengths: Sequence[int], least: int) -> int:
    longest = [(start, length) for start, length in enumerate(lengths) if length >= least]
    return len({at for start, length in longest for at in range(start, start + length)})


def random_text(length: int, alphabet: str, seed: int) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def overlap(samples: str | Sequence[str], training: str | Sequence[str], *least: int) -> Overlap:
    return measure_novelty(samples, TrainingText.of(training), thresholds=least or (20,)).samples


def lengths_in(training: str | Sequence[str], text: str) -> list[int]:
    return CopyFinder(TrainingText.of(training), [text]).lengths[0].tolist()


def find(training: str | Sequence[str], text: str) -> Place | None:
    finder = CopyFinder(TrainingText.of(training), ["another", text])
    return finder.place(1, 0, len(text)) if finder.lengths[1][0] == len(text) else None


# --- the longest copy from each character


@EXAMPLES
@given(documents=st.lists(FEW, min_size=1, max_size=4), text=st.text("ab\nc", max_size=30))
def test_lengths_equal_a_slow_search(documents: list[str], text: str) -> None:
    """c is not in the training text; a and b repeat and often meet the end of a document."""
    assert lengths_in(documents, text) == slow_lengths(documents, text)


@EXAMPLES
@given(training=st.text(STRANGE, max_size=30), text=st.text(STRANGE + "\U0001f602", max_size=30))
def test_lengths_are_right_with_many_distinct_characters(training: str, text: str) -> None:
    """303 characters need ids wider than a byte; sorting by single bytes would be wrong."""
    documents = [MANY + training, training + "一"]
    assert TrainingText.of(documents).ids.dtype.itemsize > 1
    assert lengths_in(documents, text) == slow_lengths(documents, text)


def test_lengths_are_right_with_70_000_distinct_characters() -> None:
    rng = random.Random(0)
    pieces = [MOST[cut : cut + 10] for cut in rng.choices(range(len(MOST) - 10), k=9)]
    assert lengths_in(MOST, "".join(pieces) + "\0") == [*range(10, 0, -1)] * 9 + [0]


def test_lengths_equal_a_slow_search_in_a_longer_text() -> None:
    """The training text repeats itself with changes; the sample is made of pieces of it."""
    rng = random.Random(0)
    base = random_text(300, "abcd ", seed=0)
    training = "".join(base[: rng.randrange(300)] + rng.choice("xyz") for _ in range(20))
    text = "".join(training[cut : cut + 90] for cut in rng.choices(range(len(training)), k=5))
    lengths = lengths_in(training, text)
    assert lengths == slow_lengths([training], text)
    assert max(lengths) > 90


def test_a_text_of_one_letter_takes_no_longer() -> None:
    """Each of 30,000 places has a copy of 20,000 letters: comparing all of them would not end."""
    lengths = lengths_in("a" * 20_000, "a" * 30_000)
    np.testing.assert_array_equal(lengths, np.minimum(np.arange(30_000, 0, -1), 20_000))


def test_a_lone_surrogate_and_a_null_are_ordinary_characters() -> None:
    assert lengths_in("x\0y\ud800z", "\0y\ud800\ud801\0") == [3, 2, 1, 0, 1]
    assert overlap(["x", "\0y", ""], "x\0y\ud800z", 1).shares == (1.0,)


@pytest.mark.parametrize("n_distinct", [253, 254, 255, 256])
def test_ids_of_one_byte_leave_room_for_the_borders(n_distinct: int) -> None:
    training = "".join(map(chr, range(0x4E00, 0x4E00 + n_distinct)))
    text = training[-3:] + "x" + training[:2] + training[-1]
    assert lengths_in(training, text) == [3, 2, 1, 0, 2, 1, 1]


# --- where a copy stands


@EXAMPLES
@given(
    documents=st.lists(FEW, min_size=1, max_size=4), text=st.text("ab\n", min_size=1, max_size=6)
)
def test_places_equal_a_slow_search(documents: list[str], text: str) -> None:
    found = [
        (number, start, document[:start].count("\n") + 1)
        for number, document in enumerate(documents)
        for start in range(len(document))
        if document.startswith(text, start)
    ]
    assert find(documents, text) == (Place(*found[0], len(found)) if found else None)


@EXAMPLES
@given(text=st.text("abc", min_size=1, max_size=40))
def test_the_longest_copies_are_maximal_and_apart(text: str) -> None:
    training = "abbaabab"
    copies = measure_novelty(text, TrainingText.of(training), n_copies=100).copies
    lengths = slow_lengths([training], text)
    sizes = [len(copy.text) for copy in copies]
    assert sizes == sorted(sizes, reverse=True)
    assert len({copy.text for copy in copies}) == len(copies)
    covered: set[int] = set()
    for copy in copies:
        span = range(copy.offset, copy.offset + len(copy.text))
        assert text[span.start : span.stop] == copy.text
        assert training[copy.place.offset :].startswith(copy.text)
        assert lengths[span.start] == len(span)  # cannot be extended to the right
        assert not span.start or text[span.start - 1 : span.stop] not in training  # nor to the left
        assert covered.isdisjoint(span)
        covered |= {*span}
    assert max(sizes, default=0) == max(lengths)


def test_a_text_copied_twice_is_listed_once() -> None:
    training = TrainingText.of("a king and a queen")
    copies = measure_novelty(["king!", "queen!", "?king"], training, n_copies=9).copies
    found = [(copy.text, copy.sample, copy.offset) for copy in copies]
    assert found == [("queen", 1, 0), ("king", 0, 0)]


# --- the measure


def test_a_measure_by_hand() -> None:
    training = "abcdefghijklmnopqrstuvwxyz"
    # copies: abcdef (6), xyz (3), q (1); no hyphen
    novelty = measure_novelty("abcdef-xyz-q", TrainingText.of(training), thresholds=(1, 3, 4, 7))
    # from each character: 6 5 4 3 2 1, 0, 3 2 1, 0, 1
    assert novelty.samples == Overlap(
        n_characters=12, longest_text=12, shares=(10 / 12, 9 / 12, 6 / 12, 0.0), mean=28 / 12,
        median=2.0, longest=6, whole=None,
    )  # fmt: skip
    assert novelty.held_out is None
    copies = [(copy.text, copy.offset, copy.place.offset) for copy in novelty.copies]
    assert copies == [("abcdef", 0, 0), ("xyz", 7, 23), ("q", 11, 16)]


def test_several_samples_are_each_measured_alone() -> None:
    documents = [random_text(200, "ab ", seed=10 + i) for i in range(5)]
    texts = [random_text(8 * i, "ab c", seed=20 + i) for i in range(8)]
    lengths = [slow_lengths(documents, text) for text in texts]
    every = [length for some in lengths for length in some]
    measured = overlap(texts, documents, 5, 8)
    for share, least in zip(measured.shares, (5, 8), strict=True):
        copied = sum(slow_n_copied(some, least) for some in lengths)
        assert share == pytest.approx(copied / len(every), rel=1e-12)
    assert measured.mean == pytest.approx(sum(every) / len(every), rel=1e-12)
    assert measured.median == np.median(every)
    assert (measured.longest, measured.n_characters) == (max(every), len(every))


def test_held_out_text_is_measured_like_the_samples() -> None:
    training = ["abcdefgh", "ijkl"]
    novelty = measure_novelty("abc", TrainingText.of(training), ["abcdefgh", "xx"], thresholds=(4,))
    assert novelty.held_out == overlap(["abcdefgh", "xx"], training, 4)
    assert novelty.held_out is not None and novelty.held_out.shares == (0.8,)
    assert measure_novelty("abc", TrainingText.of(training), ["", ""]).held_out is None


def test_whole_documents_are_counted() -> None:
    """Parts of a document do not count; an empty text is not a sample."""
    training = ["emma", "anna", "annabel", "bel"]
    assert overlap(["bel", "annabel", "anna", "emma", ""], training).whole == 1.0
    assert overlap(["ann", "nna", "nn", "emmaanna", "abel", "mia"], training).whole == 0.0
    assert overlap(["anna", "ann", "mia", "anna"], training).whole == 0.5


@pytest.mark.parametrize("samples", ["", [], ["", ""]])
def test_empty_samples_are_refused(samples: str | list[str]) -> None:
    with pytest.raises(UserError, match="samples are empty: give at least one character"):
        measure_novelty(samples, TrainingText.of("abc"))


def test_an_empty_training_text_and_thresholds_below_one_are_refused() -> None:
    for texts in ("", [], [""]):
        with pytest.raises(UserError, match="at least one character"):
            TrainingText.of(texts)
    empty = TrainingText(np.array([], dtype=np.uint8), CharTokenizer("ab"))
    with pytest.raises(UserError, match="training text is empty"):
        measure_novelty("abc", empty)
    for thresholds in ((), (20, 0)):
        with pytest.raises(UserError, match="thresholds"):
            measure_novelty("abc", TrainingText.of("abc"), thresholds=thresholds)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UserError, match=r"pydivsufsort.*pip install 'chargpt\[novelty\]'"):
        measure_novelty("abc", TrainingText.of("abc"))


# --- the table


def table_of(samples: str | list[str], training: str | list[str], held_out: str = "") -> str:
    return novelty_table(measure_novelty(samples, TrainingText.of(training), held_out))


def test_the_table_has_the_figures_and_the_copies() -> None:
    training = "one\ntwo\n" + random_text(100, "abc", seed=0)
    table = table_of(training[8:58] + "?" * 50, training, held_out="zz" + training[:24] * 2)
    rows = [line.split() for line in table.splitlines()]
    assert ["characters", "100", "50"] in rows
    assert ["in", "copies", "of", "20", "or", "more", "50.0%", "96.0%"] in rows
    assert ["in", "copies", "of", "40", "or", "more", "50.0%", "0.0%"] in rows
    assert ["longest", "copy", "50", "24"] in rows
    assert f"50  sample 1 at 0 = line 3: {training[8:58]}" in table
    assert "whole documents" not in table
    assert "unseen" not in table_of("one", training)


def test_the_table_names_the_document_if_there_are_several() -> None:
    table = table_of(["anna", "mia", "berta"], ["emma", "anna\nberta"], held_out="anna")
    assert "5  sample 3 at 0 = document 2, line 2: berta" in table
    assert "whole documents" in table
    assert table_of("king", "king, king and king").count("line 1 and 2 more: king") == 1


def test_control_characters_of_a_copy_are_escaped() -> None:
    nasty = "a\x1b[2J\x07\r\x9b\u202e\u2028\x7f\ud800\tb\nc"
    table = table_of(nasty, nasty)
    assert all(character.isprintable() for line in table.split("\n") for character in line)
    assert r"a\x1b[2J\x07\r\x9b\u202e\u2028\x7f\ud800\tb\nc" in table
    assert "é 一 \U0001f600" in table_of("é 一 \U0001f600", "é 一 \U0001f600")


def test_only_the_start_of_a_long_copy_is_shown() -> None:
    text = random_text(500, "abc", seed=0)
    last = table_of(text, text).splitlines()
    line = next(line for line in last if "500  sample" in line)
    assert line.endswith(text[:60] + "…")
    assert max(map(len, table_of("\n" * 500, "\n" * 500).splitlines()[:-1])) < 120


# --- the verdict


def verdict(share: float, usual: float | None, **changes: Any) -> str:
    samples = Overlap(
        n_characters=10_000, longest_text=500, shares=(1.0, share, 0.0), mean=9.0, median=8.0,
        longest=60, whole=None,
    )  # fmt: skip
    held_out = None if usual is None else replace(samples, shares=(1.0, usual, 0.0))
    samples = replace(samples, **changes)
    return Novelty(thresholds=(20, 40, 80), samples=samples, held_out=held_out, copies=()).verdict


def test_the_verdict_says_what_the_figures_mean() -> None:
    fact = "31.0% of the text stands word for word in the training text in stretches of 40 "
    fact += "characters or more"
    assert verdict(0.31, None) == f"{fact}."
    beside = f"{fact}; of real unseen text 2.0% does: the model "
    assert verdict(0.31, 0.02) == f"{beside}recites its training text."
    assert verdict(0.05, 0.02).endswith("copies somewhat more than real text does.")
    assert verdict(0.31, 0.31).endswith("copies no more than real text does.")


def test_the_verdict_admits_short_samples_and_counts_documents() -> None:
    assert "rough figure: the samples have 1,234 characters" in verdict(0.3, 0.0, n_characters=1234)
    assert "rough" not in verdict(0.3, 0.0)
    short = verdict(0.0, 0.0, longest_text=12)
    assert short == "Every sample is shorter than 40 characters, the least that counts."
    novelty = measure_novelty(["anna", "mia"], TrainingText.of(["anna", "emma"]), ["ida", "emma"])
    fact = "50.0% of the samples are whole documents of the training text"
    assert f"{fact}; of the unseen documents 50.0% are." in novelty.verdict


# --- of a run


def test_a_text_that_needs_more_memory_than_there_is_is_refused(
    result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 180}.__getitem__)
    with pytest.raises(UserError, match=r"novelty needs about 0 GB of memory for 2,700 char"):
        novelty_of_run(result.run, samples="a king")  # 7 bytes a character
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 190}.__getitem__)
    assert novelty_of_run(result.run, samples="a king").copies


def test_a_run_is_measured_against_its_own_text(result: TrainResult, text_file: Path) -> None:
    text = text_file.read_text(encoding="utf-8")
    cut = len(load_corpus([str(text_file)]).train)
    novelty = novelty_of_run(result.run, samples=[text[100:300]])
    assert novelty.samples.shares == (1.0, 1.0, 1.0)
    assert novelty.copies[0].place.offset <= 100  # the text repeats itself
    pieces = [text[i : i + 200] for i in range(cut, 3000, 200)]
    assert novelty.held_out == overlap(pieces, text[:cut], *THRESHOLDS)
    assert novelty_of_run(result.run, samples="a", held_out_characters=0).held_out is None


def test_samples_of_a_file_are_those_given(result: TrainResult, tmp_path: Path) -> None:
    """`chargpt sample` writes a header for each of several samples, and a line end."""
    samples = ["the king and\nno!", "Romeo said:\n", "of \u2665 hearts"]
    given = novelty_of_run(result.run, samples=samples)
    file = tmp_path / "samples.txt"
    written = "".join(f"--- sample {i + 1}\n{text}\n" for i, text in enumerate(samples))
    file.write_bytes(written.encode())
    assert novelty_of_run(result.run, file) == given
    file.write_bytes((samples[0] + "\n").encode())
    assert novelty_of_run(result.run, str(file)) == novelty_of_run(result.run, samples=samples[:1])
    file.write_bytes(written.encode("utf-16"))
    assert novelty_of_run(result.run, file) == given


def test_missing_and_empty_samples_are_named(result: TrainResult, tmp_path: Path) -> None:
    file = tmp_path / "none.txt"
    with pytest.raises(UserError, match=r"there is no file .*none\.txt"):
        novelty_of_run(result.run, file)
    file.write_bytes(b"caf\xe9")
    assert novelty_of_run(result.run, file, encoding="latin-1").samples.n_characters == 4
    file.write_bytes(b"\n")
    for call in ({"samples_file": file}, {}, {"samples": ["", ""]}):
        with pytest.raises(UserError, match="no samples: give"):
            novelty_of_run(result.run, **call)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="held_out_characters is -1"):
        novelty_of_run(result.run, samples="a", held_out_characters=-1)


def test_a_file_is_cut_at_the_separator_of_a_run_whose_text_must_not_change(tmp_path: Path) -> None:
    text, file, run = tmp_path / "hearts.txt", tmp_path / "names.txt", tmp_path / "run"
    text.write_text(words(3000), encoding="utf-8")
    file.write_bytes(b"emma\n\nanna\n")
    train(
        str(text), model_config=SMALL, train_config=QUICK.replace(steps=1),
        data_config=DataConfig(document_separator="\n"), out=run, quiet=True,
    )  # fmt: skip
    overlap = novelty_of_run(run, file).samples
    assert (overlap.n_characters, overlap.longest_text) == (8, 4)
    text.write_text(words(3000, seed=1), encoding="utf-8")
    for problem in (r"hearts\.txt has changed since the run", r"there is no file .*hearts\.txt"):
        with pytest.raises(UserError, match=rf"{problem}.*: novelty needs the text"):
            novelty_of_run(run, samples="a")
        text.unlink(missing_ok=True)


def held_out(documents: list[str], n_characters: int, length: int) -> list[str]:
    return module._held_out_pieces(TrainingText.of(documents), n_characters, length)


def test_held_out_text_is_taken_evenly_from_all_of_the_split() -> None:
    text = random_text(10_000, "abcdefgh", seed=0)
    assert held_out([text], 10_000, 3000) == [text[i : i + 3000] for i in range(0, 10_000, 3000)]
    assert held_out([text], 1000, 100) == [text[i : i + 100] for i in range(0, 10_000, 1000)]
    assert held_out([text], 50, 100) == [text[:50]]
    assert held_out([text], 0, 100) == []


def test_held_out_documents_stay_whole() -> None:
    documents = [random_text(1 + seed % 8, "abc", seed) for seed in range(500)]
    assert held_out(documents, 100_000, 100) == documents
    pieces = held_out(documents, 300, 100)
    assert set(pieces) <= set(documents)
    assert 250 <= sum(map(len, pieces)) <= 300
    assert held_out(["abcabcabca", "bc"], 100, 4) == ["abca", "bcab", "ca", "bc"]
