"""The command line: ``chargpt train``, ``sample``, ``eval``, ``bench``.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 the user's mistake, 1
anything else, 130 and 143 interrupted. torch is imported when a command runs, not to print help.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, field, make_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from chargpt import __version__, flags
from chargpt.config import PRESETS, Device, SampleConfig, Unknown
from chargpt.errors import TrainingError, UserError
from chargpt.validation import from_dict

Which = Literal["best", "last"]
EXIT_USER, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 1, 130, 143


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a character of the text
    try:
        code = run(arguments)
        sys.stdout.flush()
    except UserError as error:
        code = _fail(error, EXIT_USER)
    except TrainingError as error:
        code = _fail(error, EXIT_FAILED)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # `chargpt sample … | head`: nobody reads on, which is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code.

    Raises:
        UserError: anything wrong with the command line or what it names.
        TrainingError: training cannot go on.
    """
    if list(arguments) in (["--version"], ["-V"]):
        print(f"chargpt {__version__}")
        return 0
    if not arguments:
        arguments = ["--help"]
    command = flags.parse(_commands(arguments), arguments)
    commands = {"Train": _train, "Sample": _sample, "Eval": _eval, "Bench": _bench}
    return commands[type(command).__name__](command)


def _fail(error: Exception, code: int) -> int:
    print(f"chargpt: {' '.join(str(error).split())}", file=sys.stderr)
    return code


# --- the commands and their flags


def _arg(text: str, metavar: str | None = None) -> Any:
    return tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint="")


Texts = tyro.conf.Positional[tuple[str, ...]]


def _commands(arguments: Sequence[str]) -> dict[str, Any]:
    """Return a dataclass for each command; help shows the values of the preset in `arguments`."""
    shown_preset = _preset_in(arguments)
    return {
        "train": _train_flags(shown_preset),
        "sample": _sample_flags(),
        "eval": Eval,
        "bench": _bench_flags(shown_preset),
    }


def _preset_in(arguments: Sequence[str]) -> str:
    names = [a.removeprefix("--preset=") for a in arguments if a.startswith("--preset=")]
    names += [b for a, b in pairwise(arguments) if a == "--preset"]
    return names[-1] if names and names[-1] in PRESETS else "tiny"


def _train_flags(shown_preset: str) -> type:
    out_help = "The run folder (a new one below runs/)."
    command = make_dataclass(
        "Train",
        [
            ("texts", Annotated[Texts, _arg(_TEXTS_HELP, "[TEXT ...]")], ()),
            *_origins(shown_preset),
            ("out", Annotated[Path | None, _arg(out_help, "FOLDER")], None),
            ("resume", Annotated[bool, _arg("Go on with the run in --out.")], False),
            *_settings(shown_preset),
        ],
        frozen=True,
    )
    command.__doc__ = (
        "Train a model on text and leave a run folder. Settings come from a preset; a file "
        "(--config) wins over it, a flag over both."
    )
    return command


def _origins(shown_preset: str) -> list[Any]:
    """Return the fields that say where all settings start."""
    presets = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
    preset_help = f"Where all settings start ({shown_preset}); the values below are this preset's."
    return [
        ("preset", Annotated[presets | None, _arg(preset_help, metavar="|".join(PRESETS))], None),
        ("config", Annotated[Path | None, _arg("Settings, a TOML file.", "FILE.toml")], None),
    ]


def _settings(shown_preset: str) -> list[Any]:
    """Return a field for each of ``flags.RUN_CONFIGS``, with a flag for each of its settings."""
    shown = {part: asdict(config) for part, config in flags.preset(shown_preset).items()}
    return [
        (part, flags.optional_flags(cls, shown[part]), field(default_factory=dict))
        for part, cls in flags.RUN_CONFIGS.items()
    ]


_TEXTS_HELP = (
    "Files, folders, 'patterns*', - for standard input, or the data set tiny-shakespeare (default)."
)


RunFolder = Annotated[tyro.conf.Positional[Path], _arg("The run folder.", "RUN")]


def _sample_flags() -> type:
    stop_help = flags.field_docs(SampleConfig)["stop"]
    settings = flags.optional_flags(SampleConfig, asdict(SampleConfig()), without=("stop",))
    command = make_dataclass(
        "Sample",
        [
            ("run", RunFolder),
            ("sampling", settings, field(default_factory=dict)),
            ("stop", Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], _arg(stop_help)], ()),
            ("which", Annotated[Which, tyro.conf.arg(help="Which checkpoint.")], "best"),
            ("device", Annotated[Device, tyro.conf.arg(help="Where to compute.")], "auto"),
        ],
        frozen=True,
    )
    command.__doc__ = "Write text with a trained model."
    return command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """Print a model's loss on a text, beside what cheap methods reach."""

    run: RunFolder
    files: Annotated[
        Texts,
        _arg("Texts; none: a split of the training text.", "[FILE ...]"),
    ] = ()
    split: Literal["validation", "train"] = "validation"
    """Which part of the training text."""
    which: Which = "best"
    """Which checkpoint."""
    device: Device = "auto"
    """Where to compute."""
    encoding: Annotated[str | None, _arg("Of the files (as in training).", "NAME")] = None
    unknown: Unknown = "error"
    """What to do with characters that the model has never seen."""
    json: bool = False
    """Print one JSON object instead of a table."""


def _bench_flags(shown_preset: str) -> type:
    texts_help = f"What to reach --loss on. {_TEXTS_HELP}"
    loss_help = (
        "Train on TEXT, too, with the whole budget, and tell after how many seconds of training "
        "the validation loss was this low, in nats a character."
    )
    peer_help = "Measure a local clone beside it, run as it is in a copy. May be given repeatedly."
    peers = tyro.conf.UseAppendAction[tuple[str, ...]]
    command = make_dataclass(
        "Bench",
        [
            ("texts", Annotated[Texts, _arg(texts_help, "[TEXT ...]")], ()),
            *_origins(shown_preset),
            ("rounds", Annotated[int, _arg("Turns that each contender takes. (3)")], 3),
            ("seconds", Annotated[float, _arg("Of a turn. (5.0)")], 5.0),
            ("peer", Annotated[peers, _arg(peer_help, "nanogpt=FOLDER")], ()),
            ("loss", Annotated[float | None, _arg(loss_help, "FLOAT")], None),
            ("json", Annotated[bool, _arg("Print one JSON object instead of a table.")], False),
            *_settings(shown_preset),
        ],
        frozen=True,
    )
    command.__doc__ = (
        "Measure this machine: products of matrices, training in characters a second on random "
        "text, its share of the products' speed, its parts, and Hugging Face's GPT-2 of the same "
        "shape. Settings are those of train."
    )
    return command


# --- train


def _train(command: Any) -> int:
    file, given = _given(command)
    chosen = command.preset or file.pop("preset", None)
    base, texts = _base(command, chosen)
    configs = flags.resolve(base, file, given)

    from chargpt.run import train

    result = train(
        texts,
        model=configs["model"],
        training=configs["training"],
        data=configs["data"],
        out=command.out,
        resume=command.resume,
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


def _given(command: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of the file and those of the flags, by name."""
    file = flags.read_toml(command.config) if command.config else {}
    return file, _unescaped({**command.model, **command.training, **command.data})


def _base(command: Any, chosen: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return where the settings start, and the texts: a preset's, or those of a run to resume."""
    saved = command.out / "config.json" if command.resume and command.out else None
    if command.resume and command.out is None:
        raise UserError("--resume needs the run to go on with: give --out FOLDER")
    if saved is not None and not saved.is_file() and not command.texts:
        raise UserError(f"{command.out} holds no run to go on with: check --out, or name a text")
    if saved is None or not saved.is_file():
        return flags.preset(chosen or "tiny"), command.texts or ("tiny-shakespeare",)
    if chosen is not None:
        raise UserError("a preset is for a new run; this one goes on as it began: leave it out")
    return flags.saved(command.out), command.texts or flags.saved_sources(command.out)


def _unescaped(given: dict[str, Any]) -> dict[str, Any]:
    r"""Let a separator be typed as ``'\n'``, which most shells pass on as two characters."""
    separator = given.get("document_separator")
    if separator is not None:
        for typed, meant in ((r"\r", "\r"), (r"\n", "\n"), (r"\t", "\t")):
            separator = separator.replace(typed, meant)
        given["document_separator"] = separator
    return given


def _print_sample(result: Any) -> None:
    from chargpt.generation import generate_text

    print()
    for piece in generate_text(result.model, result.tokenizer, SampleConfig()):
        print(piece, end="", flush=True)
    print()


# --- sample


def _sample(command: Any) -> int:
    config = from_dict(SampleConfig, {**command.sampling, "stop": command.stop})

    from chargpt.checkpoint import load
    from chargpt.generation import generate_text
    from chargpt.hardware import choose_device

    device = choose_device(command.device).device
    model, tokenizer = load(command.run, which=command.which, device=device)
    for number in range(config.num_samples):
        pieces = generate_text(model, tokenizer, config, number=number)
        if config.num_samples > 1:
            print(f"--- sample {number + 1}")
        print(config.prompt, end="", flush=True)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    return 0


# --- eval


def _eval(command: Eval) -> int:
    from chargpt.scorecard import score_run

    card = score_run(
        command.run,
        command.files,
        split=command.split,
        which=command.which,
        device=command.device,
        encoding=command.encoding,
        unknown=command.unknown,
    )
    if command.json:
        rows = {row.name: row.bits_per_char for row in card.baselines}
        print(json.dumps({**asdict(card), "baselines": rows}))
        return 0
    print(f"{card.text}: {card.n_tokens:,} tokens")
    model_row = (f"{command.run} ({command.which})", card.bits_per_char)
    rows_of_table = (model_row, *card.baselines)
    width = max(len(name) for name, _ in rows_of_table)
    print(f"{'':{width}}{'nats/char':>11}{'bits/char':>11}{'perplexity':>12}")
    for name, bits in rows_of_table:
        print(f"{name:{width}}{bits * math.log(2):11.4f}{bits:11.4f}{2**bits:12.2f}")
    if card.note:
        print(f"chargpt: {card.note}", file=sys.stderr)
    return 0


# --- bench


def _bench(command: Any) -> int:
    file, given = _given(command)
    chosen = command.preset or file.pop("preset", None) or "tiny"
    configs = flags.resolve(flags.preset(chosen), file, given)
    if command.texts and command.loss is None:
        raise UserError(f"{command.texts[0]} is only read to reach a loss: give --loss, too")

    from chargpt.bench import BenchConfig, bench, table

    report = bench(
        command.texts or ("tiny-shakespeare",),
        model=configs["model"],
        training=configs["training"],
        data=configs["data"],
        config=BenchConfig(
            rounds=command.rounds,
            seconds=command.seconds,
            peers=command.peer,
            loss=command.loss,
        ),
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(json.dumps(report) if command.json else table(report))
    return 0
