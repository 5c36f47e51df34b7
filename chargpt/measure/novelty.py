"""How much of a text stands word for word in the training text, and where.

A small model that trains for long on a small text memorises it, and its loss does not show that.
This module counts the copies, beside those in real text that the model has not seen: people repeat
themselves, too.
"""

from __future__ import annotations

import importlib
import os
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
from chargpt.data.byte_tokenizer import ByteTokenizer
from chargpt.data.decoding import read_text
from chargpt.data.documents import split_documents
from chargpt.data.texts import find_sources
from chargpt.data.tokenizer import CharTokenizer
from chargpt.measure.scorecard import training_corpus
from chargpt.runs.folder import read_config

THRESHOLDS = (20, 40, 80)
NEEDS_TEXT = "novelty needs the text that the run was trained on"
_EXCERPT = 60  # characters of a copy that the table shows
_ROUGH = 5000  # with fewer characters, a single copy changes the shares by percents
_LEAST_PIECE = 100  # characters per piece of held-out text, however short the samples are
_HEADER = re.compile(r"^--- sample \d+\n", re.MULTILINE)  # `chargpt sample` writes these

_Ints = npt.NDArray[np.integer[Any]]


# --- finding copies


class TrainingText(NamedTuple):
    """The text that copies may come from."""

    ids: _Ints  # (n,); end-of-text ends a document
    tokenizer: CharTokenizer

    @classmethod
    def of(cls, texts: str | Sequence[str]) -> Self:
        """Encode one text or several documents; UserError if there are no characters."""
        documents = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = CharTokenizer.fit(documents, end_of_text=len(documents) > 1)
        ids, end = tokenizer.encode("".join(documents)), tokenizer.end_of_text_id
        if end is not None:
            ids = np.insert(ids, np.cumsum([*map(len, documents)]), end)
        return cls(ids, tokenizer)


class Place(NamedTuple):
    """Where a copy first stands in the training text."""

    document: int  # from 0
    offset: int  # characters from the start of the document
    line: int  # of the document, from 1
    occurrences: int  # how often the training text contains the copy


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
        self._tokens = np.concatenate(
            [np.array(part, dtype=dtype) for part in (lead, ids, [border], encoded)]
        )
        self._n_training = len(lead) + len(ids) + 1
        self._starts = self._n_training + np.cumsum([0, *(len(text) + 1 for text in texts)])
        try:
            divsufsort = importlib.import_module("pydivsufsort").divsufsort
        except ImportError as error:
            raise UserError(
                "novelty needs pydivsufsort, which is not installed: pip install 'chargpt[novelty]'"
            ) from error
        self._suffixes: _Ints = divsufsort(self._tokens)  # starts of the sorted suffixes
        before, after = self._neighbours()
        lengths = np.maximum(self._common_prefixes(before), self._common_prefixes(after))
        pieces = np.split(lengths, self._starts[1:-1] - self._n_training)
        self.lengths = [piece[:-1] for piece in pieces]

    def _neighbours(self) -> tuple[_Ints, _Ints]:
        """Return the training suffix just before and just after each of the texts', (m,).

        At the ends it is the border, which shares no character with any text.
        """
        border = self._n_training - 1
        ranks = np.flatnonzero(self._suffixes >= self._n_training)
        # They stand in runs, each between two training suffixes.
        starts = np.diff(ranks, prepend=-2) > 1
        ends = np.append(starts[1:], True)
        first, last, size = ranks[starts] - 1, ranks[ends] + 1, len(self._suffixes)
        left = np.where(first < 0, border, self._suffixes[first])
        right = np.where(last == size, border, self._suffixes[last % size])
        run, where = np.cumsum(starts) - 1, self._suffixes[ranks] - self._n_training
        before, after = np.empty_like(where), np.empty_like(where)
        before[where], after[where] = left[run], right[run]
        return before, after

    def _common_prefixes(self, neighbours: _Ints) -> npt.NDArray[np.int64]:
        """Return the length of the common prefix of each suffix and its neighbour, (m,)."""
        tokens, lengths, length = self._tokens.data, [], 0
        for position, neighbour in enumerate(neighbours.tolist(), start=self._n_training):
            length = max(length - 1, 0)
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
        lines = np.count_nonzero(self._tokens[begin:first] == self._id_of.get("\n", -1))
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


# --- the measure


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """How much some texts share with the training text."""

    n_characters: int
    longest_text: int  # in characters: no copy is longer
    shares: tuple[float, ...]
    """For each threshold, the share of characters that lie in a copy of at least that length."""
    mean: float  # length of the longest copy that begins at a character, over all characters
    median: float
    longest: int  # in characters
    whole: float | None
    """Share of the texts that are a whole training document; None: there is only one document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A part of a sample that stands in the training text and cannot be extended."""

    text: str
    sample: int  # from 0
    offset: int  # characters from the start of the sample
    place: Place


@dataclass(frozen=True, kw_only=True, slots=True)
class Novelty:
    """What samples share with the training text, and what real text shares with it."""

    thresholds: tuple[int, ...]  # lengths from which a copy counts, in characters
    samples: Overlap
    held_out: Overlap | None
    """The same for real text that was not trained on; None: no such text was given."""
    copies: tuple[Copy, ...]
    """The longest copies, longest first; no two overlap or have the same text."""

    @property
    def verdict(self) -> str:
        """What the figures mean, in one line."""
        ours, real, middle = self.samples, self.held_out, len(self.thresholds) // 2
        share, length = ours.shares[middle], self.thresholds[middle]
        line = (
            f"{share:.1%} of the text stands word for word in the training text in stretches of "
            f"{length} characters or more"
        )
        if ours.longest_text < length:
            line = f"Every sample is shorter than {length} characters, the least that counts"
        elif real:
            usual = real.shares[middle]
            line += f"; of real unseen text {usual:.1%} does: the model {_judge(share, usual)}"
        if ours.whole is not None:
            line += f". {ours.whole:.1%} of the samples are whole documents of the training text"
            if real and real.whole is not None:
                line += f"; of the unseen documents {real.whole:.1%} are"
        if ours.n_characters < _ROUGH:
            line += f". This is a rough figure: the samples have {ours.n_characters:,} characters"
        return f"{line}."


def _judge(share: float, usual: float) -> str:
    # Our own limits, wide enough that a few chance copies do not matter.
    if share <= usual + 0.01:
        return "copies no more than real text does"
    if share <= 2 * usual + 0.05:
        return "copies somewhat more than real text does"
    return "recites its training text"


def measure_novelty(
    samples: str | Sequence[str],
    training: TrainingText,
    held_out: str | Sequence[str] = (),
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    n_copies: int = 5,
) -> Novelty:
    """Measure how much of a model's samples is copied from the text that it was trained on.

    `held_out` is real text of the same kind that the model was not trained on, for comparison. A
    copy ends where its text ends, so these should be about as long as the samples. `thresholds` are
    lengths from which a copy counts, in characters; `n_copies` of the longest are returned.

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
    of_real = range(len(texts), len(texts) + len(real))
    return Novelty(
        thresholds=tuple(thresholds),
        samples=_overlap(finder, range(len(texts)), thresholds),
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
    """Return the figures, the longest copies (a line each) and the verdict for a terminal."""
    columns = [novelty.samples] + ([novelty.held_out] if novelty.held_out else [])
    several = novelty.samples.whole is not None
    rows = [
        ("", ["samples", "unseen text"][: len(columns)]),
        ("characters", [f"{column.n_characters:,}" for column in columns]),
    ]
    for least, *shares in zip(novelty.thresholds, *(c.shares for c in columns), strict=True):
        rows.append((f"in copies of {least} or more", [f"{share:.1%}" for share in shares]))
    if several:
        rows.append(("whole documents", [f"{column.whole:.1%}" for column in columns]))
    rows.append(("mean copy", [f"{column.mean:.1f}" for column in columns]))
    rows.append(("median copy", [f"{column.median:.1f}" for column in columns]))
    rows.append(("longest copy", [f"{column.longest:,}" for column in columns]))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows]
    if novelty.copies:
        lines += ["", "the longest copies, in characters"]
    for copy in novelty.copies:
        size, place = f"{len(copy.text):,}", copy.place
        there = f"document {place.document + 1:,}, " if several else ""
        more = f" and {place.occurrences - 1:,} more" if place.occurrences > 1 else ""
        lines.append(
            f"  {size:>{len(f'{novelty.samples.longest:,}')}}  sample {copy.sample + 1:,} at "
            f"{copy.offset:,} = {there}line {place.line:,}{more}: {_excerpt(copy.text)}"
        )
    return "\n".join([*lines, "", novelty.verdict])


def _excerpt(text: str) -> str:
    """Return the start of a text on one line, with control characters escaped."""
    shown = visible(text[: _EXCERPT + 1]).replace("\n", r"\n").replace("\t", r"\t")
    return shown[:_EXCERPT] + ("…" if len(shown) > _EXCERPT else "")


# --- of a run


def novelty_of_run(
    run: str | Path,
    samples_file: str | Path | None = None,
    *,
    samples: str | Sequence[str] = (),
    encoding: str = "utf-8",
    held_out_characters: int = 100_000,
    report: Callable[[str], None] = lambda line: None,
) -> Novelty:
    """Measure how much a trained model copies from the text that it was trained on.

    The run's config.json names that text, which is opened and read. At most `held_out_characters`
    of its validation part, evenly from all of it, serve for comparison, in pieces about as long as
    the samples; 0: no comparison. `report` prints which files are read.

    What the model wrote are the `samples` and those of a file, perhaps of `chargpt sample`, a
    folder with one file per sample, or ``-`` for standard input. If the run has a document
    separator, it separates samples in a file, too.

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
        raise UserError(f"{error}: {NEEDS_TEXT}") from error
    if isinstance(corpus.tokenizer, ByteTokenizer):
        raise UserError(
            f"the tokens of {run} are bytes: novelty is of characters, train with those"
        )
    _check_memory(len(corpus.train), corpus.tokenizer.vocab_size)
    length = max(sum(map(len, texts)) // len(texts), _LEAST_PIECE)
    validation = TrainingText(corpus.validation, corpus.tokenizer)
    held_out = _held_out_pieces(validation, held_out_characters, length)
    return measure_novelty(texts, TrainingText(corpus.train, corpus.tokenizer), held_out)


def _check_memory(n_tokens: int, vocab_size: int) -> None:
    """Raise a UserError if the computer has too little memory to find copies in a text."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows does not say
        return
    needed = n_tokens * (7 if vocab_size <= 254 else 19 if vocab_size <= 65_534 else 41)
    if n_tokens >= 2**31:
        needed *= 2
    if needed > memory:
        raise UserError(
            f"novelty needs about {needed / 1e9:.0f} GB of memory for {n_tokens:,} characters to "
            f"train on, and this computer has {memory / 1e9:.0f} GB: use a larger one, or a run on "
            "a part of the text"
        )


def _read_samples(file: str, encoding: str, separator: str) -> list[str]:
    """Return the samples of a file; its last line end was added by the writer of the file."""
    return [
        sample
        for source in find_sources([file])
        for part in _HEADER.split(read_text(source, encoding))
        for sample in split_documents(part.removesuffix("\n"), separator)
    ]


def _held_out_pieces(text: TrainingText, n_characters: int, length: int) -> list[str]:
    """Return pieces of at most `length`, evenly from all of a text, `n_characters` in total."""
    if not n_characters:
        return []
    length, end = min(length, n_characters), text.tokenizer.end_of_text_id
    documents = np.split(text.ids, np.flatnonzero(text.ids == end))  # each after its border
    pieces = [
        document[start : start + length]
        for document in (part[part != end] for part in documents)
        for start in range(0, len(document), length)
    ]
    total = sum(map(len, pieces))
    if total > n_characters:
        keep = -(-len(pieces) * n_characters // total)
        pieces = [pieces[i * len(pieces) // keep] for i in range(keep)]
        while sum(map(len, pieces)) > n_characters:
            pieces.pop()
    return [text.tokenizer.decode(piece) for piece in pieces]
