"""``chargpt sample``: writes text with a trained model, or colours a text by its surprise."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal, TextIO

import tyro

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.base.files import replacing
from chargpt.base.terminal import for_stream
from chargpt.cli import flags, shared
from chargpt.cli.shared import flag, unescaped
from chargpt.config import OnOffAuto, SampleConfig


def make_flags(_: str) -> type:
    """Return the flags of ``sample`` as a dataclass."""
    docs = flags.field_docs(SampleConfig)
    settings = flags.optional_flags(
        SampleConfig, asdict(SampleConfig()), without=("stop", "logit_bias")
    )
    repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
    file_help = "Read the prompt from a file, unchanged; - is standard input."
    interactive_help = (
        "Type a line, and the model continues it; Ctrl-C ends a text, Ctrl-D ends the program."
    )
    surprise_help = (
        "Write no new text: show a text coloured by how unexpected each character is to the model; "
        "as a web page with --out PAGE.html."
    )
    stride_help = (
        "For --surprise: predict each character from at least block_size - stride others; 1 is "
        "best and slowest. (half of block_size)"
    )
    kernels_help = "C++ kernels for a CPU; auto turns them on where they work. (auto)"
    return shared.flags_class(
        "Write text with a trained model.",
        [
            shared.RUN,
            ("sampling", settings, field(default_factory=dict)),
            flag("stop", repeated, (), docs["stop"]),
            flag("logit_bias", repeated, (), docs["logit_bias"], "CHARACTER=NUMBER"),
            flag("prompt_file", str | None, None, file_help, "FILE"),
            flag("out", Path | None, None, "Write to a file instead of the terminal.", "FILE"),
            flag("interactive", bool, False, interactive_help),
            flag("surprise", str | None, None, surprise_help, "FILE"),
            flag("stride", int | None, None, stride_help, "INT"),
            *shared.MODEL_FLAGS,
            flag("kernels", OnOffAuto, "auto", kernels_help),
        ],
    )


def run(command: Any) -> int:
    """Write samples, continue typed lines, or show surprise; return the exit code."""
    _check(command)
    config = from_dict(SampleConfig, _given(command))
    text = None if command.surprise is None else _read(command.surprise)
    model, tokenizer = shared.load_model(command)
    if text is not None:
        _show_surprise(command, model, tokenizer, text, config)
    elif command.interactive:
        _talk(model, tokenizer, config, command.kernels)
    else:
        with _output(command.out) as file:
            print_samples(model, tokenizer, config, command.kernels, file)
    return 0


def _check(command: Any) -> None:
    """Refuse flags that exclude each other."""
    ways = {
        "--interactive": command.interactive,
        "--surprise": command.surprise is not None,
        "--prompt": "prompt" in command.sampling,
        "--prompt-file": command.prompt_file is not None,
    }
    chosen = [name for name, given in ways.items() if given]
    if len(chosen) > 1:
        raise UserError(f"{' and '.join(chosen)} exclude each other: give one")
    if command.interactive and command.out is not None:
        raise UserError("--interactive and --out exclude each other: give one")
    if command.stride is not None and command.surprise is None:
        raise UserError("--stride works only with --surprise: give that, too")
    page = command.out is None or command.out.suffix.lower() in (".html", ".htm")
    if command.surprise is not None and not page:
        raise UserError(f"--out is {command.out}: --surprise writes a web page, give NAME.html")


def _given(command: Any) -> dict[str, Any]:
    """Return the fields of `SampleConfig` that the command sets."""
    given = {**command.sampling, "stop": tuple(map(unescaped, command.stop)), "logit_bias": {}}
    for word in command.logit_bias:
        character, _, number = word.rpartition("=")
        try:
            given["logit_bias"][unescaped(character)] = float(number)
        except ValueError as error:
            message = f"--logit-bias is {word!r}: give CHARACTER=NUMBER, e.g. e=-2"
            raise UserError(message) from error
    if command.prompt_file is not None:
        given["prompt"] = _read(command.prompt_file)
    return given


def _read(name: str) -> str:
    """Return the text of a file, or of standard input, unchanged."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it") from error


@contextmanager
def _output(path: Path | None) -> Iterator[TextIO]:
    """Yield the stream to write to: stdout, or a file that appears only when it is complete."""
    if path is None:
        yield sys.stdout
        return
    try:
        device = path.exists() and not path.is_file()  # or a FIFO: write into it
        mode: Literal["w", "x"] = "w" if device else "x"
        target = Path(os.path.realpath(path))  # a link stays a link
        with (
            nullcontext(path) if device else replacing(target) as place,
            place.open(mode, encoding="utf-8", errors="replace", newline="") as file,
        ):
            yield file
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give --out FILE") from error


def print_samples(
    model: Any, tokenizer: Any, config: SampleConfig, kernels: OnOffAuto, file: TextIO
) -> None:
    """Print all samples in order, each piece as soon as the samples before it are finished."""
    from chargpt.generate import generate

    pieces = generate(model, tokenizer, [config.prompt], config, kernels=kernels)
    n, start = config.num_samples, config.prompt if config.echo else ""
    heads = [f"--- sample {i + 1}\n{start}" if n > 1 else start for i in range(n)]
    unprinted = defaultdict(str, enumerate(heads))
    finished: set[int] = set()
    turn = 0
    _print_text(unprinted.pop(turn), file)
    for completion, piece in pieces:
        unprinted[completion.number] += piece
        if completion.finish:
            unprinted[completion.number] += "\n"
            finished.add(completion.number)
        while turn in unprinted:
            _print_text(unprinted.pop(turn), file)
            turn += turn in finished


def _print_text(text: str, file: TextIO) -> None:
    print(for_stream(text, file), end="", file=file, flush=True)


def _talk(model: Any, tokenizer: Any, config: SampleConfig, kernels: OnOffAuto) -> None:
    """Continue each line that is typed, until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` history and editing)

    from chargpt.base.seeding import SAMPLE, derive_seed
    from chargpt.generate import generate

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # `input` must not fail on any bytes
    number = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        try:
            line.encode()
            seeds = [derive_seed(config.seed, SAMPLE, number)]
            pieces = generate(model, tokenizer, [line], config, seeds=seeds, kernels=kernels)
            _print_text(line if config.echo else "", sys.stdout)
            for _, piece in pieces:
                _print_text(piece, sys.stdout)
            print()
        except UserError as error:
            shared.print_message(error)
        except UnicodeEncodeError:  # bytes that `input` could not decode
            shared.print_message("the line is not UTF-8: convert it")
        except KeyboardInterrupt:
            print()
        number += 1


def _show_surprise(
    command: Any, model: Any, tokenizer: Any, text: str, config: SampleConfig
) -> None:
    from chargpt.engine.scoring import score
    from chargpt.measure.surprise import surprise_ansi, surprise_page

    half = max(1, model.config.block_size // 2)
    stride = half if command.stride is None else command.stride
    scores = score(model, tokenizer, text, stride=stride, unknown=config.unknown)
    if command.out is None:
        print(surprise_ansi(text, scores, colour=sys.stdout.isatty()))
        return
    with _output(command.out) as file:
        file.write(surprise_page(text, scores, title=Path(command.surprise).name))
