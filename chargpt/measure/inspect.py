"""Is a run folder whole? ``chargpt check`` in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.base.files import read_json
from chargpt.config import CheckpointName, GPT2Config
from chargpt.runs.checkpoint import (
    FORMAT,
    MODEL,
    OPTIMIZER,
    checkpoint_folders,
    find_problem,
    read_state,
)
from chargpt.runs.folder import CONFIG, TOKENIZER, read_config, read_tokenizer
from chargpt.runs.report import METRICS
from chargpt.runs.weights import check_model_file, read_tensors
from chargpt.training.summary import SUMMARY
from chargpt.training.trainer import TrainState

LONGEST_LINE = 2**16  # of metrics.jsonl, in characters; ours have some hundred


class Finding(NamedTuple):
    """What was found about a part of a run."""

    part: str
    good: bool
    remark: str


def inspect_run(run: str | Path) -> list[Finding]:
    """Look at every file of a run that the package reads; nothing is changed.

    A checkpoint that was being written when the machine stopped is no fault.

    Raises:
        UserError: not a run folder.
    """
    folder = Path(run)
    if not (folder / CONFIG).is_file():
        read_config(folder)  # says what is wrong
    findings = [
        _look(CONFIG, lambda: _config(folder)),
        _look(TOKENIZER, lambda: _tokenizer(folder)),
    ]
    model = _model_config(folder)
    which: CheckpointName
    for which in ("best", "last"):
        folders = checkpoint_folders(folder, which)
        for checkpoint in (c for c in folders if not c.name.endswith(".new")):
            findings.append(_checkpoint(checkpoint, model))
        if which == "last" and not folders:
            findings.append(Finding(which, False, "there is none"))
    if (folder / METRICS).exists():
        findings.append(_look(METRICS, lambda: _metrics(folder / METRICS)))
    if (folder / SUMMARY).exists():
        findings.append(_look(SUMMARY, lambda: _summary(folder / SUMMARY)))
    return findings


def _look(part: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(part, True, look())
    except UserError as error:
        return Finding(part, False, str(error))


def _model_config(folder: Path) -> GPT2Config | None:
    try:
        return read_config(folder).model_config
    except UserError:
        return None  # reported as such


def _config(folder: Path) -> str:
    read_config(folder)
    return f"format {FORMAT}"


def _tokenizer(folder: Path) -> str:
    tokenizer, model = read_tokenizer(folder), _model_config(folder)
    if model is not None and tokenizer.vocab_size != model.vocab_size:
        raise UserError(f"{tokenizer.vocab_size} tokens, and the model has {model.vocab_size}")
    return f"{tokenizer.vocab_size} tokens"


def _checkpoint(folder: Path, model: GPT2Config | None) -> Finding:
    problem = find_problem(folder)
    if problem:
        return Finding(folder.name, False, problem)
    try:
        state = read_state(folder)
        if model is not None:
            check_model_file(folder / MODEL, model)
        if (folder / OPTIMIZER).exists():
            read_tensors(folder / OPTIMIZER)
            from_dict(TrainState, state)
    except UserError as error:
        return Finding(folder.name, False, str(error))
    return Finding(folder.name, True, f"step {state.get('step')}, all SHA-256 sums are right")


def _metrics(path: Path) -> str:
    if not path.is_file():
        raise UserError("it is no plain file")
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        lines = iter(lambda: file.readline(LONGEST_LINE), "")
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} is not JSON") from error
    return f"{number:,} lines"


def _summary(path: Path) -> str:
    return f"validation loss {read_json(path).get('val_loss')}"
