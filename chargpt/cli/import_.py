"""``chargpt import``: a model of another program becomes a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chargpt.base.errors import UserError
from chargpt.cli import shared
from chargpt.cli.shared import flag

Source = Literal["hf", "nanogpt"]


def _positional(kind: Any, text: str, metavar: str) -> Any:
    hint: Any = tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")
    return Annotated[kind, tyro.conf.Positional, hint]


def make_flags(_: str) -> type:
    """Return the flags of ``import`` as a dataclass."""
    source_help = "A folder that `chargpt export --to hf` wrote, or nanoGPT's ckpt.pt."
    meta_help = "nanoGPT's meta.pkl, which has the vocabulary."
    return shared.flags_class(
        "Make a run from a model of Hugging Face transformers or nanoGPT. No code in it is run.",
        [
            ("source", _positional(Source, "Which program wrote it.", "hf|nanogpt")),
            ("path", _positional(Path, source_help, "PATH")),
            flag("out", Path, tyro.MISSING, "The new run folder.", "RUN"),
            flag("meta", Path | None, None, meta_help, "meta.pkl"),
        ],
    )


def run(command: Any) -> int:
    """Import, print the run folder, and return the exit code."""
    if command.source == "hf":
        if command.meta is not None:
            raise UserError("--meta has no effect with hf: leave it out")
        from chargpt.export.huggingface.folder import import_hf

        line = import_hf(command.path, command.out)
    else:
        from chargpt.export.nanogpt import import_nanogpt

        if command.meta is None:
            raise UserError(
                "nanogpt keeps its vocabulary in meta.pkl: give --meta data/NAME/meta.pkl"
            )
        line = import_nanogpt(command.path, command.meta, command.out)
    print(shared.one_line(line))
    return 0
