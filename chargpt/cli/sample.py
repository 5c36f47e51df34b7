"""``chargpt sample``: text written with a trained model, or a text coloured by its surprise."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

import tyro

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.base.terminal import for_stream, visible
from chargpt.cli import flags
from chargpt.cli.shared import RunFolder, arg, unescaped
from chargpt.config import CheckpointName, Device, OnOffAuto, SampleConfig

REPEATED = ("stop", "logit_bias")


def make_flags(_: str) -> type:
    """Return the flags of ``sample`` as a dataclass."""
    docs = flags.field_docs(SampleConfig)
    settings = flags.optional_flags(SampleConfig, asdict(SampleConfig()), without=REPEATED)
    repeated = tyro.conf.UseAppendAction[tuple[str, ...]]
    file_help = "Read the prompt from a file as it is; - is standard input."
    out_help = "Write to a file instead of the terminal."
    talk_help = "Type a line, the model goes on; Ctrl-C ends a text, Ctrl-D leaves."
    surprise_help = (
        "Write nothing new: show a text coloured by how unexpected the model finds each character; "
        "as a web page with --out PAGE.html."
    )
    stride_help = (
        "Of --surprise: characters are predicted from at least block_size - stride others; 1 is "
        "best and slowest. (half of block_size)"
    )
    kernels_help = "C++ kernels for a CPU; auto is on where they work (Linux). (auto)"
    command = make_dataclass(
        "Sample",
        [
            ("run", RunFolder),
            ("sampling", settings, field(default_factory=dict)),
            ("stop", Annotated[repeated, arg(docs["stop"])], ()),
            ("logit_bias", Annotated[repeated, arg(docs["logit_bias"], "CHARACTER=NUMBER")], ()),
            ("prompt_file", Annotated[str | None, arg(file_help, "FILE")], None),
            ("out", Annotated[Path | None, arg(out_help, "FILE")], None),
            ("interactive", Annotated[bool, arg(talk_help)], False),
            ("surprise", Annotated[str | None, arg(surprise_help, "FILE")], None),
            ("stride", Annotated[int | None, arg(stride_help, "INT")], None),
            ("which", Annotated[CheckpointName, tyro.conf.arg(help="Which checkpoint.")], "best"),
            ("device", Annotated[Device, tyro.conf.arg(help="Where to compute.")], "auto"),
            ("kernels", Annotated[OnOffAuto, arg(kernels_help)], "auto"),
        ],
        frozen=True,
    )
    command.__doc__ = "Write text with a trained model."
    return command


def run(command: Any) -> int:
    """Write samples, talk, or show surprise; return the exit code."""
    _check(command)
    given = {**command.sampling, "stop": command.stop, "logit_bias": _biases(command.logit_bias)}
    if command.prompt_file is not None:
        given["prompt"] = _read(command.prompt_file)
    config = from_dict(SampleConfig, given)
    text = None if command.surprise is None else _read(command.surprise)

    from chargpt.compute.device import choose_device
    from chargpt.runs.folder import load

    device = choose_device(command.device).device
    model, tokenizer = load(command.run, which=command.which, device=device)
    if text is not None:
        _show_surprise(command, model, tokenizer, text, config)
    elif command.interactive:
        _talk(model, tokenizer, config, command.kernels)
    else:
        with _opened(command.out) as file:
            _print_samples(model, tokenizer, config, command.kernels, file)
    return 0


# --- what was given


def _check(command: Any) -> None:
    """Refuse flags that exclude each other.

    Raises:
        UserError: naming the two.
    """
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
        raise UserError("--stride belongs to --surprise: give that, too")
    if command.surprise is not None and command.out is not None:
        page = command.out.suffix.lower() in (".html", ".htm")
        if not page:
            raise UserError(f"--out is {command.out}: surprise is kept as a page, give NAME.html")


def _biases(given: Sequence[str]) -> dict[str, float]:
    biases: dict[str, float] = {}
    for word in given:
        character, _, number = word.rpartition("=")
        try:
            biases[unescaped(character)] = float(number)
        except ValueError as error:
            raise UserError(
                f"--logit-bias is {word!r}: give CHARACTER=NUMBER, e.g. e=-2"
            ) from error
    return biases


def _read(name: str) -> str:
    """Return a file's text, or that of standard input, as it is."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 (byte {error.start}): convert it") from error


@contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    """Yield where to write; a file appears only when it is whole."""
    if path is None:
        yield sys.stdout
        return
    half = path.with_name(f".{path.name}.half")
    try:
        half.unlink(missing_ok=True)
        with half.open("x", encoding="utf-8", errors="replace", newline="") as file:
            yield file
        half.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give --out FILE") from error
    finally:
        with suppress(OSError):
            half.unlink(missing_ok=True)


# --- what is done


def _print_samples(
    model: Any, tokenizer: Any, config: SampleConfig, kernels: OnOffAuto, file: TextIO
) -> None:
    """Print all samples in order; the one whose turn it is as it is written."""
    from chargpt.generate import generate

    pieces = generate(model, tokenizer, [config.prompt], config, kernels=kernels)
    waiting: dict[int, list[str]] = {}  # pieces of samples whose turn has not come
    finished: set[int] = set()
    turn = 0
    _begin(turn, config, file)
    for completion, piece in pieces:
        waiting.setdefault(completion.number, []).append(piece)
        if completion.finish:
            finished.add(completion.number)
        while True:
            _say(waiting.pop(turn, []), file)
            if turn not in finished:
                break
            print(file=file)
            turn += 1
            if turn == config.num_samples:
                return
            _begin(turn, config, file)


def _begin(number: int, config: SampleConfig, file: TextIO) -> None:
    if config.num_samples > 1:
        print(f"--- sample {number + 1}", file=file)
    _say([config.prompt] if config.echo else [], file)


def _say(pieces: Iterable[str], file: TextIO) -> None:
    for piece in pieces:
        print(for_stream(piece, file), end="", file=file, flush=True)


def _talk(model: Any, tokenizer: Any, config: SampleConfig, kernels: OnOffAuto) -> None:
    """Continue each line that is typed, until the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its history and editing)

    from chargpt.base.seeding import SAMPLE, derive_seed
    from chargpt.generate import generate

    number = 0
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        seeds = [derive_seed(config.seed, SAMPLE, number)]
        try:
            pieces = generate(model, tokenizer, [line], config, seeds=seeds, kernels=kernels)
            _say([line] if config.echo else [], sys.stdout)
            _say((piece for _, piece in pieces), sys.stdout)
            print()
        except UserError as error:
            print(f"chargpt: {visible(str(error))}", file=sys.stderr)
        except KeyboardInterrupt:
            print()
        number += 1


def _show_surprise(
    command: Any, model: Any, tokenizer: Any, text: str, config: SampleConfig
) -> None:
    from chargpt.engine.scoring import score
    from chargpt.measure.surprise import surprise_ansi, surprise_page

    stride = command.stride
    if stride is None:
        stride = max(1, model.config.block_size // 2)
    scores = score(model, tokenizer, text, stride=stride, unknown=config.unknown)
    if command.out is None:
        print(surprise_ansi(text, scores, colour=sys.stdout.isatty()))
        return
    with _opened(command.out) as file:
        file.write(surprise_page(text, scores, title=Path(command.surprise).name))
