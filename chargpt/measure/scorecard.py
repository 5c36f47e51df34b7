"""How good is this model? Its loss on a text, beside what cheap methods reach on the same text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy.typing as npt

from chargpt.base.errors import UserError
from chargpt.base.units import bits_per_char, perplexity
from chargpt.compute.device import choose_device
from chargpt.config import CheckpointName, Device, Unknown
from chargpt.data.corpus import Corpus, encode_documents, load_corpus, split_documents
from chargpt.data.texts import STANDARD_INPUT, decode, read_sources
from chargpt.data.tokenizer import CharTokenizer
from chargpt.engine.scoring import log_probabilities, mean_nats
from chargpt.measure.baselines import Baseline, baselines
from chargpt.runs.folder import RunConfig, load, read_config, text_sources

Split = Literal["validation", "train"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorecard:
    """A model's loss on a text, in nats a character, and the baselines', in bits."""

    text: str
    """What was read."""
    n_tokens: int
    stride: int
    """Tokens that the model's window moved; 0: block_size."""
    nats_per_char: float
    bits_per_char: float
    perplexity: float
    baselines: tuple[Baseline, ...]
    note: str
    """Why the baselines could not be computed; empty if they were, or were not wanted."""


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
) -> Scorecard:
    """Evaluate a trained model over a whole text, in fp32.

    Args:
        run: its run folder.
        files: texts to evaluate on (see `chargpt.data.texts.read_sources`); none: a split of the text
            that the run was trained on, read again from where it was.
        split: which one.
        which: the checkpoint.
        device: where to compute.
        encoding: of the files; default: as in training.
        unknown: what to do with characters that the model has never seen.
        stride: tokens that the model's window moves (see `chargpt.engine.scoring`); 0: block_size, as in
            training. Smaller gives more context, and takes longer.
        with_baselines: compute what cheap methods reach.

    Raises:
        UserError: no such run, the text is gone or has changed, a character is unknown, or a
            stride outside 0 … block_size.
    """
    config = read_config(Path(run))
    model, tokenizer = load(run, which=which, device=choose_device(device).device)
    note, corpus = "", None
    try:
        corpus = training_corpus(config)
    except UserError as error:
        if not files:
            raise UserError(f"{error}: name a file to evaluate on") from error
        note = f"no baselines: {error}"
    if files:
        tokens = _read_tokens(
            files,
            tokenizer,
            config.data_config.document_separator,
            encoding or config.data_config.encoding,
            unknown,
        )
        name = ", ".join(files)
    else:
        assert corpus is not None
        tokens = corpus.validation if split == "validation" else corpus.train
        name = f"{split} part of {', '.join(corpus.sources)}"
    loss = mean_nats(log_probabilities(model, tokens, stride=stride))
    rows = _baselines(corpus, tokens, split if not files else None) if with_baselines else ()
    return Scorecard(
        text=name,
        n_tokens=len(tokens),
        stride=stride,
        nats_per_char=loss,
        bits_per_char=bits_per_char(loss),
        perplexity=perplexity(loss),
        baselines=rows,
        note=note,
    )


def training_corpus(config: RunConfig) -> Corpus:
    """Read the text of a run again.

    Raises:
        UserError: it is gone, came from standard input, or has changed; what to do about it is the
            caller's to say.
    """
    sources = text_sources(config)
    if STANDARD_INPUT in sources:
        raise UserError("the run read its text from standard input")
    try:
        corpus = load_corpus(sources, config.data_config)
    except UserError as error:
        raise UserError(f"the run's text cannot be read again: {error}") from error
    if corpus.facts.sha256 != config.text.sha256:
        raise UserError(f"{', '.join(sources)} has changed since the run")
    return corpus


def _read_tokens(
    files: Sequence[str],
    tokenizer: CharTokenizer,
    separator: str,
    encoding: str,
    unknown: Unknown,
) -> npt.NDArray[Any]:
    documents: list[str] = []
    for raw in read_sources(files):
        for text in split_documents(decode(raw, encoding), separator):
            try:
                known = tokenizer.encode(text, unknown=unknown)
            except UserError as error:
                raise UserError(f"{raw.name}: {error}") from error
            documents.append(tokenizer.decode(known))
    tokens = encode_documents(documents, tokenizer)
    if len(tokens) < 2:
        raise UserError(f"{', '.join(files)}: less than two known characters: give a longer text")
    return tokens


def _baselines(
    corpus: Corpus | None, tokens: npt.NDArray[Any], split: Split | None
) -> tuple[Baseline, ...]:
    """Return what cheap methods make of `tokens`, where these are not what they learn from."""
    if corpus is None or split == "train":
        return ()
    return tuple(baselines(corpus.train, tokens, corpus.tokenizer))
