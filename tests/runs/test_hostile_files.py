"""Run folders made by an attacker: no code runs, nothing hangs, one line says what is wrong.

An attacker can compute a SHA-256, too, so the changed files are sealed again.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import pytest
import torch
from conftest import words
from safetensors.torch import load_file, save_file

import chargpt
from chargpt.base.errors import ChargptWarning, UserError
from chargpt.base.files import SEAL, seal
from chargpt.cli import flags
from chargpt.cli import main as cli
from chargpt.compute.counts import parameters_of
from chargpt.config import GPT2Config, TrainConfig
from chargpt.runs.checkpoint import FORMAT, MANIFEST, MODEL, OPTIMIZER, STATE
from chargpt.train import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, pipes and signals of POSIX")

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
TITLE = "\x1b]0;owned\x07"
"""Renames the window of a terminal."""
LONGEST_LINE = 1500
SECONDS = 20  # a command that takes longer hangs
CPU_SECONDS = 10
COMMANDS = {
    "check": ["check", "run"],
    "sample": "sample run --max-new-tokens 5 --device cpu --kernels off".split(),
    "resume": "train --out run --resume=yes --steps 6".split(),
    "eval": "eval run --device cpu".split(),
}

# --- a run, and ways to change it


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without earlier checkpoints to fall back on."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "hearts.txt").write_text(words(600), encoding="utf-8")
    config = TrainConfig(
        steps=4, batch_size=2, eval_interval=2, log_interval=1, sample_length=4, device="cpu",
        precision="fp32", kernels="off", compile="off",
    )  # fmt: skip
    model_config = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=8)
    text, run = str(folder / "hearts.txt"), folder / "run"
    train(text, model_config=model_config, train_config=config, out=run, quiet=True)
    for name in ("best", "last"):
        shutil.rmtree(run / f"{name}.previous")
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy in the current folder, beside a folder that no command may change."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "victim.txt").write_text("precious\n")
    shutil.copytree(whole / "last", tmp_path / "outside" / "last")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    return Path(shutil.copytree(whole, tmp_path / "inside" / "run"))


def outside(run: Path) -> Path:
    return run.parent.parent / "outside"


def contents(folder: Path) -> dict[str, bytes]:
    paths = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in paths}


Change = Callable[[Path], None]
Header = dict[str, Any]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


def pickled(run: Path) -> bytes:
    return pickle.dumps(Bomb(outside(run) / "it-ran"))


def pickled_by_torch(run: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"model": Bomb(outside(run) / "it-ran")}, file)
    return file.getvalue()


def seal_checkpoint(folder: Path) -> None:
    """Write the manifest that belongs to the files that are there."""
    files = {}
    for name in (MODEL, OPTIMIZER, STATE):
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(seal({"format": FORMAT, "files": files})))


def put(name: str, data: bytes | Callable[[Path], bytes]) -> Change:
    """Replace a file of the run, or that file in both checkpoints, and seal them again."""

    def change(run: Path) -> None:
        written = data(run) if callable(data) else data
        folders = [f for f in (run / "best", run / "last") if (f / name).exists()]
        for folder in folders or [run]:
            (folder / name).write_bytes(written)
            if folder != run and name != MANIFEST:
                seal_checkpoint(folder)

    return change


def in_json(name: str, edit: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> Change:
    """Edit a JSON file of the run, or that file in both checkpoints, and seal it again."""

    def change(run: Path) -> None:
        for path in (run / name, run / "best" / name, run / "last" / name):
            if path.exists():
                value = json.loads(path.read_text())
                edit(value)
                path.write_text(json.dumps(seal(value) if sealed and SEAL in value else value))
                if name == STATE:
                    seal_checkpoint(path.parent)

    return change


def in_config(part: str, **changes: Any) -> Change:
    return in_json(CONFIG, lambda config: config[part].update(changes))


def in_state(**changes: Any) -> Change:
    return in_json(STATE, lambda state: state.update(changes))


def in_files(edit: Callable[[dict[str, Any]], Any]) -> Change:
    return in_json(MANIFEST, lambda manifest: edit(manifest["files"]))


def alphabet(edit: Callable[[list[str]], Any]) -> Change:
    return in_json(TOKENIZER, lambda fields: fields.update(characters=edit(fields["characters"])))


def in_header(edit: Callable[[Header], Any]) -> Change:
    """Edit the header of the weights, or return a new one as an object or as bytes."""

    def data(run: Path) -> bytes:
        whole = (run / "last" / MODEL).read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8:end])
        edited = edit(header)
        edited = header if edited is None else edited
        text = edited if isinstance(edited, bytes) else json.dumps(edited).encode()
        return struct.pack("<Q", len(text)) + text + whole[end:]

    return put(MODEL, data)


def in_tensors(edit: Callable[[dict[str, torch.Tensor]], Any], name: str = MODEL) -> Change:
    """Replace the tensors of a file."""

    def data(run: Path) -> bytes:
        save_file(edit(load_file(run / "last" / name)), run.parent / "new", {"format": "pt"})
        return (run.parent / "new").read_bytes()

    return put(name, data)


def add(name: str, shape: list[int]) -> Change:
    """Add a tensor without bytes to the header."""
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    return in_header(lambda header: header | {name: tensor})


def link(name: str, target: str) -> Change:
    def change(run: Path) -> None:
        remove(run / name)
        (run / name).symlink_to(outside(run) / target)  # an absolute target stays as it is

    return change


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_folder(run: Path) -> None:
    (run / TOKENIZER).unlink()
    (run / TOKENIZER).mkdir()


def make_pipe(name: str) -> Change:
    """Make a pipe that nobody writes to; for weights, with the manifest of an empty file."""

    def change(run: Path) -> None:
        (run / name).write_bytes(b"")
        if Path(name).name == MODEL:
            seal_checkpoint((run / name).parent)
        remove(run / name)
        os.mkfifo(run / name)

    return change


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def overlap(header: Header) -> None:
    header["final_norm.bias"]["data_offsets"] = header["final_norm.weight"]["data_offsets"]


def named(names: dict[str, str]) -> Callable[[Header], Header]:
    return lambda header: {names.get(name, name): entry for name, entry in header.items()}


# --- the cases


class Case(NamedTuple):
    change: Change
    file: str
    """Part of the message of every command that refuses."""
    load: int = 2
    check: int = 1
    resume: int = 2
    """Exit codes."""


ACCEPTED = (0, 0, 0)
CHECKED = (0, 1, 2)  # `load` does not read that file
UNREAD = (2, 1, 0)  # resuming writes the vocabulary of the text again
RESUMED = (0, 0, 2)  # a folder that is whole, but that no run may write to
QKV = "blocks.0.attention.sublayer.qkv.weight"
CASES = {
    "a pickle as weights": Case(put(MODEL, pickled), MODEL),
    "torch.save as optimizer": Case(put(OPTIMIZER, pickled_by_torch), OPTIMIZER, *CHECKED),
    "a pickle as config": Case(put(CONFIG, pickled), CONFIG),
    "a pickle as tokenizer": Case(put(TOKENIZER, pickled), TOKENIZER, *UNREAD),
    "a pickle as manifest": Case(put(MANIFEST, pickled), MANIFEST),
    "a pickle beside": Case(put("model.pt", pickled), "", *ACCEPTED),
    "bytes after the weights": Case(
        put(MODEL, lambda run: (run / "last" / MODEL).read_bytes() + pickled(run)), MODEL
    ),
    # the header of the weights
    "a header of 2^63 bytes": Case(put(MODEL, struct.pack("<Q", 2**63) + bytes(100)), MODEL),
    "half a header": Case(put(MODEL, lambda run: (run / "last" / MODEL).read_bytes()[:500]), MODEL),
    "no weights": Case(put(MODEL, b""), MODEL),
    "a deep header": Case(in_header(lambda _: nested(100_000)), MODEL),
    "a header that is a list": Case(in_header(lambda _: []), MODEL),
    "a number as metadata": Case(in_header(lambda h: h | {"__metadata__": 5}), MODEL),
    "overlapping tensors": Case(in_header(overlap), MODEL),
    "offsets beyond the end": Case(
        in_header(lambda h: h["final_norm.bias"].update(data_offsets=[10**9, 10**9 + 32])), MODEL
    ),
    "negative sizes": Case(in_header(lambda h: h["final_norm.bias"].update(shape=[-2, -4])), MODEL),
    "a shape that overflows": Case(add("x", [2**32, 2**32]), MODEL),
    "a huge shape of nothing": Case(add("x", [0, 2**63]), MODEL),
    "a transposed tensor": Case(in_header(lambda h: h[QKV]["shape"].reverse()), QKV),
    "a tensor of another name": Case(in_header(named({QKV: TITLE})), CONFIG),
    "float64": Case(in_tensors(lambda t: {k: v.double() for k, v in t.items()}), MODEL),
    "a missing tensor": Case(
        in_tensors(lambda t: {k: v for k, v in t.items() if k != "final_norm.bias"}), MODEL
    ),
    "weights that are NaN": Case(
        in_tensors(lambda t: {k: v * torch.nan for k, v in t.items()}), "loss is nan", 0, 0, 1
    ),
    # config.json
    "a negative number of layers": Case(in_config("model_config", n_layer=-1), CONFIG),
    "layers that are true": Case(in_config("model_config", n_layer=True), CONFIG),
    "a dropout that is NaN": Case(in_config("model_config", dropout=float("nan")), CONFIG),
    "an unknown setting": Case(in_config("model_config", **{TITLE: 1}), CONFIG),
    "another vocabulary size": Case(in_config("model_config", vocab_size=23), "json"),
    "another block size": Case(in_config("model_config", block_size=9), CONFIG),
    "a number of 5,000 digits": Case(put(CONFIG, b'{"format": ' + b"9" * 5000 + b"}"), CONFIG),
    "a list as train_config": Case(in_json(CONFIG, lambda c: c.update(train_config=[])), CONFIG),
    "a config without a seal": Case(in_json(CONFIG, lambda c: c.pop(SEAL)), CONFIG),
    "a config with a broken seal": Case(
        in_json(CONFIG, lambda c: c.update(sources=[]), sealed=False), CONFIG
    ),
    "a deep config": Case(put(CONFIG, nested(100_000)), CONFIG),
    "an endless source": Case(
        in_json(CONFIG, lambda c: c.update(sources=["/dev/zero"])), "/dev/zero", *RESUMED
    ),
    "a source with a NUL": Case(
        in_json(CONFIG, lambda c: c.update(sources=["a\0b"])), r"a\x00b", *RESUMED
    ),
    "an unknown encoding": Case(in_config("data_config", encoding=TITLE), "encoding"),
    "an unknown environment": Case(
        in_config("environment", torch=TITLE, numpy=[TITLE]), "", *ACCEPTED
    ),
    # tokenizer.json
    "an entry of two characters": Case(alphabet(lambda c: ["ab", *c[1:]]), TOKENIZER, *UNREAD),
    "an entry twice": Case(alphabet(lambda c: [c[1], *c[1:]]), TOKENIZER, *UNREAD),
    "an entry too many": Case(alphabet(lambda c: [*c, "é"]), "23", *UNREAD),
    # manifest.json
    "a file outside the folder": Case(
        in_files(lambda f: f.update({"../../../outside/victim.txt": f[MODEL]})), MANIFEST
    ),
    "a size of 4,000 digits": Case(in_files(lambda f: f[MODEL].update(bytes=10**4000)), MODEL),
    "a sum that is null": Case(in_files(lambda f: f[MODEL].update(sha256=None)), MODEL),
    # state.json
    "a step that is a text": Case(in_state(step=TITLE), "step", *CHECKED),
    "a step of 10^30": Case(in_state(step=10**30), "step", *CHECKED),
    "seconds that are NaN": Case(in_state(train_seconds=float("nan")), "train_seconds", *CHECKED),
    # files for people
    "a loss that is a text": Case(
        put("metrics.jsonl", b'{"step": 1, "split": "train", "loss": "x"}\n'), "", *ACCEPTED
    ),
    "a summary for terminals": Case(
        put("summary.json", json.dumps({"val_loss": TITLE}).encode()), "", *ACCEPTED
    ),
    # links, pipes and folders
    "metrics.jsonl is a link": Case(link("metrics.jsonl", "victim.txt"), "metrics.jsonl", *CHECKED),
    "the lock is a link": Case(link(".lock", "new.txt"), ".lock", *RESUMED),
    "loss.png is a link to nothing": Case(link("loss.png", "new.txt"), "loss.png", *RESUMED),
    "last is a link": Case(link("last", "last"), "last", *RESUMED),
    "config.json is a pipe": Case(make_pipe(CONFIG), CONFIG, 2, 2, 2),
    "the weights are a pipe": Case(make_pipe(f"best/{MODEL}"), MODEL),
    "tokenizer.json is a folder": Case(make_folder, TOKENIZER, 2, 1, 1),
}  # fmt: skip


# --- running the commands


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        pytest.fail(f"not finished after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@functools.cache
def parsed(*arguments: str) -> Any:
    """Parse a command line once: that takes longer than most commands."""
    kinds = {verb: command.make_flags("tiny") for verb, command in cli.COMMANDS.items()}
    return flags.parse(kinds, arguments)


Do = Callable[..., Outcome]


@pytest.fixture
def do(monkeypatch: pytest.MonkeyPatch) -> Do:
    """Load ``run`` in the current folder, or run a command on it as the command line does."""

    def do(verb: str, *more: str, stream: type[io.StringIO] = io.StringIO) -> Outcome:
        if verb == "load":
            try:
                with warnings.catch_warnings(), no_longer_than(SECONDS):
                    warnings.simplefilter("ignore", ChargptWarning)
                    chargpt.load("run")
            except UserError as error:
                assert "\n" not in str(error)
                return Outcome(2, "", f"chargpt: {str(error)!a}\n")
            return Outcome(0, "", "")
        out, err = stream(), stream()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(cli, "run", lambda a: cli.COMMANDS[a[0]].run(parsed(*a)))
            with no_longer_than(SECONDS), pytest.raises(SystemExit) as stop:
                cli.main([*COMMANDS[verb], *more])
        return Outcome(int(stop.value.code or 0), out.getvalue(), err.getvalue())

    return do


def controls(text: str) -> str:
    """Return the characters that a terminal obeys."""
    return "".join(c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs"))


def message_of(outcome: Outcome, verb: str) -> str:
    """Return the line that says what is wrong; it is short and without control characters."""
    assert "Traceback" not in outcome.out + outcome.err
    assert not controls(outcome.err)
    bad = [line for line in outcome.out.splitlines() if line.startswith("BAD")]
    if verb == "check":
        assert not controls(outcome.out)
    line = bad[0] if bad else outcome.err.splitlines()[-1]
    assert bad or line.startswith("chargpt: ")
    assert len(line) <= LONGEST_LINE
    return line


@pytest.mark.parametrize("verb", ["load", "check", "sample", "resume", "eval"])
def test_the_unchanged_folder_works(verb: str, run: Path, do: Do) -> None:
    assert do(verb).code == 0


@pytest.mark.parametrize("verb", ["load", "check", "resume"])
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_folder_does_no_harm(name: str, verb: str, run: Path, do: Do) -> None:
    case = CASES[name]
    case.change(run)
    before = contents(outside(run))
    outcome = do(verb)
    assert contents(outside(run)) == before
    assert outcome.code == getattr(case, verb), outcome
    if outcome.code:
        assert case.file in message_of(outcome, verb)
    else:
        assert not controls(outcome.out + outcome.err)


@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, "last/manifest.json"])
def test_nesting_at_the_limit_of_the_parser_is_refused(name: str, run: Path, do: Do) -> None:
    """A text that can be parsed may still be too deep to be sealed."""
    deepest = 0
    with contextlib.suppress(RecursionError):
        for depth in range(100, 10_000):
            json.loads(nested(depth))
            deepest = depth
    for depth in range(deepest - 50, deepest + 3):
        (run / name).write_bytes(b'{"format": 3, "sha256": "", "x": ' + nested(depth) + b"}")
        outcome = do("check")
        assert outcome.code == 1
        assert name.partition("/")[0] in message_of(outcome, "check")


def test_a_folder_that_is_not_a_run_is_never_cleared(run: Path) -> None:
    """Other programs have a config.json, too."""
    for name in ("best", "last"):
        shutil.rmtree(run / name)
    (run / CONFIG).write_text('{"name": "something else"}')
    (run / "thesis.tex").write_text("years of work")
    before = contents(run)
    with pytest.raises(UserError, match="has format None"):
        chargpt.train("missing.txt", out=run, resume="auto", quiet=True)
    assert contents(run) == before


# --- terminals


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


CONTROLS = [chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))]
TURNING = ["\u200b", "\u200e", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff", "\U000e0001"]
TITLE_ALPHABET = ["\x1b", "]", "0", ";", "\x07", *"bcdefghijklmnopqrstuvwxyz"]


def use_alphabet(run: Path, characters: list[str]) -> None:
    alphabet(lambda known: ["\n", *characters][: len(known)])(run)


@pytest.mark.parametrize("start", [0, 21, 42])
def test_a_sample_is_escaped(start: int, run: Path, do: Do) -> None:
    use_alphabet(run, (CONTROLS + TURNING)[start:])
    outcome = do("sample", stream=Terminal)
    assert outcome.code == 0
    assert "\\x" in outcome.out or "\\u" in outcome.out
    assert not controls(outcome.out + outcome.err)


def test_prompts_are_escaped(run: Path, monkeypatch: pytest.MonkeyPatch, do: Do) -> None:
    use_alphabet(run, TITLE_ALPHABET)
    outcome = do("sample", "--prompt", "\x1b]0;\x07", stream=Terminal)
    assert outcome.code == 0
    assert outcome.out.startswith(r"\x1b]0;\x07")
    assert not controls(outcome.out + outcome.err)
    outcome = do("sample", "--prompt", "\x9b2J", stream=Terminal)  # the model does not know \x9b
    assert outcome.code == 2
    assert not controls(outcome.out + outcome.err)
    typed = Mock(side_effect=["\x1b]0;\x07", "\x9b2J", EOFError])
    monkeypatch.setattr("builtins.input", typed)
    outcome = do("sample", "--interactive", stream=Terminal)
    assert outcome.code == 0
    assert not controls(outcome.out + outcome.err)


def test_surprise_escapes_everything_but_its_own_colours(run: Path, do: Do) -> None:
    use_alphabet(run, TITLE_ALPHABET)
    Path("evil.txt").write_text("bcd\x1b]0;e\x07\n")
    outcome = do("sample", "--surprise", "evil.txt", stream=Terminal)
    assert outcome.code == 0
    assert not controls(re.sub(r"\x1b\[[\d;]*m", "", outcome.out) + outcome.err)


def test_eval_escapes_the_name_of_the_text(run: Path, do: Do) -> None:
    name = f"{TITLE}.txt"
    shutil.copy(json.loads((run / CONFIG).read_text())["sources"][0], name)
    in_json(CONFIG, lambda config: config.update(sources=[name]))(run)
    outcome = do("eval", stream=Terminal)
    assert outcome.code == 0
    assert r"\x1b]0;owned\x07.txt" in outcome.out
    assert not controls(outcome.out + outcome.err)


def test_a_real_terminal_gets_no_control_character(run: Path) -> None:
    import pty

    use_alphabet(run, CONTROLS)
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "chargpt", *COMMANDS["sample"]]
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    with contextlib.suppress(OSError):  # a terminal ends with an error
        while piece := os.read(ours, 65536):
            output += piece
    os.close(ours)
    assert process.wait() == 0
    text = output.decode().replace("\r\n", "\n")  # the terminal adds \r
    assert "\\x" in text
    assert not controls(text)


def test_half_surrogate_pairs_can_be_written_to_a_file(run: Path, do: Do) -> None:
    use_alphabet(run, [chr(0xD800 + i) for i in range(30)])
    outcome = do("sample", "--out", "sample.txt")
    assert (outcome.code, outcome.out) == (0, "")
    assert Path("sample.txt").stat().st_size > 0


# --- memory and endless loops: in a process of their own

HELPER = r"""
import json, os, resource, signal, sys
from chargpt.cli import main as cli
from chargpt.base.errors import UserError
from chargpt.measure.inspect import inspect_run
from chargpt.runs.folder import load

def check(run):
    bad = [finding for finding in inspect_run(run) if not finding.good]
    if bad:
        raise UserError(bad[0].part)

def resume(run):
    try:
        cli.main(["train", "--out", run, "--resume", "--steps", "6"])
    except SystemExit as stop:
        if stop.code == 2:
            raise UserError("exit code 2")

VERBS = {"load": load, "check": check, "resume": resume}

def attempt(verb, run):
    try:
        VERBS[verb](run)
    except UserError:
        return "refused"
    except BaseException as error:
        return repr(error)[:200]
    return "accepted"

for line in sys.stdin:
    verb, run, seconds, cpu_seconds = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + 3 * 2**29
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
        signal.alarm(seconds)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1), os.dup2(null, 2)
        os.write(write, b"%d\n" % resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        os.write(write, attempt(verb, run).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        before, _, outcome = file.read().partition(b"\n")
    _, status, usage = os.wait4(pid, 0)
    growth = (usage.ru_maxrss - int(before)) / 1024
    print(json.dumps([outcome.decode() or "ended by signal %d" % status, growth]), flush=True)
"""


@pytest.fixture(scope="module")
def helper() -> Iterator[Callable[[str, Path], tuple[str, float]]]:
    """Does a verb in a new process; returns the outcome and the MiB that it took."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def ask(verb: str, run: Path) -> tuple[str, float]:
        print(json.dumps([verb, str(run), 10 * SECONDS, CPU_SECONDS]), file=stdin, flush=True)
        outcome, growth = json.loads(stdout.readline())
        return outcome, growth

    yield ask
    stdin.close()
    process.wait()
    stdout.close()


MANY_LISTS = b'{"x": [' + b"[]," * (20 * 2**20 // 3) + b"1]}"  # 20 MB of JSON take 400 MB in memory


def layers(run: Path, config: dict[str, int], sizes: dict[str, int], n_bytes: int) -> None:
    """Write a config.json, and weights of the right total size in a few tensors."""
    fields = json.loads((run / CONFIG).read_text())
    fields["model_config"] |= config
    (run / CONFIG).write_text(json.dumps(seal(fields)))
    rest = parameters_of(GPT2Config(**fields["model_config"])) - sum(sizes.values())
    header, end = {}, 0
    for name, size in {**sizes, "rest": rest}.items():
        start, end = (0, 4 * size) if n_bytes else (end, end + 4 * size)
        header[name] = {"dtype": "F32", "shape": [size], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    put(MODEL, struct.pack("<Q", len(text)) + text + bytes(n_bytes or end))(run)


def amplified(run: Path) -> None:
    """A file of 1 MB with overlapping tensors of 470 MB in all."""
    shape = {"d_model": 256, "d_ff": 1024, "n_layer": 150, "n_head": 1}
    layers(run, shape, {f"x{i}": 2**18 for i in range(450)}, 2**20)


def many_layers(run: Path) -> None:
    """A file of 2 MB, and a config with 40,000 layers of width 1."""
    ones = dict.fromkeys(("d_model", "d_ff", "n_head", "block_size"), 1)
    layers(run, ones | {"n_layer": 40_000}, {"final_norm.weight": 1}, 0)


def many_tensors(run: Path) -> None:
    """An optimizer of 59 MB of header, with a million empty tensors."""
    entry = b'":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    text = b"{" + b",".join(b'"x%d' % i + entry for i in range(1_000_000)) + b"}"
    put(OPTIMIZER, struct.pack("<Q", len(text)) + text)(run)


def sparse_metrics(run: Path) -> None:
    with (run / "metrics.jsonl").open("wb") as file:
        file.truncate(150 * 2**20)


def in_optimizer(edit: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Change:
    """Replace each tensor of the optimizer by those that `edit` returns."""

    def edit_all(tensors: dict[str, torch.Tensor]) -> Any:
        return dict(new for old in tensors.items() for new in edit(*old).items())

    return in_tensors(edit_all, OPTIMIZER)


HEAVY: dict[str, tuple[Change, str]] = {
    # how it is made, and the verbs that refuse it
    "10^9 layers": (in_config("model_config", n_layer=10**9), "load check resume"),
    "a width of 10^12": (in_config("model_config", d_model=10**12, d_ff=8), "load check resume"),
    "layers of 4,300 digits": (in_config("model_config", n_layer=10**4299), "load check resume"),
    "100 MB of nesting": (put(CONFIG, b"[" * (100 * 2**20)), "load check resume"),
    "many lists in the tokenizer": (put(TOKENIZER, MANY_LISTS), "load check"),
    "many lists in a manifest": (put(MANIFEST, MANY_LISTS), "load check"),
    "many lists in a state": (put(STATE, MANY_LISTS), "check resume"),
    "many lists in a header": (in_header(lambda _: MANY_LISTS), "load check resume"),
    "many tensors in the optimizer": (many_tensors, "check resume"),
    "overlapping tensors of 470 MB": (amplified, "load check"),
    "40,000 layers in 2 MB": (many_layers, "load check resume"),
    "metrics of 150 MB": (sparse_metrics, "check"),
    "an endless tokenizer": (link(TOKENIZER, "/dev/zero"), "load check"),
    "endless weights": (link(f"best/{MODEL}", "/dev/zero"), "load check"),
    # PyTorch's optimizers crash on these instead of checking them
    "an empty optimizer": (in_optimizer(lambda *_: {}), "resume"),
    "an optimizer of scalars": (in_optimizer(lambda k, _: {k: torch.tensor(1.0)}), "resume"),
    "an optimizer of whole numbers": (in_optimizer(lambda k, v: {k: v.to(torch.int8)}), "resume"),
    "an optimizer without its counters": (
        in_optimizer(lambda k, v: {k: v} if v.dim() else {}), "resume"
    ),
    "an optimizer of another model": (in_optimizer(lambda k, v: {f"{TITLE}{k}": v}), "resume"),
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux reports it")
@pytest.mark.parametrize(
    ("name", "verb"), [(name, verb) for name, heavy in HEAVY.items() for verb in heavy[1].split()]
)
def test_a_hostile_folder_takes_no_memory(name: str, verb: str, run: Path, helper: Any) -> None:
    HEAVY[name][0](run)
    outcome, growth = helper(verb, run)
    print(f"{verb} of {name}: {outcome}, {growth:.0f} MiB")
    assert outcome == "refused"
    assert growth <= 200
