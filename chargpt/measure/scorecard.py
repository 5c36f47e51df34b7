"""How good is a model? Its loss on a text, beside what cheap methods reach on the same text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.base.progress import progress
from chargpt.base.units import bits_per_char, perplexity
from chargpt.compute.device import choose_device
from chargpt.config import CheckpointName, DataConfig, Device, Unknown
from chargpt.data import datasets
from chargpt.data.archives import is_compressed
from chargpt.data.corpus import Corpus, load_corpus
from chargpt.data.documents import documents
from chargpt.data.texts import STANDARD_INPUT, find_files, find_sources
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.evaluation import evaluate
from chargpt.measure.baselines import Baseline, baselines, describe_parts
from chargpt.runs.folder import RunConfig, load, read_config, text_sources

Split = Literal["validation", "train"]

_MOST_BYTES = 4  # per character: UTF-8, UTF-16 and UTF-32 need no more
_MOST_SEPARATORS = 100  # per document: empty documents are dropped, and not counted by the run


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorecard:
    """A model's loss on a text, and the baselines' bits per character."""

    text: str  # its name
    n_tokens: int
    n_characters: int  # fewer than tokens, if a token is a byte
    stride: int  # tokens that the model's window moves; 0: block_size
    nats_per_token: float
    nats_per_char: float
    bits_per_char: float
    perplexity: float  # of a character
    baselines: tuple[Baseline, ...]
    unit: str  # what a token is, "char" or "byte"
    note: str  # why there are no baselines, or what part of the texts they saw; may be empty


def score_run(
    run: str | Path,
    files: Sequence[str] = (),
    *,
    split: Split = "validation",
    which: CheckpointName = "best",
    device: Device = "auto",
    encoding: str | None = None,
    unknown: Unknown = "error",
    stride: int = 0,
    with_baselines: bool = True,
    quiet: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Scorecard:
    """Evaluate a trained model on a whole text, in fp32.

    The run's config.json names the training text. It is opened only if no files are given (see
    `chargpt.data.texts.find_sources`), to evaluate on a split of it, or for the baselines. They
    learn from the training part, so the split "train" has none.

    `encoding` is that of the files; None: as in training. `stride` is how many tokens the model's
    window moves (see `chargpt.engine.scoring`); 0: block_size, as in training. A smaller stride
    gives more context and takes longer. `quiet` hides the progress on stderr. `report` prints which
    files of the training text are read.

    Raises:
        UserError: no such run, the text is missing or has changed, a character is unknown, or the
            stride is outside 0 … block_size.
    """
    config = read_config(Path(run))
    data_config = config.data_config
    model, tokenizer = load(run, which=which, device=choose_device(device).device)
    note, corpus = "", None
    if with_baselines or not files:
        try:
            corpus = training_corpus(config, report)
        except UserError as error:
            if not files:
                raise UserError(f"{error}: name a file to evaluate on") from error
            note = f"no baselines: {error}"
    if files:
        as_in_training = data_config.replace(encoding=encoding or data_config.encoding)
        tokens = _read_tokens(files, tokenizer, as_in_training, unknown)
        name = ", ".join(files)
    else:
        assert corpus is not None
        tokens = corpus.validation if split == "validation" else corpus.train
        name = f"{split} part of {', '.join(corpus.sources)}"
    with progress("evaluating", len(tokens) - 1, unit="tokens", quiet=quiet) as advance:
        block_size = model.config.block_size
        loss = evaluate(model, tokens, block_size, stride=stride, advance=advance)
    card = _card(name, tokens, tokenizer, loss, stride=stride)
    if with_baselines and corpus is not None and (files or split == "validation"):
        per_character = card.n_tokens / card.n_characters
        rows = baselines(corpus.train, tokens, corpus.tokenizer)
        rows = [row._replace(bits_per_char=row.bits_per_char * per_character) for row in rows]
        note = describe_parts(corpus.train, tokens)
        card = replace(card, baselines=tuple(rows))
    return replace(card, note=note)


def _card(
    text: str, tokens: npt.NDArray[Any], tokenizer: CharTokenizer, loss: float, *, stride: int
) -> Scorecard:
    """Return the card of a model alone; `loss` is in nats a token."""
    n_characters = tokenizer.n_characters(tokens)
    nats = loss * (len(tokens) / n_characters)
    return Scorecard(
        text=text,
        n_tokens=len(tokens),
        n_characters=n_characters,
        stride=stride,
        nats_per_token=loss,
        nats_per_char=nats,
        bits_per_char=bits_per_char(nats),
        perplexity=perplexity(nats),
        baselines=(),
        unit=tokenizer.unit,
        note="",
    )


def _read_tokens(
    files: Sequence[str], tokenizer: CharTokenizer, config: DataConfig, unknown: Unknown
) -> npt.NDArray[Any]:
    """Return the token ids of all documents, each ended by end-of-text where the model has one."""
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    pieces = [np.array([], dtype=tokenizer.dtype)]
    for source in find_sources(files):
        for document in documents(source, config):
            try:
                ids = tokenizer.encode(document, unknown=unknown)
            except UserError as error:
                raise UserError(f"{source.name}: {error}") from error
            pieces += [ids, np.array(end, dtype=tokenizer.dtype)]
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise UserError(f"{', '.join(files)}: fewer than two known characters: give a longer text")
    return tokens


# --- the training text


def training_corpus(config: RunConfig, report: Callable[[str], None]) -> Corpus:
    """Read the training text of a run again.

    The config may come from a stranger: only regular files are opened, and none of them if their
    total size cannot be that of the run's text. `report` prints which files are read.

    Raises:
        UserError: the text is missing, came from standard input, or has changed; the caller adds
            the remedy.
    """
    sources = text_sources(config)
    if STANDARD_INPUT in sources:
        raise UserError("the run read its text from standard input")
    try:
        report(f"reading the run's text: {_check_size(sources, config)}")
        corpus = load_corpus(sources, config.data_config, report=report)
    except (UserError, OSError) as error:
        raise UserError(f"the run's text cannot be read again: {error}") from error
    if corpus.facts.sha256 != config.text.sha256:
        raise UserError(f"{', '.join(sources)} has changed since the run")
    return corpus


def _check_size(sources: Sequence[str], config: RunConfig) -> str:
    """Return the names of the files, or raise UserError if their size cannot be the run's text."""
    files = [file for source in sources for file in find_files(source)]
    size = sum(
        file.stat().st_size if isinstance(file, Path) else datasets.DATASETS[file].size
        for file in files
    )
    names, text = ", ".join(map(str, files)), config.text
    most = text.n_characters + len(files)  # one byte-order mark per file
    most += _MOST_SEPARATORS * len(config.data_config.document_separator) * text.n_documents
    # An archive or a table may be much smaller than its text.
    packed = config.data_config.text_column or any(is_compressed(str(file)) for file in files)
    if not (0 if packed else text.n_characters) <= size <= _MOST_BYTES * most:
        raise UserError(
            f"{names:.200} is not the text of this run (its size differs): {size:,} bytes for "
            f"{text.n_characters:,} characters"
        )
    return names
