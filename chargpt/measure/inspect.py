"""Is a run folder intact? ``chargpt check`` in Python."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
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

LONGEST_LINE = 2**16  # characters per line of metrics.jsonl; ours have a few hundred
LOOKS, PAUSE_SECONDS = 5, 0.02  # while another process saves into the folder


class Finding(NamedTuple):
    """The state of one part of a run."""

    part: str
    good: bool
    remark: str


def inspect_run(run: str | Path) -> list[Finding]:
    """Check every file of a run that the package reads; nothing is changed.

    An unfinished checkpoint, left when the machine stopped during a save, is not a fault. If
    another process saves into the folder during the check, the check is repeated.

    Raises:
        UserError: not a run folder.
    """
    folder = Path(run)
    if not (folder / CONFIG).is_file():
        read_config(folder)  # raises an error that says what is wrong
    findings: list[Finding] = []
    for look in range(LOOKS):
        if look:
            time.sleep(PAUSE_SECONDS)
        before = _entries(folder)
        findings = _inspect(folder)
        saving = any(name.endswith(".new") for name in before) or _entries(folder) != before
        if not saving or all(finding.good for finding in findings):
            break
    return findings


def _entries(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return what changes whenever something is saved: inode, time and size of each entry."""
    entries = {}
    for entry in os.scandir(folder):
        with suppress(OSError):  # it was just moved
            stat = entry.stat()
            entries[entry.name] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return entries


def _inspect(folder: Path) -> list[Finding]:
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
            findings.append(Finding(which, False, "it is missing"))
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
        return None  # config.json has its own finding


def _config(folder: Path) -> str:
    read_config(folder)
    return f"format {FORMAT}"


def _tokenizer(folder: Path) -> str:
    tokenizer, model = read_tokenizer(folder), _model_config(folder)
    if model is not None and tokenizer.vocab_size != model.vocab_size:
        raise UserError(f"{tokenizer.vocab_size} tokens, but the model has {model.vocab_size}")
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
    return Finding(folder.name, True, f"step {state.get('step')}, all SHA-256 sums match")


def _metrics(path: Path) -> str:
    if not path.is_file():
        raise UserError("it is not a regular file")
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
