"""``chargpt train``: a model trained on text, and a run folder."""

from __future__ import annotations

import shlex
import sys
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from chargpt.base.errors import UserError
from chargpt.base.terminal import for_stream
from chargpt.cli import flags
from chargpt.cli.shared import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    TEXTS_HELP,
    Texts,
    arg,
    given_settings,
    origins,
    settings,
)
from chargpt.config import SampleConfig

_RESUME_HELP = (
    "Go on with the run in --out. --resume auto begins it if there is none: the same command, "
    "repeated, does both."
)


def make_flags(shown_preset: str) -> type:
    """Return the flags of ``train`` as a dataclass; help shows the values of a preset."""
    out_help = "The run folder (a new one below runs/)."
    command = make_dataclass(
        "Train",
        [
            ("texts", Annotated[Texts, arg(TEXTS_HELP, "[TEXT ...]")], ()),
            *origins(shown_preset),
            ("out", Annotated[Path | None, arg(out_help, "FOLDER")], None),
            ("resume", Annotated[Literal["no", "yes", "auto"], arg(_RESUME_HELP, "[auto]")], "no"),
            *settings(shown_preset),
        ],
        frozen=True,
    )
    command.__doc__ = (
        "Train a model on text and leave a run folder. Settings come from a preset; a file "
        "(--config) wins over it, a flag over both."
    )
    return command


def run(command: Any) -> int:
    """Train, print the verdict and a sample, and return the exit code."""
    file, given = given_settings(command)
    chosen = command.preset or file.pop("preset", None)
    base, texts = _base(command, chosen)
    configs = flags.resolve(base, file, given)

    from chargpt.train import train

    result = train(
        texts,
        model_config=configs["model_config"],
        train_config=configs["train_config"],
        data_config=configs["data_config"],
        out=command.out,
        resume="auto" if command.resume == "auto" else command.resume == "yes",
    )
    print(result.summary.verdict)
    reason = result.summary.stop_reason
    if reason in ("interrupted", "terminated"):
        folder = shlex.quote(str(result.run))
        print(f"kept in {folder}; go on with --out {folder} --resume", file=sys.stderr)
        return EXIT_INTERRUPTED if reason == "interrupted" else EXIT_TERMINATED
    _print_sample(result)
    print(f"more: chargpt sample {shlex.quote(str(result.run))} --prompt '…'", file=sys.stderr)
    return 0


def _base(command: Any, chosen: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return where the settings start, and the texts: a preset's, or those of a run to resume."""
    resuming = command.resume != "no"
    if resuming and command.out is None:
        raise UserError("--resume needs the run to go on with: give --out FOLDER")
    if not resuming or not (command.out / "config.json").is_file():
        return flags.preset(chosen or "tiny"), command.texts or ("tiny-shakespeare",)
    # The command that began the run may go on with it: what differs is refused by name later.
    base, sources = flags.saved(command.out)
    return base if chosen is None else flags.preset(chosen), command.texts or sources


def _print_sample(result: Any) -> None:
    from chargpt.generate import generate

    print()
    for _, piece in generate(result.model, result.tokenizer, [""], SampleConfig()):
        print(for_stream(piece, sys.stdout), end="", flush=True)
    print()
