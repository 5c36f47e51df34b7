"""The command line: one command for each module in `MODULES`.

Results go to stdout, everything else to stderr. Exit codes: 0 success, 2 a mistake of the user,
1 any other failure, 130 and 143 interrupted. A command imports torch when it runs; help does not.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from chargpt import __version__
from chargpt.base.errors import (
    ChargptWarning,
    TrainingError,
    UserError,
    VerificationError,
    is_out_of_memory,
)
from chargpt.cli import (
    bench,
    check,
    eval,
    export,
    flags,
    import_,
    novelty,
    plan,
    sample,
    serve,
    train,
)
from chargpt.cli.flags import AUTO
from chargpt.cli.shared import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER,
    is_first_process,
    print_message,
)
from chargpt.config import PRESETS

# Each has make_flags(shown_preset), a dataclass of its flags, and run(flags), an exit code. A
# command has the name of its module, without the underscore of `import_`.
MODULES = (train, sample, eval, novelty, check, bench, plan, export, import_, serve)
COMMANDS = {module.__name__.rpartition(".")[2].rstrip("_"): module for module in MODULES}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    # PyTorch's threads wait for each other in a loop, by default for milliseconds. Beside another
    # busy program, that makes a step many times slower. It counts when torch is imported: later.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # the terminal may not have every character
    with warnings.catch_warnings():
        warnings.simplefilter("always", ChargptWarning)
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        sys.exit(_exit_code(arguments))


def _exit_code(arguments: Sequence[str]) -> int:
    """Run a command, print an expected failure as one line, and return the exit code."""
    try:
        code = run(arguments)
        sys.stdout.flush()
        return code
    except (UserError, TrainingError, VerificationError) as error:
        print_message(error)
        return EXIT_USER if isinstance(error, UserError) else EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `chargpt sample … | head` is not a failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "give a shorter text, fewer samples or a smaller model"
        print_message(f"out of memory: close other programs, or {remedy}")
        return EXIT_FAILED


def run(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; raises UserError or TrainingError."""
    if list(arguments) in (["--version"], ["-V"]):
        print(f"chargpt {__version__}")
        return 0
    arguments = flags.complete_resume(arguments or ["--help"])
    shown_preset = _preset_in(arguments)
    kinds = {verb: command.make_flags(shown_preset) for verb, command in COMMANDS.items()}
    parsed = flags.parse(kinds, arguments)
    verb = next(verb for verb, kind in kinds.items() if type(parsed) is kind)
    return int(COMMANDS[verb].run(parsed))


def _preset_in(arguments: Sequence[str]) -> str:
    """Return the preset given on the command line; help shows its values."""
    names = [a.removeprefix("--preset=") for a in arguments if a.startswith("--preset=")]
    names += [b for a, b in pairwise(arguments) if a == "--preset"]
    return names[-1] if names and names[-1] in PRESETS else AUTO


def _show_warning(others: Any, message: Any, category: type[Warning], *rest: Any) -> None:
    """Print a `ChargptWarning` as one line; the function `others` shows all others."""
    if issubclass(category, ChargptWarning):
        if is_first_process():
            print_message(message)
    else:
        others(message, category, *rest)
