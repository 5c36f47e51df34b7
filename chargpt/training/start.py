"""A model to start from: the weights of another run, for a text that may have other characters.

    chargpt train new.txt --from runs/old

The shape is the run's; optimizer and schedule are new. The vocabulary is that of both, so the rows
of the embedding move to new ids, and characters that the run never saw get new rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from chargpt.base.errors import UserError
from chargpt.config import GPT2Config, TokenizerName
from chargpt.data.tokenizer import CharTokenizer
from chargpt.model import GPT2, INIT_STD
from chargpt.runs.folder import load, read_config
from chargpt.runs.weights import load_model_tensors, model_tensors

_FREE = {"vocab_size", "dropout", "embedding_dropout", "attention_dropout"}
_SHOWN = 8  # new characters


class Start(NamedTuple):
    """The best model of a run, in evaluation mode, with its tokenizer."""

    run: Path
    model: GPT2
    tokenizer: CharTokenizer


def start_config(run: Path) -> GPT2Config:
    """Return the shape of a run's model, for any vocabulary."""
    return read_config(run).model_config.replace(vocab_size=0)


def fixed_shape(model_config: GPT2Config) -> dict[str, Any]:
    """Return the settings of a shape that a model that starts from it must keep, by name."""
    return {name: value for name, value in asdict(model_config).items() if name not in _FREE}


def read_start(run: Path, model_config: GPT2Config, tokenizer_name: TokenizerName) -> Start:
    """Return the model to start from.

    Raises:
        UserError: not a run, or one of another shape than `model_config` (dropout may differ), or
            with another kind of tokens.
    """
    for name, was in asdict(start_config(run)).items():
        wanted = getattr(model_config, name)
        if wanted != was and name not in _FREE:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{name} is {was!r} in {run} and cannot become {wanted!r}: "
                f"leave out {flag}, or --from"
            )
    start = Start(run, *load(run))
    unit = start.tokenizer.unit
    if unit != tokenizer_name:
        raise UserError(
            f"the tokens of {run} are {unit}s, not {tokenizer_name}s: give --tokenizer {unit}"
        )
    return start


def take_weights(model: GPT2, tokenizer: CharTokenizer, start: Start) -> str:
    """Copy the weights of `start` into an untrained model; return a line about it for the user.

    The characters of `tokenizer`, the model's, include those of the start.
    """
    tensors = model_tensors(start.model)
    name = "token_embedding.weight"
    old, rows = tensors[name], model.token_embedding.weight.detach().clone()
    pairs = list(_common_ids(start.tokenizer, tokenizer))
    was, now = torch.tensor(pairs).unbind(1)
    old = old.to(rows.device)
    # New rows are drawn like GPT-2's, but with mean and spread of the known ones (Hewitt 2021,
    # "Initializing new word embeddings"): docs/lab-notes.md compares five ways.
    rows.mul_(old.std(0, correction=0) / INIT_STD).add_(old.mean(0))
    rows[now] = old[was]
    load_model_tensors(model, tensors | {name: rows})
    new = sorted({*tokenizer.characters} - {*start.tokenizer.characters})
    shown = ", ".join(map(repr, new[:_SHOWN])) + (", …" if len(new) > _SHOWN else "")
    seen = f"new characters ({len(new):,}): {shown}" if new else "it knows all characters"
    lost = start.tokenizer.end_of_text_id is not None and tokenizer.end_of_text_id is None
    end = "; one document needs no end-of-text token, so its row is left out" if lost else ""
    return f"from       {start.run}: {seen}{end}"


def _common_ids(old: CharTokenizer, new: CharTokenizer) -> Iterator[tuple[int, int]]:
    """Yield the old and the new id of each token that both have."""
    ids = {character: i for i, character in enumerate(new.characters)}
    for i, character in enumerate(old.characters):
        if character in ids:
            yield i, ids[character]
    if old.end_of_text_id is not None and new.end_of_text_id is not None:
        yield old.end_of_text_id, new.end_of_text_id
