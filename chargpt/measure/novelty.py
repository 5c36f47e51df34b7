"""How much of a text stands word for word in the training text, and where.

A small model that trains for long on a small text memorises it, and its loss does not show that.
This module counts the copies, beside those in real text that the model has not seen: people repeat
themselves, too.
"""

from __future__ import annotations

import importlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.base.terminal import visible
from chargpt.data.corpus import encode_documents, split_documents
from chargpt.data.texts import decode, read_sources
from chargpt.data.tokenizer import CharTokenizer
from chargpt.measure.scorecard import training_corpus
from chargpt.runs.folder import read_config

THRESHOLDS = (20, 40, 80)
_EXCERPT = 60  # characters of a copy that the table shows
_ROUGH = 5000  # with fewer characters, a single copy changes the shares by percents
_LEAST_PIECE = 100  # characters per piece of held-out text, however short the samples are
_HEADER = re.compile(r"^--- sample \d+\n", re.MULTILINE)  # `chargpt sample` writes these

_Ints = npt.NDArray[np.integer[Any]]


# --- finding copies


class TrainingText(NamedTuple):
    """The text that copies may come from."""

    ids: _Ints
    """Token ids, (n,); end-of-text ends a document."""
    tokenizer: CharTokenizer

    @classmethod
    def of(cls, texts: str | Sequence[str]) -> Self:
        """Encode one text or several documents.

        Raises:
            UserError: there are no characters.
        """
        documents = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = CharTokenizer.fit(documents, end_of_text=len(documents) > 1)
        return cls(encode_documents(documents, tokenizer), tokenizer)


class Place(NamedTuple):
    """Where a copy stands in the training text."""

    document: int
    """Document number, from 0."""
    offset: int
    """Characters from the start of the document, from 0."""
    line: int
    """Line of the document, from 1."""
    occurrences: int
    """How often the training text contains the copy; this is the first place."""


class CopyFinder:
    """Finds the longest copy from a training text that begins at each character of some texts.

    One suffix array holds the suffixes of both (Manber & Myers 1993, "Suffix arrays: a new method
    for on-line string searches"). The longest copy at a character is its common prefix with the
    nearest training suffix before or after it in that order. The common prefix at the next
    character is at most one shorter (Kasai et al. 2001, "Linear-time longest-common-prefix
    computation"), so that m characters take O(m) comparisons after the sort. Copies cross neither
    the border of a training document nor that of a text.

    Memory, beside the training ids: 5 bytes per character, 6 while it is built; with more than 254
    distinct tokens 8 and 17, with more than 65,536 8 and 37. From 2³¹ bytes of ids on, positions
    take 8 bytes instead of 4.

    Args:
        training: at least one token.
        texts: where to look for copies.

    Raises:
        UserError: the training text is empty, or the package pydivsufsort is not installed.
    """

    lengths: list[npt.NDArray[np.int64]]
    """For each text, (len(text),): the length of the longest copy that begins at each character,
    0 where the training text lacks the character. Chang & Lawler 1994 ("Sublinear approximate
    string matching and biological applications") call them matching statistics."""

    def __init__(self, training: TrainingText, texts: Sequence[str]) -> None:
        ids, tokenizer = training
        if not len(ids):
            raise UserError("the training text is empty: give at least one character")
        self.end_id = tokenizer.end_of_text_id
        self._id_of = {character: i for i, character in enumerate(tokenizer.characters)}
        # Two more ids, which match nothing: one ends the training text, the other ends each text
        # and stands for characters that the training text lacks.
        border, other = tokenizer.vocab_size, tokenizer.vocab_size + 1
        dtype = np.uint8 if other < 256 else np.uint32
        # End-of-text before the first document, so that each document stands between two.
        lead = [] if self.end_id is None else [self.end_id]
        encoded = [self._id_of.get(c, other) for text in texts for c in (*text, "")]
        parts = (np.array(part, dtype=dtype) for part in (lead, ids, [border], encoded))
        self._tokens = np.concatenate(list(parts))
        self._n_training = len(lead) + len(ids) + 1
        self._starts = self._n_training + np.cumsum([0, *(len(text) + 1 for text in texts)])
        self._suffixes = _suffix_array(self._tokens)
        before, after = self._neighbours()
        lengths = np.maximum(self._common_prefixes(before), self._common_prefixes(after))
        pieces = np.split(lengths, self._starts[1:-1] - self._n_training)
        self.lengths = [piece[:-1] for piece in pieces]

    def _neighbours(self) -> tuple[_Ints, _Ints]:
        """Return the training suffixes just before and just after each suffix of the texts.

        Two arrays in the order of the texts, (m,); −1 for no such suffix.
        """
        ranks = np.flatnonzero(self._suffixes >= self._n_training)
        # They stand in runs, each between two training suffixes.
        starts = np.diff(ranks, prepend=-2) > 1
        ends = np.append(starts[1:], True)
        first, last, size = ranks[starts] - 1, ranks[ends] + 1, len(self._suffixes)
        left = np.where(first < 0, -1, self._suffixes[first])
        right = np.where(last == size, -1, self._suffixes[last % size])
        run, where = np.cumsum(starts) - 1, self._suffixes[ranks] - self._n_training
        before, after = np.empty_like(where), np.empty_like(where)
        before[where], after[where] = left[run], right[run]
        return before, after

    def _common_prefixes(self, neighbours: _Ints) -> npt.NDArray[np.int64]:
        """Return the length of the common prefix of each suffix and its neighbour, (m,)."""
        tokens, lengths, length = self._tokens.data, [], 0
        for position, neighbour in enumerate(neighbours.tolist(), start=self._n_training):
            length = max(length - 1, 0) if neighbour >= 0 else 0
            if neighbour >= 0:
                while tokens[neighbour + length] == tokens[position + length]:
                    length += 1
            lengths.append(length)
        return np.array(lengths, dtype=np.int64)

    def place(self, text: int, offset: int, length: int) -> Place:
        """Return where the training text has the copy of `length` that begins at a character."""
        start = int(self._starts[text]) + offset
        places = self._occurrences(self._tokens[start : start + length])
        first, document, begin = int(places.min()), 0, 0
        if self.end_id is not None:
            borders = np.flatnonzero(self._tokens[:first] == self.end_id)
            document, begin = len(borders) - 1, int(borders[-1]) + 1
        newline = self._id_of.get("\n", -1)
        lines = np.count_nonzero(self._tokens[begin:first] == newline)
        return Place(document, first - begin, int(lines) + 1, len(places))

    def is_document(self, text: int) -> bool:
        """Return whether a text is a whole document of the training text."""
        start, size = int(self._starts[text]), len(self.lengths[text])
        if self.end_id is None or not size or self.lengths[text][0] < size:
            return False
        end = np.array([self.end_id], dtype=self._tokens.dtype)
        whole = np.concatenate([end, self._tokens[start : start + size], end])
        return len(self._occurrences(whole)) > 0

    def _occurrences(self, tokens: _Ints) -> _Ints:
        """Return where the training text has some tokens, in no order."""
        size, order = len(tokens), tokens.dtype.newbyteorder(">")  # whose bytes sort as the numbers

        def begin(suffix: int) -> bytes:
            return self._tokens[suffix : suffix + size].astype(order).tobytes()

        wanted = tokens.astype(order).tobytes()
        first = bisect_left(self._suffixes, wanted, key=begin)
        last = bisect_right(self._suffixes, wanted, lo=first, key=begin)
        found = self._suffixes[first:last]
        return found[found < self._n_training]


def _suffix_array(ids: _Ints) -> _Ints:
    """Return the starts of the suffixes of `ids` in sorted order, (n,), int32 or int64."""
    try:
        library = importlib.import_module("pydivsufsort")
    except ImportError as error:
        raise UserError(
            "novelty needs pydivsufsort, which is not installed: pip install 'chargpt[novelty]'"
        ) from error
    suffixes: _Ints = library.divsufsort(ids)
    return suffixes


# --- the measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How much some texts share with the training text."""

    n_characters: int
    longest_text: int
    """Characters of the longest text: no copy is longer."""
    shares: tuple[float, ...]
    """For each threshold, the share of characters that lie in a copy of at least that length."""
    mean: float
    """Mean length of the longest copy that begins at a character, over all characters."""
    median: float
    longest: int
    """Characters of the longest copy."""
    whole: float | None
    """Share of the texts that are a whole training document; None: there is only one document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A part of a sample that stands in the training text and cannot be extended."""

    text: str
    sample: int
    """Sample number, from 0."""
    offset: int
    """Start in the sample, in characters from 0."""
    place: Place
    """Where it stands in the training text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Novelty:
    """What samples share with the training text, and what real text shares with it."""

    thresholds: tuple[int, ...]
    """Lengths from which a copy counts, in characters."""
    samples: Overlap
    held_out: Overlap | None
    """The same for real text that was not trained on; None: no such text was given."""
    copies: tuple[Copy, ...]
    """The longest copies, longest first; no two overlap or have the same text."""

    @property
    def verdict(self) -> str:
        """What the figures mean, in one line."""
        sentences = [*self._verdict_on_stretches(), *self._verdict_on_documents()]
        if self.samples.n_characters < _ROUGH:
            sentences.append(
                f"This is a rough figure: the samples have {self.samples.n_characters:,} "
                "characters."
            )
        return " ".join(sentences)

    def _verdict_on_stretches(self) -> list[str]:
        middle = len(self.thresholds) // 2
        share, length = self.samples.shares[middle], self.thresholds[middle]
        if self.samples.longest_text < length:
            return [f"Every sample is shorter than {length} characters, the least that counts."]
        fact = (
            f"{share:.1%} of the text stands word for word in the training text in stretches of "
            f"{length} characters or more"
        )
        if self.held_out is None:
            return [f"{fact}."]
        usual = self.held_out.shares[middle]
        return [f"{fact}; of real unseen text {usual:.1%} does: {_judge(share, usual)}."]

    def _verdict_on_documents(self) -> list[str]:
        if self.samples.whole is None:
            return []
        fact = f"{self.samples.whole:.1%} of the samples are whole documents of the training text"
        if self.held_out is None or self.held_out.whole is None:
            return [f"{fact}."]
        return [f"{fact}; of the unseen documents {self.held_out.whole:.1%} are."]


def _judge(share: float, usual: float) -> str:
    """Describe a share; our own limits, wide enough that a few chance copies do not matter."""
    if share <= usual + 0.01:
        return "the model copies no more than real text does"
    if share <= 2 * usual + 0.05:
        return "the model copies somewhat more than real text does"
    return "the model recites its training text"


def measure_novelty(
    samples: str | Sequence[str],
    training: TrainingText,
    held_out: str | Sequence[str] = (),
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    n_copies: int = 5,
) -> Novelty:
    """Measure how much of some samples is copied from the training text.

    A copy ends where its sample ends, so short samples have short copies. For a fair comparison the
    held-out texts should be about as long as the samples.

    Args:
        samples: what a model wrote.
        training: the text that the model was trained on.
        held_out: real text of the same kind that the model was not trained on, for comparison.
        thresholds: lengths from which a copy counts, in characters.
        n_copies: how many of the longest copies to return.

    Raises:
        UserError: the samples or the training text have no characters, a threshold is below 1, or
            the package pydivsufsort is not installed.
    """
    texts = [samples] if isinstance(samples, str) else list(samples)
    real = [held_out] if isinstance(held_out, str) else list(held_out)
    if not any(texts):
        raise UserError("the samples are empty: give at least one character")
    if not thresholds or min(thresholds) < 1:
        raise UserError(f"thresholds are {tuple(thresholds)}: give one or more, each at least 1")
    finder = CopyFinder(training, [*texts, *real])
    of_samples, of_real = range(len(texts)), range(len(texts), len(texts) + len(real))
    return Novelty(
        thresholds=tuple(thresholds),
        samples=_overlap(finder, of_samples, thresholds),
        held_out=_overlap(finder, of_real, thresholds) if any(real) else None,
        copies=_longest_copies(texts, finder, n_copies),
    )


def _overlap(finder: CopyFinder, texts: Sequence[int], thresholds: Sequence[int]) -> Overlap:
    pieces = [finder.lengths[text] for text in texts]
    lengths = np.concatenate(pieces)  # a copy ends within its text, so that they can be joined
    whole = None
    if finder.end_id is not None:
        whole = sum(map(finder.is_document, texts)) / sum(len(piece) > 0 for piece in pieces)
    return Overlap(
        n_characters=len(lengths),
        longest_text=max(map(len, pieces)),
        shares=tuple(_n_copied(lengths, least) / len(lengths) for least in thresholds),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        whole=whole,
    )


def _n_copied(lengths: _Ints, least: int) -> int:
    """Return how many characters lie in a copy of `least` or more."""
    starts = np.flatnonzero(lengths >= least)
    opened = np.zeros(len(lengths) + 1, dtype=np.int64)
    opened[starts] = 1
    opened -= np.bincount(starts + lengths[starts], minlength=len(opened))
    return int(np.count_nonzero(np.cumsum(opened)))


def _longest_copies(texts: Sequence[str], finder: CopyFinder, n_copies: int) -> tuple[Copy, ...]:
    lengths = np.concatenate(finder.lengths[: len(texts)])
    starts = np.cumsum([0, *map(len, texts)])
    # A copy one shorter than that of the character before is the rest of that copy.
    begins = np.flatnonzero((lengths > 0) & (lengths >= np.append(0, lengths[:-1])))
    copies: dict[str, Copy] = {}
    taken: list[tuple[int, int]] = []
    for at in begins[np.argsort(-lengths[begins], kind="stable")].tolist():
        if len(copies) >= n_copies:
            break
        size = int(lengths[at])
        if any(at < end and start < at + size for start, end in taken):
            continue
        taken.append((at, at + size))
        sample = int(np.searchsorted(starts, at, side="right")) - 1
        offset = at - int(starts[sample])
        text = texts[sample][offset : offset + size]
        if text not in copies:
            place = finder.place(sample, offset, size)
            copies[text] = Copy(text=text, sample=sample, offset=offset, place=place)
    return tuple(copies.values())


# --- the table


def novelty_table(novelty: Novelty) -> str:
    """Return the figures, the longest copies and the verdict as text for a terminal.

    Each copy is shown on one line, with control characters escaped.
    """
    columns = [novelty.samples] + ([novelty.held_out] if novelty.held_out else [])
    rows = [("", ["samples", "unseen text"][: len(columns)])]
    rows.append(("characters", [f"{column.n_characters:,}" for column in columns]))
    for i, least in enumerate(novelty.thresholds):
        shares = [f"{column.shares[i]:.1%}" for column in columns]
        rows.append((f"in copies of {least} or more", shares))
    whole = [column.whole for column in columns if column.whole is not None]
    if whole:
        rows.append(("whole documents", [f"{share:.1%}" for share in whole]))
    rows.append(("mean copy", [f"{column.mean:.1f}" for column in columns]))
    rows.append(("median copy", [f"{column.median:.1f}" for column in columns]))
    rows.append(("longest copy", [f"{column.longest:,}" for column in columns]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows]
    if novelty.copies:
        lines += ["", "the longest copies, in characters", *_copy_lines(novelty)]
    return "\n".join([*lines, "", novelty.verdict])


def _copy_lines(novelty: Novelty) -> list[str]:
    several = novelty.samples.whole is not None
    width = len(f"{len(novelty.copies[0].text):,}")
    lines = []
    for copy in novelty.copies:
        document, _, line, n = copy.place
        here = f"sample {copy.sample + 1:,} at {copy.offset:,}"
        there = (f"document {document + 1:,}, " if several else "") + f"line {line:,}"
        there += f" and {n - 1:,} more" if n > 1 else ""
        excerpt = _excerpt(copy.text)
        lines.append(f"  {len(copy.text):>{width},}  {here} = {there}: {excerpt}")
    return lines


def _excerpt(text: str) -> str:
    """Return the start of a text on one line, with control characters escaped."""
    shown = visible(text[:_EXCERPT]).replace("\n", r"\n").replace("\t", r"\t")
    return shown[:_EXCERPT] + ("…" if len(shown) > _EXCERPT or len(text) > _EXCERPT else "")


# --- of a run


def novelty_of_run(
    run: str | Path,
    samples_file: str | Path | None = None,
    *,
    samples: str | Sequence[str] = (),
    encoding: str = "utf-8",
    held_out_characters: int = 100_000,
    thresholds: Sequence[int] = THRESHOLDS,
    n_copies: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> Novelty:
    """Measure how much a trained model copies from the text that it was trained on.

    The validation part of that text serves for comparison, in pieces about as long as the samples.

    Args:
        run: the run folder. Its config.json names the text, which is opened and read.
        samples_file: what the model wrote: a file, perhaps of `chargpt sample`, a folder with one
            file per sample, or ``-`` for standard input. If the run has a document separator, it
            separates samples, too.
        samples: what the model wrote, in addition to the file.
        encoding: encoding of the file.
        held_out_characters: at most this many characters of the validation part, evenly from all
            of it; 0: no comparison.
        thresholds: lengths from which a copy counts, in characters.
        n_copies: how many of the longest copies to return.
        report: prints which files of the training text are read.

    Raises:
        UserError: no such run, its text is missing or has changed, the samples are missing or
            empty, or the package pydivsufsort is not installed.
    """
    if held_out_characters < 0:
        raise UserError(f"held_out_characters is {held_out_characters}: give 0 or more")
    config = read_config(Path(run))
    texts = [samples] if isinstance(samples, str) else list(samples)
    if samples_file is not None:
        texts += _read_samples(str(samples_file), encoding, config.data_config.document_separator)
    texts = [text for text in texts if text]
    if not texts:
        raise UserError("there are no samples: give what the model wrote, a file or a text")
    try:
        corpus = training_corpus(config, report)
    except UserError as error:
        remedy = "novelty needs the text that the run was trained on"
        raise UserError(f"{error}: {remedy}") from error
    typical = max(sum(map(len, texts)) // len(texts), _LEAST_PIECE)
    return measure_novelty(
        texts,
        TrainingText(corpus.train, corpus.tokenizer),
        _held_out_pieces(corpus.validation, corpus.tokenizer, held_out_characters, typical),
        thresholds=thresholds,
        n_copies=n_copies,
    )


def _read_samples(file: str, encoding: str, separator: str) -> list[str]:
    """Return the samples of a file; its last line end was added by the writer of the file."""
    return [
        sample
        for raw in read_sources([file])
        for part in _HEADER.split(decode(raw, encoding))
        for sample in split_documents(part.removesuffix("\n"), separator)
    ]


def _held_out_pieces(
    ids: _Ints, tokenizer: CharTokenizer, n_characters: int, length: int
) -> list[str]:
    """Return pieces of at most `length`, evenly from all of `ids`, `n_characters` in total."""
    if not n_characters:
        return []
    length, end = min(length, n_characters), tokenizer.end_of_text_id
    borders = np.flatnonzero(ids == end) if end is not None else np.array([], dtype=np.int64)
    spans = [
        (start, min(start + length, stop))
        for begin, stop in zip([0, *(borders + 1)], [*borders, len(ids)], strict=True)
        for start in range(int(begin), int(stop), length)
    ]
    total = sum(stop - start for start, stop in spans)
    if total > n_characters:
        keep = -(-len(spans) * n_characters // total)
        spans = [spans[i * len(spans) // keep] for i in range(keep)]
        while sum(stop - start for start, stop in spans) > n_characters:
            spans.pop()
    return [tokenizer.decode(ids[start:stop]) for start, stop in spans]
