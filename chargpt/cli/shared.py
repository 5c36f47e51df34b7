"""What several commands share: exit codes, flags, the settings of a run, lines on stderr."""

from __future__ import annotations

import os
import sys
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chargpt.base.errors import UserError
from chargpt.base.terminal import visible
from chargpt.cli import flags
from chargpt.config import PRESETS, CheckpointName, Device

EXIT_USER, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 1, 130, 143

_NO_HINT: Any = {"help_behavior_hint": ""}  # the help texts have the defaults


def is_first_process() -> bool:
    """Return whether this process may print: rank 0 of torchrun's processes, or the only one."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


def flags_class(text: str, fields: list[Any]) -> type:
    """Return a dataclass of a command's flags; help begins with `text`."""
    kind = make_dataclass("Flags", fields, frozen=True)
    kind.__doc__ = text
    return kind


def flag(
    field: str,
    kind: Any,
    default: Any,
    text: str,
    metavar: str | None = None,
    *,
    name: str | None = None,
) -> Any:
    """Return a flag for `flags_class`; help shows `text`, and `metavar` in place of the value.

    `name` is the flag's, if not its field's.
    """
    given = tyro.conf.arg(help=text, metavar=metavar, name=name, **_NO_HINT)
    return field, Annotated[kind, given], default


Texts = tyro.conf.Positional[tuple[str, ...]]
TEXTS_HELP = (
    "Files, folders, 'patterns*', - for standard input, or the data set tiny-shakespeare (default)."
)
_RUN = tyro.conf.arg(help="The run folder.", metavar="RUN", **_NO_HINT)
RUN: Any = ("run", Annotated[tyro.conf.Positional[Path], _RUN])
MODEL_FLAGS = [
    flag("which", CheckpointName, "best", "Which checkpoint. (best)"),
    flag("device", Device, "auto", "Where to compute. (auto)"),
]
JSON_FLAG = flag("json", bool, False, "Print one JSON object instead of a table.")


def settings_flags(shown_preset: str, *, auto: bool = True) -> list[Any]:
    """Return the flags of a run's settings: preset, file, and one flag per setting.

    `auto`: whether the command can choose them.
    """
    names = (flags.AUTO, *PRESETS) if auto else tuple(PRESETS)
    shown_preset = shown_preset if shown_preset in names else "tiny"
    presets = Literal[names]  # type: ignore[valid-type]
    preset_help = (
        f"Where all settings start ({shown_preset}); the values below are this preset's."
        + auto * " auto: what suits the text, the minutes and this machine."
    )
    shown = flags.shown_values(shown_preset)
    groups = [  # help has a box for each: model, train, data
        (name.removesuffix("_config"), flags.optional_flags(cls, shown[name]))
        for name, cls in flags.CONFIG_CLASSES.items()
    ]
    return [
        flag("preset", presets | None, None, preset_help, "|".join(names)),
        flag("config", Path | None, None, "Settings, a TOML file.", "FILE.toml"),
        *((name, kind, field(default_factory=dict)) for name, kind in groups),
    ]


def given_settings(command: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the TOML file and those of the flags, by field name."""
    file = flags.read_toml(command.config) if command.config else {}
    given = {**command.model, **command.train, **command.data}
    if "document_separator" in given:
        given["document_separator"] = unescaped(given["document_separator"])
    return file, given


def unescaped(text: str) -> str:
    r"""Replace a typed ``\n``, ``\r`` or ``\t`` (two characters) by the control character."""
    for typed, meant in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t")):
        text = text.replace(typed, meant)
    return text


def load_model(command: Any) -> Any:
    """Return the model and the tokenizer of the run that a command names."""
    from chargpt.compute.device import choose_device
    from chargpt.runs.folder import load

    return load(command.run, which=command.which, device=choose_device(command.device).device)


def one_line(text: str) -> str:
    """Return text on one line, with control characters escaped."""
    return visible(" ".join(text.split()))


def check_positive(**values: float) -> None:
    """Raise UserError for the first value that is not above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            flag_name = name.replace("_", "-")
            raise UserError(f"{flag_name} is {value}: give --{flag_name} a number above 0")


def print_message(message: object) -> None:
    """Print a message to stderr as one line that begins with ``chargpt:``."""
    print(f"chargpt: {one_line(str(message))}", file=sys.stderr)


def print_progress(line: str) -> None:
    """Print a line of progress to stderr; control characters are escaped."""
    print(one_line(line), file=sys.stderr, flush=True)
