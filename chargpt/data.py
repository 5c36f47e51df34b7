"""From texts to batches: read, cut into documents, split, encode, and draw windows.

Batch `s` is a pure function of the seed and `s`: there is no iterator and no random state, so a
run resumes anywhere, and the order of the data does not depend on how many processes share it.
Targets are the inputs shifted by one, here and nowhere else.
"""

from __future__ import annotations

import codecs
import difflib
import glob
import hashlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from chargpt import datasets
from chargpt.config import DataConfig
from chargpt.errors import UserError
from chargpt.tokenizer import CharTokenizer

STANDARD_INPUT = "-"

_BYTE_ORDER_MARKS = (  # the 32-bit marks start with the 16-bit ones: longest first
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class RawText(NamedTuple):
    """The bytes of one source, and what to call it in messages."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text or many documents, encoded and split."""

    tokenizer: CharTokenizer
    train: npt.NDArray[Any]
    """Token ids, (n,), smallest unsigned type."""
    validation: npt.NDArray[Any]
    """Token ids, (m,)."""
    sources: tuple[str, ...]
    """What the user named, to read it again."""
    sha256: str
    """Of the bytes of all sources, one after the other."""
    boundaries: str
    """SHA-256 of the documents' lengths."""
    n_characters: int
    n_documents: int

    def summary(self) -> str:
        """Return one line for the person who trains."""
        documents = f" in {self.n_documents:,} documents" if self.n_documents > 1 else ""
        return (
            f"{self.n_characters:,} characters{documents}, {len(self.tokenizer.characters)} "
            f"distinct; {len(self.train):,} to train on, {len(self.validation):,} to validate"
        )


def load_corpus(sources: Sequence[str], config: DataConfig | None = None) -> Corpus:
    """Read, split and encode texts.

    Args:
        sources: files, folders, globs, ``-`` for standard input, or names of data sets.
        config: encoding, document separator, validation fraction.

    Raises:
        UserError: a source that is missing, empty, binary or not of the encoding (named with byte
            offset and line), or nothing left to validate on.
    """
    config = config or DataConfig()
    raw_texts = read_sources(sources)
    digest = hashlib.sha256()
    documents: list[str] = []
    for raw in raw_texts:
        digest.update(raw.data)
        documents += split_documents(decode(raw, config.encoding), config.document_separator)
    if not documents:
        raise UserError(f"{', '.join(sources)} holds only document separators: give some text")
    tokenizer = CharTokenizer.fit(documents, end_of_text=len(documents) > 1)
    lengths = [len(document) for document in documents]
    tokens = encode_documents(documents, tokenizer)
    cut = split_point(lengths, tokenizer.end_of_text_id is not None, config.validation_fraction)
    return Corpus(
        tokenizer=tokenizer,
        train=tokens[:cut],
        validation=tokens[cut:],
        sources=tuple(sources),
        sha256=digest.hexdigest(),
        boundaries=hashlib.sha256(np.array(lengths, dtype="<i8").tobytes()).hexdigest(),
        n_characters=sum(lengths),
        n_documents=len(documents),
    )


# --- reading


def read_sources(sources: Sequence[str]) -> list[RawText]:
    """Return the bytes of each source, in the order given (a folder's files sorted by path).

    Raises:
        UserError: no source, or one that is missing, unreadable or empty.
    """
    if not sources:
        raise UserError(f"no text: give a file, or a data set ({', '.join(datasets.NAMES)})")
    raw_texts: list[RawText] = []
    for source in sources:
        if not source:
            raise UserError("the name of a text is empty: give a file, or - for standard input")
        if source == STANDARD_INPUT:
            raw_texts.append(RawText("standard input", sys.stdin.buffer.read()))
        elif source in datasets.NAMES:
            raw_texts.append(RawText(source, datasets.load_dataset(source)))
        else:
            try:
                paths = _find_files(source)
            except (OSError, RuntimeError) as error:  # a text given for a name, ~ of nobody
                shown = source if len(source) <= 60 else source[:60] + "…"
                raise UserError(
                    f"{shown}: cannot be looked up ({error}): give a text file, a folder, "
                    "a glob, or -"
                ) from error
            raw_texts += [RawText(str(path), _read_file(path)) for path in paths]
    for raw in raw_texts:
        if not raw.data:
            raise UserError(
                f"{raw.name} is empty: give a text with at least some thousand characters"
            )
    return raw_texts


def _find_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.is_file() and _is_visible(file, path)
        )
        if not files:
            raise UserError(f"{source} is a folder without files: put some text files there")
        return files
    if path.exists():
        return [path]
    if any(character in source for character in "*?["):
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        files = sorted({match for match in matches if match.is_file()})  # ** can match twice
        if files:
            return files
        raise UserError(f"{source}: no file matches this pattern; check it with ls")
    siblings = [*datasets.NAMES]
    if path.parent.is_dir():
        siblings += [str(path.parent / sibling.name) for sibling in path.parent.iterdir()]
    near = difflib.get_close_matches(source, siblings, n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}?" if near else "give a text file, a folder, a pattern, "
    hint += "" if near else f"- for standard input, or a data set ({', '.join(datasets.NAMES)})"
    raise UserError(f"{source}: no such file; {hint}")


def _is_visible(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a readable file"
        ) from error


def decode(raw: RawText, encoding: str) -> str:
    """Return the text of `raw`; a byte-order mark decides the encoding, line ends stay as they are.

    Raises:
        UserError: an unknown encoding, a binary file, or a byte that is not of the encoding; the
            message names the file, the byte's offset and its line.
    """
    marked = next((name for mark, name in _BYTE_ORDER_MARKS if raw.data.startswith(mark)), None)
    codec = marked or encoding
    try:
        text = raw.data.decode(codec)
    except LookupError as error:  # no such codec, or one that is not for text
        raise UserError(
            f"unknown encoding {encoding!r}: give --encoding utf-8, latin-1, cp1252, utf-16, …"
        ) from error
    except UnicodeError as error:
        if not isinstance(error, UnicodeDecodeError):  # the codec of domain names, and the like
            raise UserError(f"{raw.name} is not {codec} ({error}): give --encoding") from error
        if b"\0" in raw.data[:8192]:
            raise UserError(f"{raw.name} is a binary file: give plain text") from error
        start = error.start + len(raw.data) - len(error.object)  # utf-8-sig leaves out its mark
        line = raw.data.count(b"\n", 0, start) + 1
        raise UserError(
            f"{raw.name}: byte 0x{raw.data[start]:02x} at offset {start} (line {line}) "
            f"is not {codec}: give --encoding, e.g. --encoding latin-1 or cp1252"
        ) from error
    if "\0" in text[:8192]:
        raise UserError(
            f"{raw.name} is a binary file, or not {codec}: give plain text, or --encoding"
        )
    if not text:
        raise UserError(f"{raw.name} is empty: give a text with at least some thousand characters")
    return text


# --- documents


def split_documents(text: str, separator: str) -> list[str]:
    """Cut `text` at each `separator` and leave out what is empty; no separator: one document."""
    return [document for document in text.split(separator) if document] if separator else [text]


def encode_documents(documents: Sequence[str], tokenizer: CharTokenizer) -> npt.NDArray[Any]:
    """Return all documents as token ids, (n,), each ended by end-of-text where there is one."""
    end = tokenizer.end_of_text_id
    ends = np.array([] if end is None else [end], dtype=tokenizer.dtype)
    # Joined before encoding: 32,000 names are one call, not 32,000.
    ids = tokenizer.encode("".join(documents))
    boundaries = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return np.insert(ids, boundaries, ends[0]) if ends.size else ids


def split_point(lengths: Sequence[int], end_of_text: bool, validation_fraction: float) -> int:
    """Return how many tokens are for training; the rest validates.

    A single text is cut at the character. Documents stay whole, unless they are so few that the
    nearest boundary would make the validation part less than half or more than twice what was
    asked for.

    Args:
        lengths: of the documents, in characters.
        end_of_text: whether a token follows each document.
        validation_fraction: share asked for.

    Raises:
        UserError: a part would be empty.
    """
    ends = np.cumsum(np.asarray(lengths) + end_of_text)
    total = int(ends[-1])
    cut = int((1.0 - validation_fraction) * total)
    nearest = int(ends[np.argmin(np.abs(ends - cut))])
    if 0.5 <= (total - nearest) / (validation_fraction * total) <= 2.0:
        cut = nearest
    if cut < 2 or total - cut < 2:
        raise UserError(
            f"the text has {total} tokens, too few to hold out {validation_fraction:.0%} of them: "
            "give more text"
        )
    return cut


# --- windows and batches


class Batch(NamedTuple):
    """Token ids and the ids that follow them."""

    inputs: Tensor
    """(B, T), int64."""
    targets: Tensor
    """(B, T), int64: ``targets[:, t]`` follows ``inputs[:, t]`` in the text."""


class Windows:
    """Training sequences by number: sequence `i` is a pure function of (seed, i).

    An epoch is the text cut into disjoint windows of T tokens, from a random start, in a random
    order, so that it visits every character once (but for less than 2 T at the ends).

    Args:
        tokens: the training part, (n,).
        block_size: T, tokens a window.
        seed: of starts and orders.

    Raises:
        UserError: fewer than T + 1 tokens.
    """

    def __init__(self, tokens: npt.NDArray[Any], block_size: int, seed: int) -> None:
        if len(tokens) <= block_size:
            raise UserError(
                f"the text is too short: {len(tokens)} tokens to train on, and block_size "
                f"{block_size} needs {block_size + 1}; give more text, or a --block-size below "
                f"{len(tokens)}"
            )
        # torch cannot index the wider unsigned types
        compact = tokens if tokens.dtype == np.uint8 else tokens.astype(np.int32)
        self.tokens = torch.from_numpy(compact)
        self.block_size = block_size
        self.seed = seed
        # One window is given up so that the start may vary over a whole block.
        self.per_epoch = max(1, (len(tokens) - block_size) // block_size)
        slack = len(tokens) - 1 - self.per_epoch * block_size
        self._starts = slack + 1
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def batch(self, first: int, count: int) -> Batch:
        """Return sequences `first` … `first + count - 1`, shapes (count, T)."""
        starts = torch.tensor([self._start(number) for number in range(first, first + count)])
        offsets = torch.arange(self.block_size + 1)
        windows = self.tokens[starts[:, None] + offsets].long()  # (B, T + 1)
        return Batch(windows[:, :-1], windows[:, 1:])

    def _start(self, number: int) -> int:
        epoch, place = divmod(number, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self._epoch_starts(epoch))
        return int(self._order[1][place])

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the start of every window of an epoch, in the order of training."""
        # The raw stream of a counter-based generator stays the same from numpy to numpy.
        key = np.array([self.seed, epoch], dtype=np.uint64)
        draws = np.random.Philox(key=key).random_raw(self.per_epoch + 1)
        shift = int(draws[0] % np.uint64(self._starts))
        return shift + np.argsort(draws[1:], kind="stable") * self.block_size


def blocks(tokens: npt.NDArray[Any], block_size: int, batch_size: int) -> Iterator[Batch]:
    """Yield a split as disjoint windows, in order, each token but the first a target once.

    Args:
        tokens: (n,).
        block_size: T; the last window is shorter if it must be.
        batch_size: windows in a batch.
    """
    ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))  # (n,)
    n_full = (len(ids) - 1) // block_size
    inputs = ids[: n_full * block_size].view(n_full, block_size)
    targets = ids[1 : n_full * block_size + 1].view(n_full, block_size)
    for start in range(0, n_full, batch_size):
        yield Batch(inputs[start : start + batch_size], targets[start : start + batch_size])
    rest = ids[n_full * block_size :]
    if len(rest) > 1:
        yield Batch(rest[None, :-1], rest[None, 1:])
