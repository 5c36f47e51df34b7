"""``chargpt eval``: a model's loss on a text, beside the loss of simple methods."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, Literal

from chargpt.cli import shared
from chargpt.cli.shared import flag, one_line
from chargpt.config import Unknown


def make_flags(_: str) -> type:
    """Return the flags of ``eval`` as a dataclass."""
    stride_help = (
        "Predict each character from at least block_size - stride others; 0: block_size, as in "
        "training; 1 is best and slowest. (0)"
    )
    unknown_help = "What to do with characters that the model has never seen. (error)"
    part_help = "Which part of the training text. (validation)"
    return shared.flags_class(
        "Print a model's loss on a text, beside the loss of simple methods.",
        [
            shared.RUN,
            flag("files", shared.Texts, (), "Texts. (a part of the training text)", "[FILE ...]"),
            flag("split", Literal["validation", "train"], "validation", part_help),
            *shared.MODEL_FLAGS,
            flag("encoding", str | None, None, "Encoding of the texts. (as in training)", "NAME"),
            flag("stride", int, 0, stride_help),
            flag("unknown", Unknown, "error", unknown_help),
            shared.JSON_FLAG,
        ],
    )


def run(command: Any) -> int:
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
        quiet=False,
        report=shared.print_progress,
    )
    if command.json:
        rows = {row.name: row.bits_per_char for row in card.baselines}
        print(json.dumps({**asdict(card), "baselines": rows}))
        return 0
    size = f"{card.n_tokens:,} tokens"
    if card.unit != "char":
        size = f"{card.n_characters:,} characters in {card.n_tokens:,} {card.unit}s"
        size += f", {card.nats_per_token:.4f} nats/{card.unit}"
    print(f"{one_line(card.text)}: {size}")
    model_row = (one_line(f"{command.run} ({command.which})"), card.bits_per_char)
    table = (model_row, *card.baselines)
    width = max(len(name) for name, _ in table)
    print(f"{'':{width}}{'nats/char':>11}{'bits/char':>11}{'perplexity':>12}")
    for name, bits in table:
        print(f"{name:{width}}{bits * math.log(2):11.4f}{bits:11.4f}{2**bits:12.2f}")
    if card.note:
        shared.print_message(card.note)
    return 0
