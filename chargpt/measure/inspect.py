"""Is a run folder intact? ``chargpt check`` in Python."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, get_args

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
    findings = []

    def look(check: Callable[[Path, GPT2Config | None], str], part: str) -> None:
        try:
            findings.append(Finding(part, True, check(folder / part, model)))
        except UserError as error:
            findings.append(Finding(part, False, str(error)))

    model, imported = None, False
    with suppress(UserError):  # config.json has its own finding
        config = read_config(folder)
        model, imported = config.model_config, config.imported_from is not None
    look(_config, CONFIG)
    look(_tokenizer, TOKENIZER)
    for which in get_args(CheckpointName):
        folders = checkpoint_folders(folder, which)
        for checkpoint in folders:
            if not checkpoint.name.endswith(".new"):
                look(_checkpoint, checkpoint.name)
        if which == ("best" if imported else "last") and not folders:
            findings.append(Finding(which, False, "it is missing"))
    for part, check in ((METRICS, _metrics), (SUMMARY, _summary)):
        if (folder / part).exists():
            look(check, part)
    return findings


def _config(path: Path, _: GPT2Config | None) -> str:
    read_config(path.parent)
    return f"format {FORMAT}"


def _tokenizer(path: Path, model: GPT2Config | None) -> str:
    size = read_tokenizer(path.parent).vocab_size
    if model is not None and size != model.vocab_size:
        raise UserError(f"{size} tokens, but the model has {model.vocab_size}")
    return f"{size} tokens"


def _checkpoint(path: Path, model: GPT2Config | None) -> str:
    problem = find_problem(path)
    if problem:
        raise UserError(problem)
    state = read_state(path)
    if model is not None:
        check_model_file(path / MODEL, model)
    if (path / OPTIMIZER).exists():
        read_tensors(path / OPTIMIZER)
        from_dict(TrainState, state)
    return f"step {state.get('step')}, all SHA-256 sums match"


def _metrics(path: Path, _: GPT2Config | None) -> str:
    if not path.is_file():
        raise UserError("it is not a regular file")
    number = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), ""), start=1):
            try:
                json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"line {number} is not JSON") from error
    return f"{number:,} lines"


def _summary(path: Path, _: GPT2Config | None) -> str:
    return f"validation loss {read_json(path).get('val_loss')}"
