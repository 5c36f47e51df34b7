"""Is it new? How much of a text stands word for word in the training text, and where.

A small model that is trained long on a small text learns it by heart, and its loss does not say
so. Here the copies are counted, beside those in real text that the model has not seen: people
repeat themselves, too.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.data.corpus import Corpus, encode_documents, split_documents
from chargpt.data.texts import decode, read_sources
from chargpt.data.tokenizer import CharTokenizer
from chargpt.measure.scorecard import training_corpus
from chargpt.runs.folder import RunConfig, read_config

THRESHOLDS = (20, 40, 80)
_CHUNK = 1 << 20  # characters handled at a time where a temporary array would be the largest
_EXCERPT = 60  # characters of a copy that the table shows
_ROUGH = 5000  # characters below which a single copy moves the shares by percents
_LEAST_PIECE = 100  # characters of a piece of held-out text, however short the samples are
_HEADER = re.compile(r"^--- sample \d+\n", re.MULTILINE)  # what `chargpt sample` writes

_Ints = npt.NDArray[np.integer[Any]]


# --- the index


class Place(NamedTuple):
    """Where a copy stands in the training text."""

    document: int
    """Counted from 0, as `CopyIndex` was given them."""
    offset: int
    """In characters from the start of the document, counted from 0."""
    line: int
    """Of the document, counted from 1."""
    occurrences: int
    """How often it stands in the training text; this is the first place."""


class _Matches(NamedTuple):
    """For each character of a text, the longest copy that begins there; shapes (m,)."""

    lengths: _Ints
    first: _Ints
    """The suffixes of the training text that begin with the copy: `first` … `last` − 1, sorted."""
    last: _Ints


class CopyIndex:
    """Finds for each place of a text the longest copy from a training text that begins there.

    That is a suffix array (Manber & Myers 1993, "Suffix arrays: a new method for on-line string
    searches") and its inverse. With both, the suffixes that begin with `ab` are found from those
    that begin with `a` and those that begin with `b` by halving an interval, without a look at the
    text; so copies double in length at each step, and a text of m characters whose longest copy has
    L takes about m · log L · log n steps, however often the text repeats itself.

    Memory, beside the text itself: 9 bytes a character and 10 while it is built; with more than 256
    distinct tokens 12 and 28, with more than 65,536 twice as much while it is built. From 2³¹ bytes
    of ids on, positions take 8 bytes and not 4. A search takes 8 bytes · m · log₂ L.

    Args:
        ids: the training text as token ids, shape (n,); end-of-text ends a document, and no copy
            runs across it.
        tokenizer: gives the characters of the ids.

    Raises:
        UserError: the text is empty, or the package pydivsufsort is not installed.
    """

    def __init__(self, ids: _Ints, tokenizer: CharTokenizer) -> None:
        if not len(ids):
            raise UserError("the training text is empty: give at least one character")
        self.end_id = tokenizer.end_of_text_id
        # One end-of-text more, before the first document, gives all documents the same borders.
        border = np.array([] if self.end_id is None else [self.end_id], dtype=tokenizer.dtype)
        self.ids = np.concatenate([border, ids.astype(tokenizer.dtype, copy=False)])
        self._id_of = {character: i for i, character in enumerate(tokenizer.characters)}
        self._suffixes = _suffix_array(self.ids)
        # The empty suffix is before all others.
        self._ranks = np.full(len(self.ids) + 1, -1, dtype=self._suffixes.dtype)
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        for start in range(0, len(self.ids), _CHUNK):
            piece = self._suffixes[start : start + _CHUNK]
            self._ranks[piece] = np.arange(start, start + len(piece))
            counts += np.bincount(self.ids[start : start + _CHUNK], minlength=len(counts))
        # Suffixes that begin with token i: bounds[i] … bounds[i + 1] − 1.
        self._bounds = np.append(0, np.cumsum(counts)).astype(self._suffixes.dtype)

    @classmethod
    def of(cls, texts: str | Sequence[str]) -> Self:
        """Build the index of a text or of several documents.

        Raises:
            UserError: there is no character, or the package pydivsufsort is not installed.
        """
        documents = [texts] if isinstance(texts, str) else list(texts)
        tokenizer = CharTokenizer.fit(documents, end_of_text=len(documents) > 1)
        return cls(encode_documents(documents, tokenizer), tokenizer)

    def match_lengths(self, text: str) -> npt.NDArray[np.int64]:
        """Return the length of the longest copy that begins at each character, (len(text),).

        These are the "matching statistics" of Chang & Lawler 1994, "Sublinear approximate string
        matching and biological applications". A character that the training text lacks has 0.
        """
        return self._match(self._encode([text])).lengths[:-1].astype(np.int64)

    def find(self, text: str) -> Place | None:
        """Return the first place where the training text has `text`; None: nowhere, or it is ''."""
        lengths, first, last = self._match(self._encode([text]))
        if not text or lengths[0] < len(text):
            return None
        return self._place(int(first[0]), int(last[0]))

    def _encode(self, texts: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the ids of all texts, each followed by −1, which also stands for the unknown."""
        joined = "\0".join([*texts, ""])
        points = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        distinct, inverse = np.unique(points, return_inverse=True)
        known = [self._id_of.get(chr(point), -1) for point in distinct]
        ids = np.array(known, dtype=np.int64)[inverse]
        ids[np.cumsum([len(text) + 1 for text in texts]) - 1] = -1
        return ids

    def _match(self, ids: npt.NDArray[np.int64]) -> _Matches:
        """Return the longest copy from each place of `ids`, (m,), which ends with −1."""
        powers = self._intervals_of_powers(ids)
        lengths = np.zeros(len(ids), dtype=np.int64)
        first = np.zeros(len(ids), dtype=self._bounds.dtype)
        last = np.full(len(ids), len(self.ids), dtype=self._bounds.dtype)
        for power in reversed(range(len(powers))):
            lo, hi = powers[power]
            at = np.arange(len(ids)) + lengths  # where to go on
            here = np.flatnonzero(hi[at] > lo[at])
            after = at[here]
            longer = self._narrow(first[here], last[here], lengths[here], lo[after], hi[after])
            found = longer[1] > longer[0]
            lengths[here[found]] += 1 << power
            first[here[found]], last[here[found]] = longer[0][found], longer[1][found]
        return _Matches(lengths, first, last)

    def _intervals_of_powers(self, ids: npt.NDArray[np.int64]) -> list[tuple[_Ints, _Ints]]:
        """Return, for 1, 2, 4, … tokens from each place, the suffixes that begin with them.

        As `lo` and `hi`, (m,): the suffixes `lo` … `hi` − 1, none where `hi` is not above `lo`. The
        list ends with the last power that any place has a copy of.
        """
        lo, hi = self._bounds[ids], self._bounds[ids + 1]  # n and 0, which is nothing, of −1
        powers = []
        while (hi > lo).any():
            powers.append((lo, hi))
            step = 1 << (len(powers) - 1)
            here = np.flatnonzero((hi[:-step] > lo[:-step]) & (hi[step:] > lo[step:]))
            after, depth = here + step, np.full(len(here), step)
            longer = self._narrow(lo[here], hi[here], depth, lo[after], hi[after])
            lo, hi = np.zeros_like(lo), np.zeros_like(hi)
            lo[here], hi[here] = longer
        return powers

    def _narrow(
        self, lo: _Ints, hi: _Ints, depth: _Ints, then_lo: _Ints, then_hi: _Ints
    ) -> tuple[_Ints, _Ints]:
        """Keep of each interval the suffixes that go on, after `depth` tokens, as another does."""
        first = self._bisect(lo, hi, depth, then_lo)
        return first, self._bisect(first, hi, depth, then_hi)

    def _bisect(self, lo: _Ints, hi: _Ints, depth: _Ints, rank: _Ints) -> _Ints:
        """Return the first suffix of each interval whose rest after `depth` has `rank` or more.

        All suffixes of an interval begin with the same `depth` tokens, so that the order of their
        rests is their own.
        """
        lo, hi = lo.copy(), hi.copy()
        open_ = np.flatnonzero(lo < hi)
        while len(open_):
            middle = lo[open_] + (hi[open_] - lo[open_]) // 2  # a sum could overflow
            below = self._ranks[self._suffixes[middle] + depth[open_]] < rank[open_]
            lo[open_[below]] = middle[below] + 1
            hi[open_[~below]] = middle[~below]
            open_ = open_[lo[open_] < hi[open_]]
        return lo

    def _place(self, first: int, last: int) -> Place:
        """Return where the first of some suffixes stands."""
        at = int(self._suffixes[first:last].min())
        document, start = 0, 0
        if self.end_id is not None:
            borders = np.flatnonzero(self.ids[:at] == self.end_id)
            document, start = len(borders) - 1, int(borders[-1]) + 1
        newline = self._id_of.get("\n", -1)
        lines = np.count_nonzero(self.ids[start:at] == newline)
        return Place(document, at - start, int(lines) + 1, last - first)

    def _are_documents(self, matches: _Matches, starts: _Ints, sizes: _Ints) -> int:
        """Return how many of the texts at `starts` are a whole document of the training text."""
        assert self.end_id is not None
        end_lo, end_hi = self._bounds[self.end_id], self._bounds[self.end_id + 1]
        copied = (matches.lengths[starts] == sizes) & (sizes > 0)
        at, sizes = starts[copied], sizes[copied]
        ends = np.full(len(at), end_lo), np.full(len(at), end_hi)
        begun = self._narrow(*ends, np.ones_like(sizes), matches.first[at], matches.last[at])
        first, last = self._narrow(*begun, sizes + 1, *ends)
        return int(np.count_nonzero(last > first))


def _suffix_array(ids: _Ints) -> _Ints:
    """Return where the suffixes of `ids` start, in their order, (n,), int32 or int64."""
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
    """Characters of the longest of the texts, which no copy exceeds."""
    shares: tuple[float, ...]
    """Of the characters that lie in a copy of at least so many characters, one a threshold."""
    mean: float
    """Of the length of the longest copy that begins at a character, over all characters."""
    median: float
    longest: int
    """The longest copy of all, in characters."""
    whole: float | None
    """Share of the texts that are a whole training document; None: there is only one document."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """A piece of a sample that stands in the training text and cannot be made longer."""

    text: str
    sample: int
    """Which sample, counted from 0."""
    offset: int
    """Where in the sample it begins, in characters from 0."""
    place: Place
    """Where in the training text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Novelty:
    """What samples share with the training text, and what real text does."""

    thresholds: tuple[int, ...]
    """Lengths from which on a copy counts, in characters."""
    samples: Overlap
    held_out: Overlap | None
    """The same of real text that was not trained on; None: none was given."""
    copies: tuple[Copy, ...]
    """The longest, longest first; none overlaps another or has the same text."""

    @property
    def verdict(self) -> str:
        """What the figures mean, in one line."""
        sentences = [*self._verdict_on_stretches(), *self._verdict_on_documents()]
        if self.samples.n_characters < _ROUGH:
            sentences.append(
                f"That is rough: the samples have {self.samples.n_characters:,} characters."
            )
        return " ".join(sentences)

    def _verdict_on_stretches(self) -> list[str]:
        middle = len(self.thresholds) // 2
        share, length = self.samples.shares[middle], self.thresholds[middle]
        if self.samples.longest_text < length:
            return [f"No sample is as long as the {length} characters from which on copies count."]
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
    """Say what a share means; the limits are ours, wide enough for the chance of a few copies."""
    if share <= usual + 0.01:
        return "the model copies no more than real text does"
    if share <= 2 * usual + 0.05:
        return "the model copies somewhat more than real text does"
    return "the model recites its training text"


def measure_novelty(
    samples: str | Sequence[str],
    index: CopyIndex,
    held_out: str | Sequence[str] = (),
    *,
    thresholds: Sequence[int] = THRESHOLDS,
    n_copies: int = 5,
) -> Novelty:
    """Measure how much of some samples is copied from the training text.

    A copy ends where its sample ends, so that short samples have short copies: the yardstick is
    fair if its texts are about as long as the samples.

    Args:
        samples: what a model wrote.
        index: of the text that it was trained on.
        held_out: real text of the same kind that it was not trained on, as the yardstick.
        thresholds: lengths from which on a copy counts, in characters.
        n_copies: how many of the longest copies to show.

    Raises:
        UserError: the samples hold no character, or a threshold is below 1.
    """
    texts = [samples] if isinstance(samples, str) else list(samples)
    real = [held_out] if isinstance(held_out, str) else list(held_out)
    if not any(texts):
        raise UserError("the samples are empty: give at least one character")
    if not thresholds or min(thresholds) < 1:
        raise UserError(f"thresholds are {tuple(thresholds)}: give one or more lengths from 1 on")
    matches = index._match(index._encode(texts))
    yardstick = None
    if any(real):
        yardstick = _overlap(real, index, index._match(index._encode(real)), thresholds)
    return Novelty(
        thresholds=tuple(thresholds),
        samples=_overlap(texts, index, matches, thresholds),
        held_out=yardstick,
        copies=_longest_copies(texts, index, matches, n_copies),
    )


def _starts(texts: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return where each text starts among the ids of all, and where a next one would."""
    return np.cumsum([0, *(len(text) + 1 for text in texts)], dtype=np.int64)


def _overlap(
    texts: Sequence[str], index: CopyIndex, matches: _Matches, thresholds: Sequence[int]
) -> Overlap:
    starts = _starts(texts)
    lengths = np.delete(matches.lengths, starts[1:] - 1)  # of the characters alone
    whole = None
    if index.end_id is not None:
        n_whole = index._are_documents(matches, starts[:-1], np.diff(starts) - 1)
        whole = n_whole / sum(map(bool, texts))
    return Overlap(
        n_characters=len(lengths),
        longest_text=max(map(len, texts)),
        shares=tuple(_n_copied(matches.lengths, least) / len(lengths) for least in thresholds),
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
        whole=whole,
    )


def _n_copied(lengths: _Ints, least: int) -> int:
    """Return how many characters lie in a copy of `least` or more."""
    begins = np.flatnonzero(lengths >= least)
    opened = np.zeros(len(lengths) + 1, dtype=np.int64)
    opened[begins] = 1
    opened -= np.bincount(begins + lengths[begins], minlength=len(opened))
    return int(np.count_nonzero(np.cumsum(opened)))


def _longest_copies(
    texts: Sequence[str], index: CopyIndex, matches: _Matches, n_copies: int
) -> tuple[Copy, ...]:
    lengths, starts = matches.lengths, _starts(texts)
    # A copy that is one shorter than that of the character before is the rest of it.
    begins = np.flatnonzero((lengths > 0) & (lengths >= np.append(0, lengths[:-1])))
    copies: dict[str, Copy] = {}
    taken: list[tuple[int, int]] = []
    for at in begins[np.argsort(-lengths[begins], kind="stable")].tolist():
        if len(copies) >= n_copies:
            break
        end = at + int(lengths[at])
        if any(at < other_end and start < end for start, other_end in taken):
            continue
        taken.append((at, end))
        sample = int(np.searchsorted(starts, at, side="right")) - 1
        offset = at - int(starts[sample])
        text = texts[sample][offset : offset + end - at]
        if text not in copies:
            place = index._place(int(matches.first[at]), int(matches.last[at]))
            copies[text] = Copy(text=text, sample=sample, offset=offset, place=place)
    return tuple(copies.values())


# --- the table


def novelty_table(novelty: Novelty) -> str:
    """Return the figures, the longest copies and the verdict as text for a terminal.

    The copies are shown on one line each; whatever is not printable is escaped.
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
    """Return the start of a text on one line; what a terminal could act on is escaped."""
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text[:_EXCERPT]
    )
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
) -> Novelty:
    """Measure how much a trained model copies from the text that it was trained on.

    The yardstick is the validation part of that text, in pieces about as long as the samples.

    Args:
        run: its run folder.
        samples_file: what it wrote: a file, perhaps of `chargpt sample`, a folder with a
            file a sample, or ``-`` for standard input. If the run has a document separator, it
            separates samples, too.
        samples: what it wrote, if there is no file.
        encoding: of the file.
        held_out_characters: take at most so many characters of the validation part, evenly from all
            of it; 0: no yardstick.
        thresholds: lengths from which on a copy counts, in characters.
        n_copies: how many of the longest copies to show.

    Raises:
        UserError: no such run, its text is gone or has changed, the samples are missing or empty,
            or the package pydivsufsort is not installed.
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
    corpus = _corpus_of(config)
    typical = max(sum(map(len, texts)) // len(texts), _LEAST_PIECE)
    return measure_novelty(
        texts,
        CopyIndex(corpus.train, corpus.tokenizer),
        _held_out_pieces(corpus, held_out_characters, typical),
        thresholds=thresholds,
        n_copies=n_copies,
    )


def _corpus_of(config: RunConfig) -> Corpus:
    """Read the text of a run again."""
    try:
        return training_corpus(config)
    except UserError as error:
        remedy = "novelty needs the text that the run was trained on"
        raise UserError(f"{error}: {remedy}") from error


def _read_samples(file: str, encoding: str, separator: str) -> list[str]:
    """Return the samples of a file; the last line end is not the model's, but of who wrote it."""
    return [
        sample
        for raw in read_sources([file])
        for part in _HEADER.split(decode(raw, encoding))
        for sample in split_documents(part.removesuffix("\n"), separator)
    ]


def _held_out_pieces(corpus: Corpus, n_characters: int, length: int) -> list[str]:
    """Return pieces of at most `length` evenly from the validation part, `n_characters` in all."""
    if not n_characters:
        return []
    length = min(length, n_characters)
    ids, end = corpus.validation, corpus.tokenizer.end_of_text_id
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
    return [corpus.tokenizer.decode(ids[start:stop]) for start, stop in spans]
