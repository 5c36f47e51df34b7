"""``chargpt export``: a run's model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chargpt.base.errors import UserError
from chargpt.cli import shared
from chargpt.cli.shared import flag
from chargpt.config import CheckpointName

Target = Literal["hf", "onnx", "html"]
_OUT = tyro.conf.arg(
    help="What to write: a folder (hf) or a file.", metavar="OUT", help_behavior_hint=""
)
_ONLY = {"push": ("hf",), "int8": ("onnx", "html")}


def make_flags(_: str) -> type:
    """Return the flags of ``export`` as a dataclass."""
    to_help = (
        "hf: a folder for Hugging Face transformers. onnx: a file for ONNX Runtime. html: a web "
        "page in one file, with the model in it."
    )
    push_help = "Also upload the folder to this repository of the Hugging Face Hub (hf)."
    int8_help = "Store weights in 8 bits (onnx, html): smaller, a little less exact."
    return shared.flags_class(
        "Write a model for other programs. It is compared with the run before it is saved.",
        [
            shared.RUN,
            ("out", Annotated[tyro.conf.Positional[Path], _OUT]),
            flag("to", Target, tyro.MISSING, to_help),
            flag("which", CheckpointName, "best", "Which checkpoint. (best)"),
            flag("int8", bool, False, int8_help),
            flag("push", str | None, None, push_help, "USER/NAME"),
        ],
    )


def run(command: Any) -> int:
    """Export, print what was written and how exact it is, and return the exit code."""
    for name, targets in _ONLY.items():
        if getattr(command, name) and command.to not in targets:
            raise UserError(f"--{name} has no effect with --to {command.to}: leave it out")
    options: dict[str, Any] = {"which": command.which, "report": shared.print_progress}
    if command.to == "hf":
        from chargpt.export.huggingface.folder import export_hf

        line = export_hf(command.run, command.out, push=command.push, **options)
    elif command.to == "onnx":
        from chargpt.export.onnx import export_onnx

        line = export_onnx(command.run, command.out, int8=command.int8, **options)
    else:
        from chargpt.export.html import export_html

        line = export_html(command.run, command.out, int8=command.int8, **options)
    print(shared.one_line(line))
    return 0
