"""The command line: ``chargpt train``, ``sample``, ``eval``, ``novelty``, ``check``, ``bench``.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 2 the user's mistake, 1
anything else, 130 and 143 interrupted. torch is imported when a command runs, not to print help.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

from chargpt import __version__
from chargpt.base.errors import ChargptWarning, TrainingError, UserError
from chargpt.base.terminal import visible
from chargpt.cli import bench, check, eval, flags, novelty, sample, train
from chargpt.cli.shared import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER
from chargpt.config import PRESETS


class Command(Protocol):
    """What a file in ``commands`` has."""

    def make_flags(self, shown_preset: str, /) -> type:
        """Return a dataclass of the command's flags; help shows the values of a preset."""

    def run(self, command: Any) -> int:
        """Do what an instance of that dataclass says, and return the exit code.

        Raises:
            UserError: anything wrong with what it names.
            TrainingError: training cannot go on.
        """


COMMANDS: dict[str, Command] = {
    "train": train,
    "sample": sample,
    "eval": eval,
    "novelty": novelty,
    "check": check,
    "bench": bench,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal may lack a character of the text
    with warnings.catch_warnings():
        warnings.simplefilter("always", ChargptWarning)
        warnings.showwarning = _one_line(warnings.showwarning)
        sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str]) -> int:
    """Run a command; tell what goes wrong, and return the code for it."""
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
    return code


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
    arguments = flags.spell_out(arguments, "--resume", ("auto",), implied="yes")
    shown_preset = _preset_in(arguments)
    kinds = {verb: command.make_flags(shown_preset) for verb, command in COMMANDS.items()}
    parsed = flags.parse(kinds, arguments)
    verb = next(verb for verb, kind in kinds.items() if type(parsed) is kind)
    return COMMANDS[verb].run(parsed)


def _preset_in(arguments: Sequence[str]) -> str:
    """Return the preset that is named, whose values help shows."""
    names = [a.removeprefix("--preset=") for a in arguments if a.startswith("--preset=")]
    names += [b for a, b in pairwise(arguments) if a == "--preset"]
    return names[-1] if names and names[-1] in PRESETS else "tiny"


def _one_line(show: Callable[..., None]) -> Callable[..., None]:
    """Return what shows a `ChargptWarning` as a line for a person, and any other as `show` does."""

    def show_warning(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, ChargptWarning):
            print(f"chargpt: {visible(' '.join(str(message).split()))}", file=sys.stderr)
        else:
            show(message, category, *rest, **more)

    return show_warning


def _fail(error: Exception, code: int) -> int:
    print(f"chargpt: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    return code
