"""What several commands share: exit codes, kinds of flags, and the settings of a run."""

from __future__ import annotations

from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chargpt.cli import flags
from chargpt.config import PRESETS

EXIT_USER, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 1, 130, 143


def arg(text: str, metavar: str | None = None) -> Any:
    """Return what an annotation says of a flag: its help, and what stands for its value."""
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


# --- kinds of flags

Texts = tyro.conf.Positional[tuple[str, ...]]
TEXTS_HELP = (
    "Files, folders, 'patterns*', - for standard input, or the data set tiny-shakespeare (default)."
)
RunFolder = Annotated[tyro.conf.Positional[Path], arg("The run folder.", "RUN")]


# --- the settings of a run: flags, and what was given


def origins(shown_preset: str) -> list[Any]:
    """Return the fields that say where all settings start."""
    presets = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
    preset_help = f"Where all settings start ({shown_preset}); the values below are this preset's."
    return [
        ("preset", Annotated[presets | None, arg(preset_help, metavar="|".join(PRESETS))], None),
        ("config", Annotated[Path | None, arg("Settings, a TOML file.", "FILE.toml")], None),
    ]


def settings(shown_preset: str) -> list[Any]:
    """Return a field for each of ``flags.RUN_CONFIGS``, with a flag for each of its settings."""
    shown = {part: asdict(config) for part, config in flags.preset(shown_preset).items()}
    return [
        (part, flags.optional_flags(cls, shown[part]), field(default_factory=dict))
        for part, cls in flags.RUN_CONFIGS.items()
    ]


def given_settings(command: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the file and those of the flags, by name."""
    file = flags.read_toml(command.config) if command.config else {}
    given = {**command.model_config, **command.train_config, **command.data_config}
    if "document_separator" in given:
        given["document_separator"] = unescaped(given["document_separator"])
    return file, given


def unescaped(text: str) -> str:
    r"""Let line ends and tabs be typed as ``'\n'``, which most shells pass on as two characters."""
    for typed, meant in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t")):
        text = text.replace(typed, meant)
    return text
