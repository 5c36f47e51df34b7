"""Command-line flags and TOML settings, derived from the dataclasses of ``chargpt.config``.

Each field is a flag: name, type, choices and help text come from the field and its docstring, so
that a default is written once. A flag that is not given is absent from the result. That is how
flags override a TOML file, and the file a preset.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from chargpt.base.checks import check_names, did_you_mean
from chargpt.base.errors import UserError
from chargpt.config import BUDGETS, PRESETS, DataConfig, GPT2Config, TrainConfig
from chargpt.training.size import CHOSEN, of_class

AUTO = "auto"
"""In place of a preset: `chargpt.training.size` chooses."""
CONFIG_CLASSES = {
    "model_config": GPT2Config,
    "train_config": TrainConfig,
    "data_config": DataConfig,
}


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, by field name."""
    body = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, below in zip(body.body, body.body[1:], strict=False):
        match statement, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(
                value=ast.Constant(value=str(doc))
            ):
                docs[name] = " ".join(doc.split())
    return docs


def complete_resume(arguments: Sequence[str]) -> list[str]:
    """Turn a ``--resume`` without a value into ``--resume=yes``; tyro has no optional values."""
    return [
        "--resume=yes" if argument == "--resume" and after != "auto" else argument
        for argument, after in pairwise([*arguments, ""])
    ]


def optional_flags(cls: type, shown: Mapping[str, Any], *, without: Sequence[str] = ()) -> Any:
    """Return a tyro type with one optional flag per field of a dataclass but those in `without`.

    Help shows the defaults `shown`, by field name.
    """
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    flags: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(cls) if field.name not in without):
        hint, default = hints[name], shown.get(name)
        if typing.get_origin(hint) is types.UnionType:  # X | None: an absent flag means None
            hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
        shown_default = "" if default in (None, ()) else f"({default!r})"
        help_of = tyro.conf.arg(help=docs[name], help_behavior_hint=shown_default)
        flags[name] = Annotated[hint, help_of]
    make: Any = TypedDict  # type checkers reject computed fields
    return Annotated[make(cls.__name__, flags, total=False), tyro.conf.OmitArgPrefixes]


def parse(commands: Mapping[str, Any], arguments: Sequence[str]) -> Any:
    """Parse a command line into an instance of one of the `commands`, dataclasses by verb.

    ``--help`` prints and exits with 0. A UserError names the nearest flag or choice.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog="chargpt",
                description="Train a character-level GPT-2 on any text.",
                args=list(arguments),
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        verb = arguments[0] if arguments and arguments[0] in commands else ""
        raise UserError(_parse_error(printed.getvalue(), verb, commands, arguments)) from stop


def _parse_error(box: str, verb: str, commands: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """Turn tyro's framed message into one line: the mistake and the remedy."""
    if not verb:
        return f"unknown command {arguments[0]!r}{did_you_mean(arguments[0], commands)}"
    # A missing argument stands on a line of its own, with its help below, further to the right.
    missing = re.findall(r"^[│ ] {5}(\S.*?) *│?$", box.partition("For full helptext")[0], re.M)
    if "Missing from" in box and missing:
        return f"missing: {', '.join(missing)}; see chargpt {verb} --help"
    # The box has a title and paragraphs between rules. A plain terminal gets dashes for frames.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    lines = ["" if set(line) <= set("─-╰╯+") else line for line in lines]
    lines = lines[next((i for i, line in enumerate(lines) if line), 0) :]
    end = lines.index("") if "" in lines else len(lines)
    message = " ".join(lines[:end]).rstrip(".")
    suggested = [line.split()[0] for line in lines[end:] if line.startswith("--")]
    if "Perhaps you meant" in box and suggested:
        return f"{message}: did you mean {suggested[0]}?"
    return f"{message}: see chargpt {verb} --help"


# --- preset < file < flags


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file by field name; table headers such as [model] are ignored.

    A missing file, another syntax and an unknown setting are a UserError.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"--config {path} cannot be read ({error.strerror}): give a file"
        raise UserError(message) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML ({error}): write lines such as n_layer = 6") from error
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    try:
        fields = [f.name for cls in CONFIG_CLASSES.values() for f in dataclasses.fields(cls)]
        check_names(flat, ["preset", *fields])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return flat


def merge_settings(
    configs: Mapping[str, Any], file: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Return configurations with settings by field name applied: those of a file, then of flags.

    A budget in the flags replaces any budget in the file. A value of the wrong type or range is a
    UserError.
    """
    settings = _joined(file, flags)
    return {
        name: config.replace(**{k: v for k, v in settings.items() if hasattr(config, k)})
        for name, config in configs.items()
    }


def split_settings(
    file: Mapping[str, Any], flags: Mapping[str, Any]
) -> tuple[DataConfig, dict[str, Any]]:
    """Return how texts are read, and the other settings by field name; else as `merge_settings`."""
    settings = _joined(file, flags)
    data = of_class(DataConfig, settings)
    return DataConfig(**data), {k: v for k, v in settings.items() if k not in data}


def _joined(file: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    if flags.keys() & set(BUDGETS):
        file = {name: value for name, value in file.items() if name not in BUDGETS}
    return {**file, **flags}


def shown_values(preset: str) -> dict[str, dict[str, Any]]:
    """Return the values that help shows, by the names of `CONFIG_CLASSES` and field."""
    configs = preset_configs("tiny" if preset == AUTO else preset)
    chosen = dict.fromkeys(CHOSEN, AUTO) if preset == AUTO else {}
    return {name: asdict(config) | chosen for name, config in configs.items()}


def preset_configs(name: str) -> dict[str, Any]:
    """Return a preset's configurations, by the names of `CONFIG_CLASSES`."""
    check_names([name], PRESETS)
    preset = PRESETS[name]()
    configs = (preset.model_config, preset.train_config, DataConfig())
    return dict(zip(CONFIG_CLASSES, configs, strict=True))


def saved_configs(run: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a run's configurations, by the names of `CONFIG_CLASSES`, and its texts, if any.

    A run that is damaged or has another format is a UserError.
    """
    from chargpt.runs.folder import read_config, text_sources  # here: help must not import torch

    config = read_config(run)
    configs = {name: getattr(config, name) for name in CONFIG_CLASSES}
    # 0 takes the vocabulary from the text, and the text must be the run's.
    configs["model_config"] = config.model_config.replace(vocab_size=0)
    return configs, () if config.imported_from else text_sources(config)
