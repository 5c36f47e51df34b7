"""A text of any size in two passes: count its characters, then write its token ids.

The first pass finds the vocabulary, and where each unit's ids will stand. So the units of the
second pass are independent: several processes write them, in any order, also after a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import Event
from typing import Any, Self

import numpy as np

from chargpt.base.checks import check_fields, from_dict
from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data import encoding
from chargpt.data.byte_tokenizer import BYTE_MARK, ByteTokenizer, tokenizer_from_json
from chargpt.data.encoding import (
    ByteEncoder,
    Counted,
    Encoder,
    Ids,
    Ints,
    LeftOut,
    ReadAgain,
    Sizes,
    Unit,
)
from chargpt.data.formats import raw_chunks
from chargpt.data.texts import Source
from chargpt.data.tokenizer import REPLACEMENT, CharTokenizer
from chargpt.data.workers import Workers

_CODE_POINTS = 0x110000
_SHOWN = 10  # files or characters in a line


@dataclass(frozen=True, kw_only=True, slots=True)
class TextFacts:
    """What the texts contain. Two corpora with equal facts are equal."""

    sha256: str  # of the bytes of all sources, concatenated
    boundaries: str  # SHA-256 of the documents' lengths
    n_characters: int
    n_documents: int

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodingPlan:
    """What the first pass found out, which is all that the second one needs besides the text."""

    facts: TextFacts
    layout: str  # SHA-256 of the sources' sizes, in order
    tokenizer: CharTokenizer
    mark: str  # see `Encoder`
    streamed: frozenset[str]  # names of sources that cannot be read in ranges
    left_out: frozenset[str]  # names of sources that are not text
    notes: tuple[str, ...]  # lines for the user
    is_open: tuple[bool, ...]  # for each unit: whether a document with characters continues in it
    sizes: tuple[int, ...]  # token ids of each unit

    @property
    def n_tokens(self) -> int:
        """Length of the whole text."""
        return sum(self.sizes)

    @property
    def n_bytes(self) -> int:
        """Size of the token ids of the whole text."""
        return self.places[-1]

    @property
    def places(self) -> list[int]:
        """Where the ids of each unit begin, and where the last one's end, in bytes."""
        itemsize = np.dtype(self.tokenizer.dtype).itemsize
        return [itemsize * n for n in accumulate(self.sizes, initial=0)]

    @property
    def encoder(self) -> Encoder:
        """What writes the ids."""
        if isinstance(self.tokenizer, ByteTokenizer):
            return ByteEncoder(self.tokenizer.byte_ids, self.mark, None)
        ids = self.tokenizer.ids_of_points
        size = max(len(ids), *(ord(c) + 1 for c in self.mark), 128)
        table: Ids = np.zeros(size, dtype=self.tokenizer.dtype)
        table[: len(ids)] = np.maximum(ids, 0)
        if self.mark:
            assert self.tokenizer.end_of_text_id is not None
            table[ord(self.mark)] = self.tokenizer.end_of_text_id
        short = table[:128].astype(np.uint8)
        is_short = bool((short == table[:128]).all())
        return Encoder(table, self.mark, short.tobytes().ljust(256) if is_short else None)

    def units(self, sources: Sequence[Source], config: DataConfig, sizes: Sizes) -> list[Unit]:
        """Return the units of the first pass."""
        kept = [source for source in sources if source.name not in self.left_out]
        return list(encoding.units_of(kept, config, self.streamed, sizes))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "facts": asdict(self.facts),
            "layout": self.layout,
            "tokenizer": self.tokenizer.to_json(),
            "mark": self.mark,
            "streamed": sorted(self.streamed),
            "left_out": sorted(self.left_out),
            "notes": list(self.notes),
            "is_open": list(map(int, self.is_open)),
            "sizes": list(self.sizes),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the plan that `to_dict` gave."""
        return cls(
            facts=from_dict(TextFacts, values["facts"]),
            layout=values["layout"],
            tokenizer=tokenizer_from_json(values["tokenizer"]),
            mark=values["mark"],
            streamed=frozenset(values["streamed"]),
            left_out=frozenset(values["left_out"]),
            notes=tuple(values["notes"]),
            is_open=tuple(map(bool, values["is_open"])),
            sizes=tuple(values["sizes"]),
        )


# --- the first pass


@dataclass(slots=True)
class _Tally:
    """Adds up what the units hold, in their order."""

    counts: Ints = field(default_factory=lambda: np.zeros(_CODE_POINTS, dtype=np.int64))
    n_documents: int = 0
    open_length: int = 0  # of the document that continues
    boundaries: Any = field(default_factory=hashlib.sha256)
    is_open: list[bool] = field(default_factory=list)
    characters: list[int] = field(default_factory=list)  # of each unit
    n_bytes: list[int] = field(default_factory=list)  # of UTF-8
    n_replaced: int = 0
    ended: list[int] = field(default_factory=list)  # documents that end in each unit

    def start_unit(self) -> None:
        self.is_open.append(self.open_length > 0)
        self.characters.append(0)
        self.n_bytes.append(0)
        self.ended.append(0)

    def add(self, counted: Counted) -> None:
        self.counts[counted.points] += counted.counts
        self.n_replaced += counted.n_replaced
        widths = 1 + np.searchsorted((0x80, 0x800, 0x10000), counted.points, side="right")
        self.n_bytes[-1] += int((widths * counted.counts.astype(np.int64)).sum())
        lengths = counted.lengths.astype("<i8")
        self.characters[-1] += int(lengths.sum())
        lengths[0] += self.open_length
        self.open_length = 0 if counted.ends else int(lengths[-1])
        if not counted.ends:
            lengths = lengths[:-1]
        lengths = lengths[lengths > 0]
        self.boundaries.update(lengths.tobytes())
        self.ended[-1] += len(lengths)
        self.n_documents += len(lengths)


def plan_encoding(
    sources: Sequence[Source],
    config: DataConfig,
    characters: Iterable[str],
    *,
    workers: Workers,
    sizes: Sizes,
    advance: Callable[[int], None] = lambda n: None,
) -> EncodingPlan:
    """Read all sources once, and decide how to encode them; `characters` join the vocabulary.

    `advance` is called with the number of bytes that were read.

    Raises:
        UserError: a source cannot be read or decoded, or all of them hold only separators.
    """
    stop = Event()
    with ThreadPoolExecutor(1) as thread:
        digests = thread.submit(_digests, sources, stop)
        try:
            tally, streamed, left_out = _count(sources, config, workers, sizes, advance)
            if not left_out:
                sha256, layout = digests.result()
        finally:
            stop.set()
    if left_out:
        kept = [source for source in sources if source.name not in left_out]
        sha256, layout = _digests(kept, Event())
    if not tally.n_documents:
        names = ", ".join(source.name for source in sources[:3]) + (", …" if sources[3:] else "")
        raise UserError(f"{names} holds only document separators: give some text")
    return _plan(
        tally,
        config,
        {*characters},
        sha256=sha256,
        layout=layout,
        streamed=streamed,
        left_out=left_out,
    )


def _plan(
    tally: _Tally,
    config: DataConfig,
    characters: set[str],
    *,
    sha256: str,
    layout: str,
    streamed: frozenset[str],
    left_out: dict[str, str],
) -> EncodingPlan:
    """Return how to encode what was counted."""
    several = tally.n_documents > 1
    tokenizer = _tokenizer(tally.counts, config, characters, end_of_text=several)
    is_byte = isinstance(tokenizer, ByteTokenizer)
    unused = map(chr, np.flatnonzero(tally.counts == 0))
    mark = BYTE_MARK if is_byte else next(c for c in unused if c not in tokenizer.characters)
    return EncodingPlan(
        facts=TextFacts(
            sha256=sha256,
            boundaries=tally.boundaries.hexdigest(),
            n_characters=int(tally.counts.sum()),
            n_documents=tally.n_documents,
        ),
        layout=layout,
        tokenizer=tokenizer,
        mark=mark if several else "",
        streamed=streamed,
        left_out=frozenset(left_out),
        notes=tuple(_notes(tally, left_out, tokenizer.rare, config)),
        is_open=tuple(tally.is_open),
        sizes=tuple(
            n + several * ended
            for n, ended in zip(
                tally.n_bytes if is_byte else tally.characters, tally.ended, strict=True
            )
        ),
    )


def _tokenizer(
    counts: Ints, config: DataConfig, characters: set[str], *, end_of_text: bool
) -> CharTokenizer:
    """Return the tokenizer of a text, in which code points occur so often."""
    if config.tokenizer == "byte":
        return ByteTokenizer(end_of_text=end_of_text)
    present = {chr(i) for i in np.flatnonzero(counts).tolist()}
    common = {chr(i) for i in np.flatnonzero(counts >= config.min_count).tolist()} | characters
    rare = sorted(present - common - {REPLACEMENT})
    added = {REPLACEMENT} if rare else set()
    return CharTokenizer(common | added, end_of_text=end_of_text, rare="".join(rare))


def _notes(tally: _Tally, left_out: dict[str, str], rare: str, config: DataConfig) -> Iterator[str]:
    """Yield lines about what is not in the text as it was."""
    for reason in list(left_out.values())[:_SHOWN]:
        yield f"left out   {reason.partition(': give')[0]}"
    if len(left_out) > _SHOWN:
        yield f"left out   and {len(left_out) - _SHOWN:,} more files"
    if tally.n_replaced:
        yield f"replaced   {tally.n_replaced:,} wrong byte sequences by U+FFFD"
    if rare:
        n = int(tally.counts[[ord(c) for c in rare]].sum())
        shown = ", ".join(map(repr, rare[:_SHOWN])) + (", …" if len(rare) > _SHOWN else "")
        yield (
            f"rare       {len(rare):,} characters with fewer than {config.min_count} occurrences, "
            f"{n:,} in all, became U+FFFD: {shown}"
        )


def _digests(sources: Sequence[Source], stop: Event) -> tuple[str, str]:
    """Return the SHA-256 of all bytes, and that of the sources' sizes."""
    content, layout = hashlib.sha256(), hashlib.sha256()
    for source in sources:
        n_bytes = 0
        for chunk in raw_chunks(source):
            if stop.is_set():
                return "", ""
            content.update(chunk)
            n_bytes += len(chunk)
        layout.update(f"{n_bytes}\n".encode())
    return content.hexdigest(), layout.hexdigest()


def _count(
    sources: Sequence[Source],
    config: DataConfig,
    workers: Workers,
    sizes: Sizes,
    advance: Callable[[int], None],
) -> tuple[_Tally, frozenset[str], dict[str, str]]:
    """Return the counts, the names of sources that cannot be read in ranges, and what is left out.

    That is why, by name of the source.
    """
    streamed: frozenset[str] = frozenset()
    left_out: dict[str, str] = {}
    while True:
        tally, again, wrong = _Tally(), set[Source](), dict[str, str]()
        units = list(encoding.units_of(sources, config, streamed, sizes))
        jobs = ((unit, config, sizes.chunk) for unit in units)
        for unit, results in zip(units, workers.map(encoding.count, jobs), strict=True):
            tally.start_unit()
            for counted in results:
                if isinstance(counted, LeftOut):
                    wrong[counted.source.name] = counted.reason
                elif isinstance(counted, ReadAgain):
                    if config.on_error != "skip-file":  # else the next round leaves it out
                        encoding.refuse_wrong(counted.source, config)
                    again.add(counted.source)
                else:
                    tally.add(counted)
            advance(unit.n_bytes)
        if not again and not wrong:
            return tally, streamed, left_out
        streamed |= {source.name for source in again}
        left_out |= wrong
        sources = [source for source in sources if source.name not in wrong]
        if not sources:
            raise UserError(next(iter(left_out.values())))


# --- the second pass


def encode_in_memory(
    plan: EncodingPlan, sources: Sequence[Source], config: DataConfig, sizes: Sizes
) -> Ids:
    """Return the token ids of a whole text, (n,).

    Raises:
        UserError: the text has changed since the first pass.
    """
    ids = np.empty(plan.n_tokens, dtype=plan.tokenizer.dtype)
    units = plan.units(sources, config, sizes)
    encoder, place = plan.encoder, 0
    for unit, size, is_open in zip(units, plan.sizes, plan.is_open, strict=True):
        stop = place + size
        for some in encoding.encode(unit, config, sizes.chunk, encoder, is_open):
            if place + len(some) <= stop:
                ids[place : place + len(some)] = some
            place += len(some)
        if place != stop:
            raise UserError(encoding.CHANGED.format(unit.sources[0].name))
    return ids


def encode_in_file(
    path: Path,
    plan: EncodingPlan,
    units: Sequence[Unit],
    *,
    done: Container[int],
    config: DataConfig,
    workers: Workers,
    sizes: Sizes,
) -> Iterator[tuple[int, int]]:
    """Write the token ids of the units that are not `done`; yield each one's number and CRC-32.

    Raises:
        UserError: the text has changed since the first pass.
        OSError: the file cannot be written.
    """
    places, encoder = plan.places, plan.encoder
    todo = [i for i in range(len(units)) if i not in done]
    jobs = (
        (path, places[i], places[i + 1], units[i], config, sizes.chunk, encoder, plan.is_open[i])
        for i in todo
    )
    for number, results in zip(todo, workers.map(encoding.encode_into, jobs), strict=True):
        for checksum in results:
            yield number, checksum
