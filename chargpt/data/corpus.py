"""From texts to a corpus: read, cut into documents, encode, and split."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data.encoding import Sizes
from chargpt.data.formats import standard_input_kept
from chargpt.data.passes import TextFacts, encode_in_memory, plan_encoding
from chargpt.data.store import Entry, Store
from chargpt.data.texts import find_sources
from chargpt.data.tokenizer import CharTokenizer
from chargpt.data.workers import Workers

_BLOCK = 1 << 20  # tokens searched at a time for the end of a document


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text or many documents, encoded and split."""

    tokenizer: CharTokenizer
    train: npt.NDArray[Any]  # token ids, (n,), smallest unsigned type; a large text's are a map
    validation: npt.NDArray[Any]  # token ids, (m,)
    sources: tuple[str, ...]  # as the user named them, to read them again
    facts: TextFacts

    def summary(self) -> str:
        """Return one line about the corpus for the user."""
        n, tokenizer = self.facts.n_documents, self.tokenizer
        documents = f" in {n:,} documents" if n > 1 else ""
        distinct, of = f", {len(tokenizer.characters)} distinct", ""
        if tokenizer.unit != "char":
            distinct, of = "", f" {tokenizer.units}"
        return (
            f"{self.facts.n_characters:,} characters{documents}{distinct}; {len(self.train):,}{of} "
            f"to train on, {len(self.validation):,} to validate"
        )


def load_corpus(
    sources: Sequence[str],
    config: DataConfig | None = None,
    *,
    characters: Iterable[str] = (),
    sizes: Sizes | None = None,
    quiet: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Read, encode and split texts.

    The token ids of a large text are kept in the user's cache, from where later starts map them
    into memory (see `chargpt.data.store`).

    Args:
        sources: files, folders, globs, ``-`` for standard input, or names of data sets.
        config: encoding, documents, split.
        characters: join those of the text in the vocabulary.
        sizes: what is large.
        quiet: show no progress on stderr.
        report: prints a line for the user.

    Raises:
        UserError: a source that is missing, named twice, empty, binary or not of the encoding (with
            byte offset and line), a text too short to split, or a cache that cannot be written.
    """
    config, sizes = config or DataConfig(), sizes or Sizes()
    with standard_input_kept(find_sources(sources)) as texts:
        store = Store(texts, config, characters, sizes=sizes, quiet=quiet, report=report)
        facts, tokenizer, tokens, notes = store.find() or _encode_texts(store)
    for note in notes:
        report(note)
    cut = split_point(tokens, tokenizer.end_of_text_id, config.validation_fraction)
    return Corpus(
        tokenizer=tokenizer,
        train=tokens[:cut],
        validation=tokens[cut:],
        sources=tuple(sources),
        facts=facts,
    )


def _encode_texts(store: Store) -> Entry:
    """Encode in this process what fits into memory, and everything else in the store."""
    if store.n_bytes <= store.sizes.memory:
        with Workers(1) as workers:
            arguments = (store.sources, store.config, store.characters)
            plan = plan_encoding(*arguments, workers=workers, sizes=store.sizes)
        if plan.n_bytes <= 4 * store.sizes.memory:  # more only if an archive grows
            tokens = encode_in_memory(plan, store.sources, store.config, store.sizes)
            return Entry(plan.facts, plan.tokenizer, tokens, plan.notes)
    return store.make()


def split_point(
    tokens: npt.NDArray[Any], end_of_text_id: int | None, validation_fraction: float
) -> int:
    """Return the number of training tokens; the rest is the validation part.

    A single text is cut at any character. Several documents, with end-of-text after each, are cut
    at the nearest boundary between two of them, unless that makes the validation part less than
    half or more than twice as long as `validation_fraction` of the tokens. A part of fewer than two
    tokens is a UserError.
    """
    total = len(tokens)
    cut = int((1.0 - validation_fraction) * total)
    if end_of_text_id is not None:
        nearest = _nearest_end(tokens, end_of_text_id, cut)
        if 0.5 <= (total - nearest) / (validation_fraction * total) <= 2.0:
            cut = nearest
    if cut < 2 or total - cut < 2:
        raise UserError(
            f"the text has {total} tokens, too few to hold out {validation_fraction:.0%} of them: "
            "give more text"
        )
    return cut


def _nearest_end(tokens: npt.NDArray[Any], end_of_text_id: int, cut: int) -> int:
    """Return the end of a document that is nearest to `cut`, the earlier one of two; or 0."""
    before = after = 0
    for stop in range(cut, 0, -_BLOCK):
        start = max(0, stop - _BLOCK)
        ends = np.flatnonzero(tokens[start:stop] == end_of_text_id)
        if len(ends):
            before = start + int(ends[-1]) + 1
            break
    for start in range(cut, len(tokens), _BLOCK):
        ends = np.flatnonzero(tokens[start : start + _BLOCK] == end_of_text_id)
        if len(ends):
            after = start + int(ends[0]) + 1
            break
    return before if before and cut - before <= after - cut else after
