"""Copies: against a slow search, and against texts in which they were planted."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.data.corpus import Corpus, load_corpus
from chargpt.data.tokenizer import CharTokenizer
from chargpt.measure import novelty as module
from chargpt.measure.novelty import (
    Copy,
    CopyIndex,
    Novelty,
    Overlap,
    Place,
    measure_novelty,
    novelty_of_run,
    novelty_table,
)
from chargpt.train import TrainResult

# 300 ideographs and a few characters beyond 16 bits: ids of two bytes.
MANY = "".join(map(chr, range(0x4E00, 0x4E00 + 300))) + "\U0001f600\U0001f601\U00020000"
# 70,000 characters, all but the surrogates: ids of three bytes.
MOST = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0xE000 + 70_000 - 0xD7FF)]))
FEW = st.text("ab\n", min_size=1, max_size=40)
STRANGE = "一丁\U0001f600\U00020000"
QUICK = settings(deadline=None, max_examples=150, derandomize=True)


def slow_lengths(documents: Sequence[str], text: str) -> list[int]:
    """Try every length at every place."""
    lengths = []
    for start in range(len(text)):
        length = 0
        while start + length < len(text) and any(
            text[start : start + length + 1] in document for document in documents
        ):
            length += 1
        lengths.append(length)
    return lengths


def slow_share(lengths: Sequence[int], least: int) -> float:
    covered: set[int] = set()
    for start, length in enumerate(lengths):
        if length >= least:
            covered |= set(range(start, start + length))
    return len(covered) / len(lengths)


def random_text(length: int, alphabet: str, seed: int) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=length))


def overlap(samples: str | Sequence[str], index: CopyIndex, *thresholds: int) -> Overlap:
    return measure_novelty(samples, index, thresholds=thresholds or (20, 40, 80)).samples


# --- the longest copy from each character


@QUICK
@given(documents=st.lists(FEW, min_size=1, max_size=4), text=st.text("ab\nc", max_size=30))
def test_lengths_equal_a_slow_search(documents: list[str], text: str) -> None:
    """c is not in the training text; two letters repeat, and meet ends of documents, often."""
    index = CopyIndex.of(documents)
    assert index.match_lengths(text).tolist() == slow_lengths(documents, text)


@QUICK
@given(training=st.text(STRANGE, max_size=30), text=st.text(STRANGE + "\U0001f602", max_size=30))
def test_lengths_are_right_with_many_distinct_characters(training: str, text: str) -> None:
    """303 characters need ids of two bytes, whose order a careless sorter of bytes loses."""
    documents = [MANY + training, training + "一"]
    index = CopyIndex.of(documents)
    assert index.ids.dtype.itemsize > 1
    assert index.match_lengths(text).tolist() == slow_lengths(documents, text)


def test_lengths_are_right_with_70_000_distinct_characters() -> None:
    """A search character by character, for a text of pieces of the training text."""
    rng = random.Random(0)
    cuts = [rng.randrange(len(MOST) - 50) for _ in range(40)]
    text = "".join(MOST[cut : cut + rng.randrange(50)] for cut in cuts) + "\0"
    lengths = CopyIndex.of(MOST).match_lengths(text)
    assert lengths.tolist() == slow_lengths([MOST], text)
    assert lengths[-1] == 0


@pytest.mark.parametrize("vocab_size", [2, 256, 257, 65_536, 65_537, 300_000])
def test_the_library_sorts_suffixes_of_any_width(vocab_size: int) -> None:
    """Ids whose low bytes are equal, whose high bytes are equal, and both ends of the range."""
    rng = np.random.default_rng(vocab_size)
    some = np.array([0, 1, 255, 256, 257, 65_535, 65_536, vocab_size - 1])
    ids = rng.choice(some[some < vocab_size], 400).astype(
        np.uint8 if vocab_size <= 256 else np.uint32
    )
    expected = sorted(range(len(ids)), key=lambda start: ids[start:].tolist())
    assert module._suffix_array(ids).tolist() == expected


@pytest.mark.parametrize("seed", range(3))
def test_lengths_equal_a_slow_search_in_a_longer_text(seed: int) -> None:
    """A text that repeats itself, with changes, and a sample made of pieces of it."""
    rng = random.Random(seed)
    base = random_text(300, "abcd ", seed)
    training = "".join(base[: rng.randrange(300)] + rng.choice("xyz") for _ in range(20))
    text = "".join(training[cut : cut + 90] for cut in rng.choices(range(len(training)), k=5))
    lengths = CopyIndex.of(training).match_lengths(text)
    assert lengths.tolist() == slow_lengths([training], text)
    assert lengths.max() > 90


def test_one_letter_over_and_over_takes_no_longer() -> None:
    """Each of 30,000 places has a copy of 20,000 letters: letter by letter this would not end."""
    lengths = CopyIndex.of("a" * 20_000).match_lengths("a" * 30_000)
    np.testing.assert_array_equal(lengths, np.minimum(np.arange(30_000, 0, -1), 20_000))


def test_a_lone_surrogate_and_a_null_are_characters_like_others() -> None:
    index = CopyIndex.of("x\0y\ud800z")
    assert index.match_lengths("\0y\ud800\ud801\0").tolist() == [3, 2, 1, 0, 1]
    assert overlap(["x", "\0y", ""], index, 1).shares == (1.0,)


def test_the_index_of_ids_is_the_index_of_their_text() -> None:
    documents = ["one\ntwo", "three"]
    tokenizer = CharTokenizer.fit(documents, end_of_text=True)
    end = tokenizer.end_of_text_id
    ids = np.array([*tokenizer.encode("one\ntwo"), end, *tokenizer.encode("three")])
    index, text = CopyIndex(ids, tokenizer), "two three one"
    np.testing.assert_array_equal(
        index.match_lengths(text), CopyIndex.of(documents).match_lengths(text)
    )


# --- where a copy stands


def test_a_planted_sentence_is_found_with_its_place() -> None:
    """Capitals stand in neither text, so that just the sentence is a long copy."""
    rng = random.Random(0)
    lines = ["".join(rng.choices("abcdefgh ", k=rng.randrange(60))) for _ in range(500)]
    sentence = "WHAT IS PLANTED HERE,\nOVER TWO LINES, IS FOUND AGAIN."
    lines[321] = lines[321] + sentence
    training = "\n".join(lines)
    sample = random_text(700, "abcdefgh ", seed=1) + sentence + random_text(200, "xyz", seed=2)
    index = CopyIndex.of(training)
    offset = len("\n".join(lines[:321])) + 1 + len(lines[321]) - len(sentence)
    assert training[offset:].startswith(sentence)
    place = Place(document=0, offset=offset, line=322, occurrences=1)
    assert index.find(sentence) == place
    novelty = measure_novelty(["nothing", sample], index, thresholds=(20, 40))
    (copy, *others) = novelty.copies
    start = copy.text.index(sentence)  # a letter or two before it may be copied, too
    assert (copy.sample, copy.offset + start) == (1, 700)
    assert copy.place == place._replace(offset=offset - start)
    assert all(len(other.text) < 15 for other in others)
    assert novelty.samples.longest == len(copy.text)
    assert novelty.samples.shares == (len(copy.text) / (7 + len(sample)),) * 2


def test_find_gives_the_first_of_several_places_and_none_for_what_is_new() -> None:
    index = CopyIndex.of(["no", "a\nking,\na king", "king"])
    assert index.find("king") == Place(document=1, offset=2, line=2, occurrences=3)
    assert index.find("a king") == Place(document=1, offset=8, line=3, occurrences=1)
    assert index.find("no") == Place(document=0, offset=0, line=1, occurrences=1)
    assert index.find("kings") is None
    assert index.find("queen") is None
    assert index.find("") is None


@QUICK
@given(
    documents=st.lists(FEW, min_size=1, max_size=4), text=st.text("ab\n", min_size=1, max_size=6)
)
def test_find_equals_a_slow_search(documents: list[str], text: str) -> None:
    found = [
        (number, start)
        for number, document in enumerate(documents)
        for start in range(len(document))
        if document.startswith(text, start)
    ]
    place = CopyIndex.of(documents).find(text)
    if not found:
        assert place is None
        return
    number, start = found[0]
    line = documents[number][:start].count("\n") + 1
    assert place == Place(number, start, line, len(found))


def test_copies_do_not_run_across_documents() -> None:
    left, right = "the end of the first", "the start of the second"
    joined = CopyIndex.of(left + right)
    apart = CopyIndex.of([left, right])
    assert joined.match_lengths(left + right)[0] == len(left + right)
    assert apart.match_lengths(left + right)[0] == len(left)
    assert apart.match_lengths(left + right)[len(left)] == len(right)
    assert apart.find("firstthe") is None


@QUICK
@given(text=st.text("abc", min_size=1, max_size=40))
def test_the_longest_copies_are_maximal_and_apart(text: str) -> None:
    training = "abbaabab"
    index = CopyIndex.of(training)
    copies = measure_novelty(text, index, n_copies=100).copies
    lengths = slow_lengths([training], text)
    assert [len(copy.text) for copy in copies] == sorted(map(len, (c.text for c in copies)))[::-1]
    assert len({copy.text for copy in copies}) == len(copies)
    covered: set[int] = set()
    for copy in copies:
        end = copy.offset + len(copy.text)
        assert text[copy.offset : end] == copy.text
        assert training[copy.place.offset :].startswith(copy.text)
        assert lengths[copy.offset] == len(copy.text)  # cannot go on to the right
        assert not copy.offset or text[copy.offset - 1 : end] not in training  # nor to the left
        assert not covered & set(range(copy.offset, end))
        covered |= set(range(copy.offset, end))
    assert max(map(len, (copy.text for copy in copies)), default=0) == max(lengths)


def test_a_text_copied_twice_is_listed_once() -> None:
    index = CopyIndex.of("a king and a queen")
    copies = measure_novelty(["king!", "queen!", "?king"], index, n_copies=9).copies
    assert [(copy.text, copy.sample, copy.offset) for copy in copies] == [
        ("queen", 1, 0),
        ("king", 0, 0),
    ]


# --- the measure


def test_a_measure_by_hand() -> None:
    """The training text has the alphabet in order, so that a copy is a row of letters in order."""
    index = CopyIndex.of("abcdefghijklmnopqrstuvwxyz")
    # copies: abcdef (6), xyz (3), the 7th letter of a 1 that stands alone, and none of a hyphen
    novelty = measure_novelty("abcdef-xyz-q", index, thresholds=(1, 3, 4, 7))
    samples = novelty.samples
    assert samples.n_characters == 12
    assert samples.shares == (10 / 12, 9 / 12, 6 / 12, 0.0)
    # from each character: 6 5 4 3 2 1, 0, 3 2 1, 0, 1
    assert samples.mean == 28 / 12
    assert samples.median == 2.0
    assert samples.longest == 6
    assert samples.longest_text == 12
    assert samples.whole is None
    assert novelty.held_out is None
    assert [copy.text for copy in novelty.copies] == ["abcdef", "xyz", "q"]
    assert [copy.offset for copy in novelty.copies] == [0, 7, 11]
    assert [copy.place.offset for copy in novelty.copies] == [0, 23, 16]


def test_overlapping_copies_count_each_character_once() -> None:
    """bcd stands in both copies, of 4 characters each; together they have 5."""
    samples = overlap("abcde", CopyIndex.of("abcd!bcde"), 4, 5)
    assert samples.shares == (1.0, 0.0)


def test_a_copy_ends_where_its_sample_ends() -> None:
    index = CopyIndex.of("abcdefgh")
    assert overlap(["abcdefgh"], index, 5).shares == (1.0,)
    assert overlap(["abcd", "efgh"], index, 5).shares == (0.0,)
    apart = overlap(["abcd", "efgh"], index, 4)
    assert (apart.shares, apart.longest, apart.n_characters) == ((1.0,), 4, 8)


@pytest.mark.parametrize("seed", range(3))
def test_several_samples_are_each_measured_alone(seed: int) -> None:
    rng = random.Random(seed)
    documents = [random_text(200, "ab ", seed + 10 + i) for i in range(5)]
    texts = [random_text(rng.randrange(60), "ab c", seed + 20 + i) for i in range(8)]
    lengths = [slow_lengths(documents, text) for text in texts]
    every = [length for some in lengths for length in some]
    measured = overlap(texts, CopyIndex.of(documents), 5, 8)
    for share, least in zip(measured.shares, (5, 8), strict=True):
        copied = sum(slow_share(some, least) * len(some) for some in lengths if some)
        assert share == pytest.approx(copied / len(every), rel=1e-12)
    assert measured.mean == pytest.approx(sum(every) / len(every), rel=1e-12)
    assert measured.median == np.median(every)
    assert (measured.longest, measured.n_characters) == (max(every), len(every))


def test_what_is_all_new_and_what_is_all_copied() -> None:
    training = random_text(3000, "abcdefgh ", seed=0)
    index = CopyIndex.of(training)
    new = measure_novelty("XYZ" * 50, index)
    assert new.samples.shares == (0.0, 0.0, 0.0)
    assert (new.samples.mean, new.samples.median, new.samples.longest) == (0.0, 0.0, 0)
    assert new.copies == ()
    copied = measure_novelty([training[100:300], training], index)
    assert copied.samples.shares == (1.0, 1.0, 1.0)
    assert copied.copies[0].place == Place(0, 0, 1, 1)
    assert len(copied.copies[0].text) == 3000


def test_the_yardstick_is_measured_as_the_samples_are() -> None:
    index = CopyIndex.of(["abcdefgh", "ijkl"])
    novelty = measure_novelty("abc", index, ["abcdefgh", "xx"], thresholds=(4,))
    assert novelty.held_out == overlap(["abcdefgh", "xx"], index, 4)
    assert novelty.held_out is not None
    assert novelty.held_out.shares == (0.8,)
    assert measure_novelty("abc", index, ["", ""]).held_out is None


def test_whole_documents_are_counted() -> None:
    """The start, the end and the middle of a document are not the document; "" is no sample."""
    index = CopyIndex.of(["emma", "anna", "annabel", "bel"])
    assert overlap(["emma"], index).whole == 1.0
    assert overlap(["bel", "annabel", "anna", "emma", ""], index).whole == 1.0
    assert overlap(["ann", "nna", "nn", "emmaanna", "abel", "mia"], index).whole == 0.0
    assert overlap(["anna", "ann", "mia", "anna"], index).whole == 0.5
    assert overlap(["mia", ""], CopyIndex.of(["a", "", "b"])).whole == 0.0


@QUICK
@given(documents=st.lists(st.text("ab", max_size=4), min_size=2, max_size=6), text=st.text("ab"))
def test_a_whole_document_is_one_of_them(documents: list[str], text: str) -> None:
    text, documents = text[:4] or "a", ["ab", *documents]
    assert overlap(text, CopyIndex.of(documents)).whole == float(text in documents)


@pytest.mark.parametrize("samples", ["", [], ["", ""]])
def test_empty_samples_are_refused(samples: str | list[str]) -> None:
    with pytest.raises(UserError, match="samples are empty: give at least one character"):
        measure_novelty(samples, CopyIndex.of("abc"))


def test_an_empty_training_text_and_thresholds_below_one_are_refused() -> None:
    for texts in ("", [], [""]):
        with pytest.raises(UserError, match="at least one character"):
            CopyIndex.of(texts)
    with pytest.raises(UserError, match="training text is empty"):
        CopyIndex(np.array([], dtype=np.uint8), CharTokenizer("ab"))
    for thresholds in ((), (20, 0)):
        with pytest.raises(UserError, match="thresholds"):
            measure_novelty("abc", CopyIndex.of("abc"), thresholds=thresholds)


def test_a_missing_library_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydivsufsort", None)
    with pytest.raises(UserError, match=r"pydivsufsort.*pip install 'chargpt\[novelty\]'"):
        CopyIndex.of("abc")


# --- the table


def table_of(samples: str | list[str], training: str | list[str], held_out: str = "") -> str:
    return novelty_table(measure_novelty(samples, CopyIndex.of(training), held_out))


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
    alone = table_of("one", training)
    assert "unseen" not in alone


def test_the_table_names_the_document_where_there_are_several() -> None:
    table = table_of(["anna", "mia", "berta"], ["emma", "anna\nberta"], held_out="anna")
    assert "5  sample 3 at 0 = document 2, line 2: berta" in table
    assert "whole documents" in table
    assert table_of("king", "king, king and king").count("line 1 and 2 more: king") == 1


def test_what_a_terminal_could_act_on_is_escaped() -> None:
    """Escape sequences, a bell, a carriage return, C1 codes, reversed text, an odd line end."""
    nasty = "a\x1b[2J\x07\r\x9b\u202e\u2028\x7f\ud800\tb\nc"
    table = table_of(nasty, nasty)
    assert all(character.isprintable() for line in table.split("\n") for character in line)
    assert r"a\x1b[2J\x07\r\x9b\u202e\u2028\x7f\ud800\tb\nc" in table
    assert "é 一 \U0001f600" in table_of("é 一 \U0001f600", "é 一 \U0001f600")


def test_a_long_copy_is_shown_by_its_start() -> None:
    text = random_text(500, "abc", seed=0)
    last = table_of(text, text).splitlines()
    line = next(line for line in last if "500  sample" in line)
    assert line.endswith(text[:60] + "…")
    assert max(map(len, table_of("\n" * 500, "\n" * 500).splitlines()[:-1])) < 120


# --- the verdict


def verdict(share: float, usual: float | None, **changes: object) -> str:
    def of(share: float, **changes: object) -> Overlap:
        fields = {"n_characters": 10_000, "longest_text": 500, "shares": (1.0, share, 0.0)}
        return Overlap(**{**fields, "mean": 9.0, "median": 8.0, "longest": 60, "whole": None,
                          **changes})  # type: ignore[arg-type]  # fmt: skip

    return Novelty(
        thresholds=(20, 40, 80),
        samples=of(share, **changes),
        held_out=None if usual is None else of(usual),
        copies=(),
    ).verdict


def test_the_verdict_says_what_the_figures_mean() -> None:
    fact = (
        "31.0% of the text stands word for word in the training text in stretches of 40 "
        "characters or more"
    )
    assert verdict(0.31, None) == f"{fact}."
    beside = f"{fact}; of real unseen text 2.0% does: the model "
    assert verdict(0.31, 0.02) == f"{beside}recites its training text."
    assert verdict(0.05, 0.02).endswith("copies somewhat more than real text does.")
    assert verdict(0.31, 0.31).endswith("copies no more than real text does.")
    assert verdict(0.0, 0.0).endswith("copies no more than real text does.")


def test_the_verdict_says_what_it_cannot_say() -> None:
    assert "rough: the samples have 1,234 characters" in verdict(0.3, 0.0, n_characters=1234)
    assert "rough" not in verdict(0.3, 0.0)
    short = verdict(0.0, 0.0, longest_text=12)
    assert short == "No sample is as long as the 40 characters from which on copies count."
    whole = verdict(0.0, 0.0, longest_text=12, whole=0.25)
    assert whole.endswith("25.0% of the samples are whole documents of the training text.")
    novelty = measure_novelty(["anna", "mia"], CopyIndex.of(["anna", "emma"]), ["ida", "emma"])
    assert "50.0% of the samples are whole documents" in novelty.verdict
    assert "of the unseen documents 50.0% are." in novelty.verdict


# --- of a run


@pytest.fixture
def corpus(text_file: Path) -> Corpus:
    return load_corpus([str(text_file)])


def test_a_run_is_measured_against_its_own_text(
    result: TrainResult, text_file: Path, corpus: Corpus
) -> None:
    text = text_file.read_text(encoding="utf-8")
    cut = len(corpus.train)
    novelty = novelty_of_run(result.run, samples=[text[100:300]])
    assert novelty.samples.shares == (1.0, 1.0, 1.0)
    assert novelty.copies[0].place.offset <= 100  # the text repeats itself
    assert novelty.held_out is not None
    assert novelty.held_out.n_characters == 3000 - cut
    pieces = [text[i : i + 200] for i in range(cut, 3000, 200)]
    assert novelty.held_out == overlap(pieces, CopyIndex.of(text[:cut]))
    # What only the validation part has is new.
    validation = novelty_of_run(result.run, samples=text[cut:], held_out_characters=0)
    assert validation.samples == overlap(text[cut:], CopyIndex.of(text[:cut]))
    assert validation.samples.longest < 3000 - cut
    assert validation.held_out is None


def test_samples_of_a_file_are_those_given(result: TrainResult, tmp_path: Path) -> None:
    """As `chargpt sample` writes them: a header each, if there are several, and a line end."""
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


def test_a_file_is_cut_at_the_runs_document_separator(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(b"emma\n\nanna\n")
    assert module._read_samples(str(file), "utf-8", "\n") == ["emma", "anna"]
    assert module._read_samples(str(file), "utf-8", "") == ["emma\n\nanna"]


def test_missing_and_empty_and_binary_samples_are_named(
    result: TrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "none.txt"
    with pytest.raises(UserError, match=r"there is no file .*none\.txt"):
        novelty_of_run(result.run, file)
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"none\.txt is empty"):
        novelty_of_run(result.run, file)
    file.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"none\.txt: byte 0xe9 at offset 3"):
        novelty_of_run(result.run, file)
    assert novelty_of_run(result.run, file, encoding="latin-1").samples.n_characters == 4
    file.write_bytes(b"\n")
    for call in ({"samples_file": file}, {}, {"samples": ["", ""]}):
        with pytest.raises(UserError, match="no samples: give"):
            novelty_of_run(result.run, **call)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="held_out_characters is -1"):
        novelty_of_run(result.run, samples="a", held_out_characters=-1)


def test_a_text_that_has_gone_or_changed_is_named(
    result: TrainResult, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*arguments: object) -> Corpus:
        raise UserError("hearts.txt: no such file")

    def changed(*arguments: object) -> Corpus:
        return replace(corpus, sha256="0")

    for load in (gone, changed):
        monkeypatch.setattr("chargpt.measure.scorecard.load_corpus", load)
        with pytest.raises(UserError, match=r"hearts\.txt.*: novelty needs the text") as caught:
            novelty_of_run(result.run, samples="a")
        assert "evaluate" not in str(caught.value)


def corpus_of(train: str, validation: list[str]) -> Corpus:
    tokenizer = CharTokenizer.fit([train, *validation], end_of_text=len(validation) > 1)
    end = tokenizer.end_of_text_id
    ids = [[*tokenizer.encode(text), *([] if end is None else [end])] for text in validation]
    return Corpus(
        tokenizer=tokenizer,
        train=tokenizer.encode(train),
        validation=np.concatenate(ids).astype(tokenizer.dtype),
        sources=(),
        sha256="",
        boundaries="",
        n_characters=0,
        n_documents=len(validation),
    )


def test_held_out_text_is_taken_evenly_from_all_of_the_split() -> None:
    text = random_text(10_000, "abcdefgh", seed=0)
    corpus = corpus_of("a", [text])
    assert module._held_out_pieces(corpus, 10_000, 3000) == [
        text[:3000], text[3000:6000], text[6000:9000], text[9000:]
    ]  # fmt: skip
    pieces = module._held_out_pieces(corpus, 1000, 100)
    assert pieces == [text[i : i + 100] for i in range(0, 10_000, 1000)]
    assert module._held_out_pieces(corpus, 50, 100) == [text[:50]]
    assert module._held_out_pieces(corpus, 0, 100) == []


def test_held_out_documents_stay_whole() -> None:
    rng = random.Random(0)
    documents = ["".join(rng.choices("abc", k=rng.randrange(1, 9))) for _ in range(500)]
    corpus = corpus_of("abc", documents)
    assert module._held_out_pieces(corpus, 100_000, 100) == documents
    pieces = module._held_out_pieces(corpus, 300, 100)
    assert set(pieces) <= set(documents)
    assert 250 <= sum(map(len, pieces)) <= 300
    long = corpus_of("abc", ["abcabcabca", "bc"])
    assert module._held_out_pieces(long, 100, 4) == ["abca", "bcab", "ca", "bc"]


def test_a_copy_is_a_plain_record() -> None:
    """What the command line prints as JSON."""
    (copy,) = measure_novelty("?king", CopyIndex.of("a\nking")).copies
    assert copy == Copy(text="king", sample=0, offset=1, place=Place(0, 2, 2, 1))
