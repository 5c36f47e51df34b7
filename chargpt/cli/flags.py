"""Command-line flags and configuration files, derived from the dataclasses of ``config``.

A field is a flag: name, type, choices and help text come from the field and the sentence under it,
so that a default exists once. A flag that is not given is absent, which is what lets a preset, a
file and the flags lie over one another.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import tyro

from chargpt.base.checks import check_names
from chargpt.base.errors import UserError
from chargpt.config import BUDGETS, PRESETS, DataConfig, GPT2Config, TrainConfig

RUN_CONFIGS = {
    "model_config": GPT2Config,
    "train_config": TrainConfig,
    "data_config": DataConfig,
}


def field_docs(cls: type) -> dict[str, str]:
    """Return the sentence under each field of a dataclass."""
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


def spell_out(
    arguments: Sequence[str], flag: str, values: Sequence[str], implied: str
) -> list[str]:
    """Give a flag that stands alone the value that it implies, which tyro cannot."""
    following = [*arguments[1:], ""]
    return [
        f"{flag}={implied}" if argument == flag and after not in values else argument
        for argument, after in zip(arguments, following, strict=True)
    ]


def optional_flags(cls: type, shown: Mapping[str, Any], *, without: Sequence[str] = ()) -> Any:
    """Return a type for tyro with a flag for each field of a dataclass, none of them required.

    Args:
        cls: the dataclass.
        shown: what the help says is there without the flag, by field name.
        without: fields that get no flag.
    """
    docs, hints = field_docs(cls), typing.get_type_hints(cls)
    flags: dict[str, Any] = {}
    for field in (field for field in dataclasses.fields(cls) if field.name not in without):
        hint = _without_none(hints[field.name])
        default = shown.get(field.name)
        said = f"({default!r})" if isinstance(default, str) else f"({default})"
        empty = default is None or default == ()
        argument = tyro.conf.arg(
            help=docs[field.name].replace("%", "%%"), help_behavior_hint="" if empty else said
        )
        flags[field.name] = Annotated[hint, argument]
    make: Any = TypedDict  # its functional form with computed fields is beyond type checkers
    return Annotated[make(cls.__name__, flags, total=False), tyro.conf.OmitArgPrefixes]


def _without_none(hint: Any) -> Any:
    """Turn ``int | None`` into ``int``: a flag that is absent says None."""
    if typing.get_origin(hint) is not types.UnionType:
        return hint
    return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)


def parse(commands: Mapping[str, Any], arguments: Sequence[str]) -> Any:
    """Parse a command line into an instance of one of the `commands`.

    ``--help`` prints and exits with 0.

    Raises:
        UserError: anything that does not parse, in one line, with the nearest flag or choice.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
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
        raise UserError(_one_line(said.getvalue(), verb, commands, arguments)) from stop


def _one_line(box: str, verb: str, commands: Mapping[str, Any], arguments: Sequence[str]) -> str:
    """Turn tyro's framed message into one line: what is wrong, and what to do."""
    # A title, then paragraphs between rules; frames and rules are plain dashes on a plain terminal.
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    lines = ["" if set(line) <= set("─-╰╯+") else line for line in lines]
    lines = lines[next((i for i, line in enumerate(lines) if line), 0) :]
    end = lines.index("") if "" in lines else len(lines)
    message = " ".join(lines[:end]).rstrip(".")
    if not verb:
        word = arguments[0] if arguments else ""
        near = difflib.get_close_matches(word, commands, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"give one of {', '.join(commands)}"
        return f"unknown command {word!r}: {remedy}" if word else f"no command: {remedy}"
    suggested = [line.split()[0] for line in lines[end:] if line.startswith("--")]
    if "Perhaps you meant" in box and suggested:
        return f"{message}: did you mean {suggested[0]}?"
    return f"{message}: see chargpt {verb} --help"


# --- preset < file < flags


def read_toml(path: Path) -> dict[str, Any]:
    """Return the settings of a TOML file by name; tables such as [model] are only for the reader.

    Raises:
        UserError: the file is missing, is not TOML, or has a setting that there is not.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--config {path} cannot be read ({error.strerror}): give a file"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML ({error}): write lines such as n_layer = 6") from error
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= value if isinstance(value, dict) else {name: value}
    try:
        check_names(flat, ["preset", *_fields()])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return flat


def resolve(
    base: Mapping[str, Any], file: Mapping[str, Any], flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Lay a file and flags over configurations.

    Args:
        base: a configuration for each name in `RUN_CONFIGS`.
        file: settings by field name.
        flags: settings by field name; these win. A budget here displaces another one there.

    Returns:
        The configurations, by the names of `base`.

    Raises:
        UserError: a value of the wrong type or range.
    """
    if flags.keys() & set(BUDGETS):
        file = {name: value for name, value in file.items() if name not in BUDGETS}
    changes = {**file, **flags}
    resolved: dict[str, Any] = {}
    for part, config in base.items():
        own = {name: changes[name] for name in changes if hasattr(config, name)}
        resolved[part] = config.replace(**own) if own else config
    return resolved


def preset(name: str) -> dict[str, Any]:
    """Return the configurations of a preset, by the names of `RUN_CONFIGS`.

    Raises:
        UserError: there is no such preset.
    """
    check_names([name], PRESETS)
    chosen = PRESETS[name]()
    return {
        "model_config": chosen.model_config,
        "train_config": chosen.train_config,
        "data_config": DataConfig(),
    }


def saved(run: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the configurations of a run, by the names of `RUN_CONFIGS`, and its texts.

    Raises:
        UserError: the run is damaged, or of another format.
    """
    from chargpt.runs.folder import read_config, text_sources  # here, for help without torch

    config = read_config(run)
    # The vocabulary follows the text, which is compared with the run's.
    configs = {name: getattr(config, name) for name in RUN_CONFIGS}
    configs["model_config"] = config.model_config.replace(vocab_size=0)
    return configs, text_sources(config)


def _fields() -> list[str]:
    return [field.name for cls in RUN_CONFIGS.values() for field in dataclasses.fields(cls)]
