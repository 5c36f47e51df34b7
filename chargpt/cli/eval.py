"""``chargpt eval``: a model's loss on a text, beside what cheap methods reach."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from chargpt.base.terminal import visible
from chargpt.cli.shared import RunFolder, Texts, arg
from chargpt.config import CheckpointName, Device, Unknown


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Print a model's loss on a text, beside what cheap methods reach."""

    run: RunFolder
    files: Annotated[Texts, arg("Texts; none: a split of the training text.", "[FILE ...]")] = ()
    split: Literal["validation", "train"] = "validation"
    """Which part of the training text."""
    which: CheckpointName = "best"
    """Which checkpoint."""
    device: Device = "auto"
    """Where to compute."""
    encoding: Annotated[str | None, arg("Of the files (as in training).", "NAME")] = None
    stride: int = 0
    """Characters are predicted from at least block_size - stride others; 0: block_size, as in
    training; 1 is best and slowest."""
    unknown: Unknown = "error"
    """What to do with characters that the model has never seen."""
    json: bool = False
    """Print one JSON object instead of a table."""


def make_flags(_: str) -> type:
    """Return the flags of ``eval`` as a dataclass."""
    return Eval


def run(command: Eval) -> int:
    """Print the losses as a table or as JSON, and return the exit code."""
    from chargpt.measure.scorecard import score_run

    card = score_run(
        command.run,
        command.files,
        split=command.split,
        which=command.which,
        device=command.device,
        encoding=command.encoding,
        unknown=command.unknown,
        stride=command.stride,
    )
    if command.json:
        rows = {row.name: row.bits_per_char for row in card.baselines}
        print(json.dumps({**asdict(card), "baselines": rows}))
        return 0
    print(f"{visible(card.text)}: {card.n_tokens:,} tokens")
    model_row = (f"{command.run} ({command.which})", card.bits_per_char)
    rows_of_table = (model_row, *card.baselines)
    width = max(len(name) for name, _ in rows_of_table)
    print(f"{'':{width}}{'nats/char':>11}{'bits/char':>11}{'perplexity':>12}")
    for name, bits in rows_of_table:
        print(f"{name:{width}}{bits * math.log(2):11.4f}{bits:11.4f}{2**bits:12.2f}")
    if card.note:
        print(f"chargpt: {card.note}", file=sys.stderr)
    return 0
