"""Run folders made by somebody who means harm: nothing runs, nothing hangs, one line says why.

Whoever makes such a folder can compute a SHA-256, too: most of these are sealed as they should be.
"""

import contextlib
import functools
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

import pytest
import torch
from conftest import words
from safetensors.torch import load_file, save_file

import chargpt
from chargpt.base.errors import ChargptWarning, UserError
from chargpt.base.files import SEAL, seal
from chargpt.cli import flags
from chargpt.cli import main as cli
from chargpt.config import GPT2Config, TrainConfig
from chargpt.runs.checkpoint import MANIFEST, MODEL, OPTIMIZER, STATE
from chargpt.train import train

pytestmark = pytest.mark.skipif(os.name == "nt", reason="links, pipes and signals of POSIX")

TITLE = "\x1b]0;owned\x07"
"""Renames the window of a terminal that is sent it."""
LONGEST_LINE = 1500
SECONDS = 20  # after which nothing is coming any more
CPU_SECONDS = 10  # what nothing here needs
SHAPE = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=8)
COMMANDS = {
    "check": ["check", "run"],
    "sample": "sample run --max-new-tokens 5 --device cpu --kernels off".split(),
    "resume": "train --out run --resume=yes --steps 6".split(),
}
VERBS = ("load", *COMMANDS)


# --- a run to spoil, and what to spoil it with


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run without earlier checkpoints to fall back on."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "hearts.txt").write_text(words(600), encoding="utf-8")
    training = TrainConfig(
        steps=4,
        batch_size=2,
        eval_interval=2,
        log_interval=1,
        sample_length=4,
        device="cpu",
        precision="fp32",
        kernels="off",
        compile="off",
    )
    text = str(folder / "hearts.txt")
    train(text, model_config=SHAPE, train_config=training, out=folder / "run", quiet=True)
    for name in ("best", "last"):
        shutil.rmtree(folder / "run" / f"{name}.previous")
    return folder / "run"


@pytest.fixture
def run(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy, in the current folder, which has a neighbour that must stay as it is."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim.txt").write_text("precious\n")
    shutil.copytree(whole / "last", outside / "last")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    return Path(shutil.copytree(whole, tmp_path / "inside" / "run"))


def outside(run: Path) -> Path:
    return run.parent.parent / "outside"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


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


def seal_checkpoint(folder: Path, **changes: Any) -> None:
    """Write the manifest that belongs to the files that are there."""
    import hashlib

    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(),
        }
        for name in (MODEL, OPTIMIZER, STATE)
        if (folder / name).is_file()
    }
    (folder / MANIFEST).write_text(json.dumps(seal({"format": 2, "files": files} | changes)))


Spoil = Callable[[Path], None]


def put(name: str, data: bytes | Callable[[Path], bytes], *, sealed: bool = True) -> Spoil:
    """Replace a file of the run, or one of each checkpoint, and seal the checkpoint again."""

    def spoil(run: Path) -> None:
        written = data(run) if callable(data) else data
        if (run / "last" / name).exists():
            for which in ("best", "last"):
                if (run / which / name).exists():
                    (run / which / name).write_bytes(written)
                    if sealed and name != MANIFEST:
                        seal_checkpoint(run / which)
        else:
            (run / name).write_bytes(written)

    return spoil


def in_json(name: str, edit: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> Spoil:
    """Edit a JSON file of the run, or one of each checkpoint; seal what has a seal."""

    def spoil(run: Path) -> None:
        for path in [run / name, run / "best" / name, run / "last" / name]:
            if not path.exists():
                continue
            value = json.loads(path.read_text())
            value = edit(value) or value
            if sealed and isinstance(value, dict) and SEAL in value:
                value = seal(value)
            path.write_text(json.dumps(value))
            if name == STATE:
                seal_checkpoint(path.parent)

    return spoil


def in_config(part: str, **changes: Any) -> Spoil:
    return in_json("config.json", lambda config: config[part].update(changes))


def in_state(**changes: Any) -> Spoil:
    return in_json(STATE, lambda state: state.update(changes))


def characters(change: Callable[[list[str]], Any]) -> Spoil:
    return in_json(
        "tokenizer.json", lambda fields: fields.update(characters=change(fields["characters"]))
    )


Header = dict[str, Any]


def in_header(edit: Callable[[Header], Any], extra: bytes = b"", name: str = MODEL) -> Spoil:
    """Edit the header of the weights, or return another one as an object or as bytes."""

    def data(run: Path) -> bytes:
        whole = (run / "last" / name).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        edited = edit(header)
        edited = header if edited is None else edited
        text = edited if isinstance(edited, bytes) else json.dumps(edited).encode()
        return struct.pack("<Q", len(text)) + text + whole[8 + length :] + extra

    return put(name, data)


def with_length(length: int) -> Spoil:
    return put(
        MODEL, lambda run: struct.pack("<Q", length) + (run / "last" / MODEL).read_bytes()[8:]
    )


def in_tensors(edit: Callable[[dict[str, torch.Tensor]], Any], name: str = MODEL) -> Spoil:
    """Edit the weights themselves."""

    def data(run: Path) -> bytes:
        tensors = load_file(run / "last" / name)
        edited = edit(tensors)
        tensors = tensors if edited is None else edited
        save_file(tensors, run / "scratch", metadata={"format": "pt"})
        written = (run / "scratch").read_bytes()
        (run / "scratch").unlink()
        return written

    return put(name, data)


def link(name: str, target: str) -> Spoil:
    """Make a link of this name to something outside."""

    def spoil(run: Path) -> None:
        remove(run / name)
        (run / name).symlink_to(target if target.startswith("/") else outside(run) / target)

    return spoil


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def folder_for(name: str) -> Spoil:
    def spoil(run: Path) -> None:
        remove(run / name)
        (run / name).mkdir()

    return spoil


def pipe_for(name: str) -> Spoil:
    def spoil(run: Path) -> None:
        remove(run / name)
        os.mkfifo(run / name)
        if Path(name).name in (MODEL, STATE, OPTIMIZER):
            # Without a byte in it, and with the sum of nothing: only opening it tells.
            manifest = json.loads((run / name).with_name(MANIFEST).read_text())
            empty = {
                "bytes": 0,
                "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            }
            manifest["files"][Path(name).name] = empty
            (run / name).with_name(MANIFEST).write_text(json.dumps(seal(manifest)))

    return spoil


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def then(*spoils: Spoil) -> Spoil:
    def spoil(run: Path) -> None:
        for each in spoils:
            each(run)

    return spoil


def no_seal(value: dict[str, Any]) -> None:
    del value[SEAL]


def overlap(header: Header) -> None:
    """Put the last tensor where the first one is, if they are as large as each other."""
    names = [name for name in header if name.endswith("norm.weight")]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]


def transpose(header: Header) -> None:
    header["blocks.0.attention.sublayer.qkv.weight"]["shape"].reverse()


def rename(header: Header) -> None:
    header["x"] = header.pop("blocks.0.attention.sublayer.qkv.weight")


def duplicate(header: Header) -> bytes:
    first = json.dumps({"final_norm.weight": header["blocks.0.attention.norm.weight"]})
    return (first[:-1] + ", " + json.dumps(header)[1:]).encode()


def entry(**changes: Any) -> Callable[[Header], None]:
    return lambda header: header["final_norm.weight"].update(changes)


def as_type(dtype: torch.dtype) -> Spoil:
    return in_tensors(lambda tensors: {k: v.to(dtype) for k, v in tensors.items()})


def filled(value: float) -> Spoil:
    return in_tensors(lambda tensors: {k: torch.full_like(v, value) for k, v in tensors.items()})


def files(edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    return in_json(MANIFEST, lambda manifest: edit(manifest["files"]))


class Case(NamedTuple):
    spoil: Spoil
    refused: str = ""
    """Verbs that must refuse; the others may work, if they do no harm."""


ALL = "load check sample resume"
WEIGHTS = ALL
TOKENIZER = "load check sample"
RESUMED = "check resume"

CASES: dict[str, Case] = {
    # pickles under every name
    "a pickle for weights": Case(put(MODEL, pickled), ALL),
    "a pickle for weights, not sealed": Case(put(MODEL, pickled, sealed=False), ALL),
    "torch.save for weights": Case(put(MODEL, pickled_by_torch), ALL),
    "a pickle behind the weights": Case(
        put(MODEL, lambda run: (run / "last" / MODEL).read_bytes() + pickled(run)), WEIGHTS
    ),
    "a pickle for the optimizer": Case(put(OPTIMIZER, pickled), RESUMED),
    "torch.save for the optimizer": Case(put(OPTIMIZER, pickled_by_torch), RESUMED),
    "a pickle for state.json": Case(put(STATE, pickled), RESUMED),
    "a pickle for manifest.json": Case(put(MANIFEST, pickled), ALL),
    "a pickle for config.json": Case(put("config.json", pickled), ALL),
    "a pickle for tokenizer.json": Case(put("tokenizer.json", pickled), TOKENIZER),
    "pickles beside": Case(then(*(put(n, pickled) for n in ("model.pt", "x.pkl", "ckpt.pt")))),
    # headers
    "a header of 2^63 bytes": Case(with_length(2**63), WEIGHTS),
    "a header of 2^64 - 1 bytes": Case(with_length(2**64 - 1), WEIGHTS),
    "a header as long as the file": Case(with_length(6024), WEIGHTS),
    "a header of no bytes": Case(with_length(0), WEIGHTS),
    "a header a byte short": Case(with_length(1000), WEIGHTS),
    "no weights": Case(put(MODEL, b""), WEIGHTS),
    "seven bytes of weights": Case(put(MODEL, b"\2\0\0\0\0\0\0"), WEIGHTS),
    "zeros for weights": Case(put(MODEL, bytes(6024)), WEIGHTS),
    "half a header": Case(
        put(MODEL, lambda run: (run / "last" / MODEL).read_bytes()[:500]), WEIGHTS
    ),
    "a header that is no JSON": Case(in_header(lambda _: b"{" * 50), WEIGHTS),
    "a header that is no UTF-8": Case(in_header(lambda _: b'{"\xff": 1}'), WEIGHTS),
    "a header that is a list": Case(in_header(lambda _: []), WEIGHTS),
    "a header that is a number": Case(in_header(lambda _: 17), WEIGHTS),
    "an empty header": Case(in_header(lambda _: {}), WEIGHTS),
    "a deep header": Case(in_header(lambda _: nested(100_000)), WEIGHTS),
    "a header just deep enough": Case(in_header(lambda _: nested(400)), WEIGHTS),
    "metadata that is a number": Case(in_header(lambda h: h | {"__metadata__": 5}), WEIGHTS),
    # tensors
    "a tensor that is a list": Case(in_header(lambda h: h | {"final_norm.weight": []}), WEIGHTS),
    "a tensor that is null": Case(in_header(lambda h: h | {"final_norm.weight": None}), WEIGHTS),
    "overlapping tensors": Case(in_header(overlap), WEIGHTS),
    "negative offsets": Case(in_header(entry(data_offsets=[-32, 0])), WEIGHTS),
    "offsets beyond the end": Case(in_header(entry(data_offsets=[10**9, 10**9 + 32])), WEIGHTS),
    "offsets beyond 64 bits": Case(in_header(entry(data_offsets=[2**64, 2**64 + 32])), WEIGHTS),
    "offsets the wrong way round": Case(in_header(entry(data_offsets=[32, 0])), WEIGHTS),
    "offsets that are texts": Case(in_header(entry(data_offsets=["0", "32"])), WEIGHTS),
    "offsets that are fractions": Case(in_header(entry(data_offsets=[0.0, 32.0])), WEIGHTS),
    "three offsets": Case(in_header(entry(data_offsets=[0, 32, 64])), WEIGHTS),
    "no offsets": Case(in_header(lambda h: h["final_norm.weight"].pop("data_offsets")), WEIGHTS),
    "a shape with two negative sizes": Case(in_header(entry(shape=[-2, -4])), WEIGHTS),
    "a shape that overflows to nothing": Case(
        in_header(
            lambda h: h | {"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}
        ),
        WEIGHTS,
    ),
    "a shape of nothing and very much": Case(
        in_header(
            lambda h: h | {"x": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}}
        ),
        WEIGHTS,
    ),
    "a shape that is a text": Case(in_header(entry(shape="8")), WEIGHTS),
    "a shape of truths": Case(in_header(entry(shape=[True] * 8)), WEIGHTS),
    "a shape of another tensor": Case(in_header(transpose), WEIGHTS),
    "a type that there is not": Case(in_header(entry(dtype="F128")), WEIGHTS),
    "a type that is a list": Case(in_header(entry(dtype=["F32"])), WEIGHTS),
    "float64": Case(as_type(torch.float64), WEIGHTS),
    "float16": Case(as_type(torch.float16), WEIGHTS),
    "whole numbers": Case(as_type(torch.int32), WEIGHTS),
    "complex numbers": Case(as_type(torch.complex64), WEIGHTS),
    "a missing tensor": Case(
        in_tensors(lambda t: {k: v for k, v in t.items() if k != "final_norm.bias"}), WEIGHTS
    ),
    "an extra tensor": Case(in_tensors(lambda t: t | {"x": torch.zeros(3)}), WEIGHTS),
    "an extra tensor of nothing": Case(in_tensors(lambda t: t | {"x": torch.zeros(0)}), WEIGHTS),
    "a tensor of another name": Case(in_header(rename), WEIGHTS),
    "a name that commands": Case(
        in_header(lambda h: {TITLE if k == "final_norm.bias" else k: v for k, v in h.items()}),
        WEIGHTS,
    ),
    "a tensor named twice": Case(in_header(duplicate)),
    "weights that are NaN": Case(filled(float("nan"))),
    "weights that are infinite": Case(filled(float("inf"))),
    "weights that are huge": Case(filled(1e38)),
    # config.json, sealed
    "no heads": Case(in_config("model", n_head=0), ALL),
    "a negative number of layers": Case(in_config("model", n_layer=-1), ALL),
    "layers that are a text": Case(in_config("model", n_layer="1"), ALL),
    "layers that are a truth": Case(in_config("model", n_layer=True), ALL),
    "layers that are a list": Case(in_config("model", n_layer=[1]), ALL),
    "layers that are a fraction": Case(in_config("model", n_layer=1.0), ALL),
    "a number of 5,000 digits": Case(
        put("config.json", b'{"format": 2, "model": {"n_layer": ' + b"9" * 5000 + b"}}"), ALL
    ),
    "a dropout that is NaN": Case(in_config("model", dropout=float("nan")), ALL),
    "a dropout that is infinite": Case(in_config("model", dropout=float("inf")), ALL),
    "a dropout of 1": Case(in_config("model", dropout=1), ALL),
    "an unknown function": Case(in_config("model", activation_function="eval"), ALL),
    "a function that is an object": Case(in_config("model", activation_function={}), ALL),
    "an unknown setting": Case(in_config("model", **{TITLE: 1}), ALL),
    "a setting named __class__": Case(in_config("model", __class__="os.system"), ALL),
    "a vocabulary of nothing": Case(in_config("model", vocab_size=0), "load check sample"),
    "a vocabulary of another size": Case(in_config("model", vocab_size=23), ALL),
    "a block of another size": Case(in_config("model", block_size=9), ALL),
    "a hidden layer of 10^15": Case(in_config("model", d_ff=10**15), "load check sample"),
    "training with an unknown setting": Case(in_config("train", os="system"), RESUMED),
    "training with batches of text": Case(in_config("train", batch_size="2"), RESUMED),
    "a config that is a list": Case(put("config.json", b"[]"), ALL),
    "a config that is a number": Case(put("config.json", b"2"), ALL),
    "a config that is nothing": Case(put("config.json", b""), ALL),
    "a config of NUL": Case(put("config.json", bytes(100)), ALL),
    "a config of UTF-16": Case(put("config.json", '{"format": 2}'.encode("utf-16")), ALL),
    "a config that is no UTF-8": Case(put("config.json", b'{"\xff": 2}'), ALL),
    "a deep config": Case(put("config.json", nested(100_000)), ALL),
    "a config without a seal": Case(in_json("config.json", no_seal), ALL),
    "a config with a seal that is a list": Case(
        in_json("config.json", lambda c: c.update(sha256=[c["sha256"]]), sealed=False), ALL
    ),
    "a config with a broken seal": Case(
        in_json("config.json", lambda c: c["model_config"].update(dropout=0.2), sealed=False), ALL
    ),
    "a config of format 3": Case(in_json("config.json", lambda c: c.update(format=3)), ALL),
    "a config of a format of text": Case(
        in_json("config.json", lambda c: c.update(format="2")), ALL
    ),
    "a config of a format that commands": Case(
        in_json("config.json", lambda c: c.update(format=TITLE)), ALL
    ),
    "a config without a format": Case(
        in_json("config.json", lambda c: c.pop("format") and None), ALL
    ),
    **{
        f"a config whose {part} is {what}": Case(
            in_json(
                "config.json", functools.partial(lambda c, p, v: c.update({p: v}), p=part, v=v)
            ),
            ALL,
        )
        for part in ("model", "train", "data", "environment")
        for what, v in (("a list", []), ("null", None))
    },
    "a config without its model": Case(
        in_json("config.json", lambda c: c.pop("model") and None), ALL
    ),
    "data that is empty": Case(in_json("config.json", lambda c: c.update(data={})), RESUMED),
    "an environment that is empty": Case(
        in_json("config.json", lambda c: c.update(environment={}))
    ),
    "an environment that commands": Case(
        in_json("config.json", lambda c: c["environment"].update(torch=TITLE, numpy=[TITLE]))
    ),
    "an environment with another entry": Case(
        in_json("config.json", lambda c: c["environment"].update(compiler="gcc"))
    ),
    "a precision that there is not": Case(
        then(
            in_config("train", precision="auto"),
            in_json("config.json", lambda c: c["environment"].update(precision="eval")),
        )
    ),
    "a precision that is a list": Case(
        then(
            in_config("train", precision="auto"),
            in_json("config.json", lambda c: c["environment"].update(precision=["fp32"])),
        )
    ),
    "a precision of GPUs": Case(
        then(
            in_config("train", precision="auto"),
            in_json("config.json", lambda c: c["environment"].update(precision="fp16")),
        ),
        "resume",
    ),
    "sources without end": Case(in_config("data", sources=["/dev/zero"]), "resume"),
    "sources that are a number": Case(in_config("data", sources=5), RESUMED),
    "sources that are numbers": Case(in_config("data", sources=[5]), RESUMED),
    "no sources": Case(in_config("data", sources=[]), "resume"),
    "a source that commands": Case(in_config("data", sources=[TITLE]), "resume"),
    "a source with a NUL": Case(in_config("data", sources=["a\0b"]), "resume"),
    "an encoding that is a list": Case(in_config("data", encoding=["utf-8"]), RESUMED),
    "an encoding that commands": Case(in_config("data", encoding=TITLE), "resume"),
    "an encoding with a NUL": Case(in_config("data", encoding="utf\0-8"), "resume"),
    # tokenizer.json, sealed
    "entries of two characters": Case(characters(lambda c: ["ab", *c[1:]]), TOKENIZER),
    "an entry of no character": Case(characters(lambda c: ["", *c[1:]]), TOKENIZER),
    "an entry twice": Case(characters(lambda c: [c[1], *c[1:]]), TOKENIZER),
    "an entry that is a number": Case(characters(lambda c: [1, *c[1:]]), TOKENIZER),
    "entries that are numbers": Case(characters(lambda c: list(range(len(c)))), TOKENIZER),
    "half pairs": Case(characters(lambda c: ["\ud800", "\udfff", *c[2:]])),
    "a vocabulary that commands": Case(characters(lambda c: ["\x1b", "\x9b", "\r", *c[3:]])),
    "an entry too many": Case(characters(lambda c: [*c, "é"]), TOKENIZER),
    "an entry too few": Case(characters(lambda c: c[1:]), TOKENIZER),
    "a million entries": Case(characters(lambda _: ["a"] * 1_000_000), TOKENIZER),
    "every character there is": Case(
        characters(lambda _: [chr(i) for i in range(0x110000)]), TOKENIZER
    ),
    "no entries": Case(characters(lambda _: []), TOKENIZER),
    "null entries": Case(characters(lambda _: None), TOKENIZER),
    "entries that are a number": Case(characters(lambda _: 22), TOKENIZER),
    "entries in a deep list": Case(put("tokenizer.json", nested(100_000)), TOKENIZER),
    "an end of text": Case(
        in_json("tokenizer.json", lambda t: t.update(end_of_text=True)), TOKENIZER
    ),
    "a tokenizer of format 9": Case(
        in_json("tokenizer.json", lambda t: t.update(format=9)), TOKENIZER
    ),
    "a tokenizer of a format that commands": Case(
        in_json("tokenizer.json", lambda t: t.update(format=TITLE)), TOKENIZER
    ),
    "a tokenizer with a broken seal": Case(
        in_json("tokenizer.json", lambda t: t["characters"].__setitem__(0, "é"), sealed=False),
        TOKENIZER,
    ),
    "a tokenizer without a seal": Case(
        then(characters(lambda c: ["é", *c[1:]]), in_json("tokenizer.json", no_seal)), TOKENIZER
    ),
    "no tokenizer": Case(lambda run: (run / "tokenizer.json").unlink(), TOKENIZER),
    # manifest.json, sealed
    "a file above the folder": Case(
        files(lambda f: f.update({"../../../outside/victim.txt": f[MODEL]})), ALL
    ),
    "a file at the root": Case(files(lambda f: f.update({"/etc/hostname": f[MODEL]})), ALL),
    "a file of another name": Case(files(lambda f: f.update({"model.pt": f[MODEL]})), ALL),
    "a manifest without the weights": Case(files(lambda f: f.pop(MODEL) and None), ALL),
    "files that are a list": Case(in_json(MANIFEST, lambda m: m.update(files=[MODEL, STATE])), ALL),
    "files that are null": Case(in_json(MANIFEST, lambda m: m.update(files=None)), ALL),
    "a file that is a text": Case(files(lambda f: f.update({MODEL: "6024"})), ALL),
    "a file that is null": Case(files(lambda f: f.update({MODEL: None})), ALL),
    "a sum that is a number": Case(files(lambda f: f[MODEL].update(sha256=0)), ALL),
    "a sum that is null": Case(files(lambda f: f[MODEL].update(sha256=None)), ALL),
    **{
        f"a size that is {what}": Case(
            files(functools.partial(lambda f, v: f[MODEL].update(bytes=v), v=value)), ALL
        )
        for what, value in {
            "a text": "6024",
            "null": None,
            "a list": [6024],
            "negative": -1,
            "10^18": 10**18,
            "infinite": float("inf"),
            "NaN": float("nan"),
            "of 4,000 digits": 10**4000,
        }.items()
    },
    "a manifest of format 3": Case(in_json(MANIFEST, lambda m: m.update(format=3)), ALL),
    "a manifest of format 1 with paths": Case(
        put(MANIFEST, b'{"format": 1, "sha256": {"../../x": "0"}}'), ALL
    ),
    "a manifest of format 1 with a list": Case(put(MANIFEST, b'{"format": 1, "sha256": []}'), ALL),
    "a manifest without a seal": Case(in_json(MANIFEST, no_seal), ALL),
    "a deep manifest": Case(put(MANIFEST, nested(100_000)), ALL),
    "a manifest that is a list": Case(put(MANIFEST, b"[]"), ALL),
    # state.json, sealed
    **{
        f"a step that is {what}": Case(in_state(step=value), RESUMED)
        for what, value in {
            "a text": "4",
            "-1": -1,
            "infinite": float("inf"),
            "NaN": float("nan"),
            "null": None,
            "a list": [4],
            "a fraction": 1.5,
            "a command": TITLE,
        }.items()
    },
    "a step of 10^30": Case(in_state(step=10**30), RESUMED),
    "a norm of zero": Case(in_state(usual_grad_norm=0.0)),
    "a norm below zero": Case(in_state(usual_grad_norm=-1.0), RESUMED),
    "a scaler of other fields": Case(in_state(scaler={"x": 1})),
    "seconds that are a text": Case(in_state(train_seconds="1"), RESUMED),
    "seconds that are NaN": Case(in_state(train_seconds=float("nan")), RESUMED),
    "a best loss that is a text": Case(in_state(best_val_loss="1"), RESUMED),
    "a best step that is a list": Case(in_state(best_step=[1]), RESUMED),
    "a scaler that is a list": Case(in_state(scaler=[1]), RESUMED),
    "evaluations that are null": Case(in_state(evaluations_since_best=None), RESUMED),
    "a norm that is a text": Case(in_state(usual_grad_norm="1"), RESUMED),
    "a state with an unknown field": Case(in_state(__class__="os.system"), RESUMED),
    "a state that is a list": Case(put(STATE, b"[]"), RESUMED),
    "a deep state": Case(put(STATE, nested(100_000)), RESUMED),
    # files that only people read, and that a run goes on with
    "metrics that are a number": Case(put("metrics.jsonl", b"5\n")),
    "metrics of nothing": Case(put("metrics.jsonl", b"{}\n")),
    "metrics with a step of text": Case(put("metrics.jsonl", b'{"step": "x", "split": "train"}\n')),
    "metrics without a loss": Case(put("metrics.jsonl", b'{"step": 1, "split": "train"}\n')),
    "metrics with a loss of text": Case(
        put("metrics.jsonl", b'{"step": 1, "split": "train", "loss": "x"}\n')
    ),
    "metrics that are no UTF-8": Case(put("metrics.jsonl", b'{"step": 1, "x": "\xff"}\n')),
    "deep metrics": Case(put("metrics.jsonl", nested(100_000) + b"\n"), "check"),
    "a sample of a step that is none": Case(put("samples.txt", b"--- step 1,x\nabc\n")),
    "a sample of a step of 5,000 digits": Case(
        put("samples.txt", b"--- step " + b"9" * 5000 + b",")
    ),
    "a summary that is a list": Case(put("summary.json", b"[]"), "check"),
    "a summary that commands": Case(put("summary.json", json.dumps({"val_loss": TITLE}).encode())),
    "a deep summary": Case(put("summary.json", nested(100_000)), "check"),
    # links out of the folder
    **{
        f"{name} is a link to a file": Case(link(name, "victim.txt"))
        for name in (
            ".lock",
            ".config.json.part",
            ".tokenizer.json.part",
            ".metrics.jsonl.part",
            ".samples.txt.part",
            ".summary.json.part",
            "loss.png",
            "metrics.jsonl",
            "samples.txt",
            "summary.json",
        )
    },
    **{
        f"{name} is a link to nothing": Case(link(name, "new.txt"))
        for name in (".lock", ".config.json.part", "loss.png", "metrics.jsonl", "samples.txt")
    },
    **{
        f"{name} is a link to a file": Case(link(name, "victim.txt"), refused)
        for name, refused in (
            ("config.json", ALL),
            ("tokenizer.json", TOKENIZER),
            ("last", RESUMED),
        )
    },
    **{
        f"{name} is a link to a folder": Case(link(name, "last"))
        for name in (
            "last",
            ".last.new",
            "last.previous",
            ".best.new",
            "best.previous",
            ".last.old",
        )
    },
    "the weights are a link": Case(link(f"last/{MODEL}", "last/" + MODEL)),
    "a manifest is a link to itself": Case(
        lambda run: link(f"last/{MANIFEST}", str(run / "last" / MANIFEST))(run), RESUMED
    ),
    # folders for files and files for folders
    **{
        f"{name} is a folder": Case(folder_for(name), refused)
        for name, refused in {
            "config.json": ALL,
            "tokenizer.json": TOKENIZER,
            "metrics.jsonl": "",
            "samples.txt": "",
            "summary.json": "check",
            "loss.png": "",
            ".lock": "",
            f"last/{MODEL}": RESUMED,
            f"last/{STATE}": RESUMED,
            f"last/{MANIFEST}": RESUMED,
            f"last/{OPTIMIZER}": RESUMED,
        }.items()
    },
    "last is a file": Case(then(lambda run: remove(run / "last"), put("last", b"x")), RESUMED),
    # pipes that nobody writes to
    **{
        f"{name} is a pipe": Case(pipe_for(name), refused)
        for name, refused in {
            "config.json": ALL,
            "tokenizer.json": TOKENIZER,
            "metrics.jsonl": "",
            "samples.txt": "",
            "summary.json": "check",
            "loss.png": "",
            ".lock": "",
            f"last/{MODEL}": RESUMED,
            f"last/{STATE}": RESUMED,
            f"last/{MANIFEST}": RESUMED,
            f"last/{OPTIMIZER}": RESUMED,
        }.items()
    },
}


# --- what becomes of them


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class HangsError(BaseException):
    """Nothing came."""


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    """Stop what would wait for ever."""

    def stop(*_: object) -> None:
        raise HangsError(f"nothing came in {seconds} seconds")

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


@pytest.fixture
def do(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Do something with ``run`` in the current folder, as the command line does it."""

    def by_command(*arguments: str, stream: type[io.StringIO] = io.StringIO) -> Outcome:
        out, err = stream(), stream()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            patch.setattr(cli, "run", lambda a: cli.COMMANDS[a[0]].run(parsed(*a)))
            with no_longer_than(SECONDS), pytest.raises(SystemExit) as stop:
                cli.main(arguments)
        return Outcome(int(stop.value.code or 0), out.getvalue(), err.getvalue())

    def do(verb: str, **options: Any) -> Outcome:
        if verb in COMMANDS:
            return by_command(*COMMANDS[verb], **options)
        with warnings.catch_warnings(), no_longer_than(SECONDS):
            warnings.simplefilter("ignore", ChargptWarning)
            try:
                chargpt.load("run")
            except UserError as error:
                return Outcome(2, "", f"chargpt: {error}\n")
        return Outcome(0, "", "")

    return do


def commands(text: str) -> str:
    """Return the characters that a terminal would obey."""
    return "".join(c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs"))


def check_outcome(verb: str, outcome: Outcome, *, refused: bool) -> None:
    """Fail unless a verb worked, or said in one line why not."""
    assert outcome.code in ((1, 2) if refused else (0, 1, 2)), outcome
    assert "Traceback" not in outcome.out + outcome.err
    said = outcome.err.splitlines()
    if verb == "check" and outcome.code == 1:
        said = [line for line in outcome.out.splitlines() if line.startswith("BAD")]
        assert said, "a line says what is bad"
    elif outcome.code:
        assert said[-1].startswith("chargpt: "), "the last line says what is wrong"
    if verb == "load" and outcome.code:
        assert len(said) == 1, "one line"
    for line in said:
        assert len(line) <= LONGEST_LINE, f"{line[:80]}… has {len(line)} characters"
    assert not commands(outcome.err), "a message commands nothing"
    assert not commands(outcome.out if verb == "check" else "")


# What cannot be loaded cannot be sampled from, either: that is one and the same function.
TRIED = [
    (name, verb)
    for name, case in CASES.items()
    for verb in VERBS
    if verb != "sample" or "load" not in case.refused
]


@pytest.mark.parametrize(("name", "verb"), TRIED)
def test_a_hostile_folder_does_no_harm(name: str, verb: str, run: Path, do: Any) -> None:
    CASES[name].spoil(run)
    before = contents(outside(run))
    outcome = do(verb)
    assert contents(outside(run)) == before, "nothing outside of the folder is touched"
    check_outcome(verb, outcome, refused=verb in CASES[name].refused.split())


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50


@pytest.mark.parametrize("verb", VERBS)
def test_the_folder_is_good_before_it_is_spoilt(verb: str, run: Path, do: Any) -> None:
    assert do(verb).code == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "last/manifest.json"])
def test_nesting_as_deep_as_can_be_read(name: str, run: Path, do: Any) -> None:
    """What can be read once may be too deep to be sealed, or to be read again further down."""
    deepest = 0
    with contextlib.suppress(RecursionError):
        for depth in range(100, 10_000):
            json.loads(nested(depth))
            deepest = depth
    for depth in range(deepest - 50, deepest + 3):
        text = b'{"format": 2, "sha256": "", "x": ' + nested(depth) + b"}"
        (run / name).write_bytes(text)
        check_outcome("check", do("check"), refused=True)


def test_what_is_no_run_is_never_cleared(run: Path, do: Any) -> None:
    """A config.json makes no run: other things have one, too."""
    for name in ("best", "last"):
        shutil.rmtree(run / name)
    (run / "config.json").write_text('{"name": "something else"}')
    (run / "thesis.tex").write_text("years of work")
    before = contents(run)
    with pytest.raises((UserError, chargpt.TrainingError)):
        chargpt.train("missing.txt", out=run, resume="auto", quiet=True)
    after = contents(run)
    assert {name: after.get(name) for name in before if name != ".lock"} == {
        name: data for name, data in before.items() if name != ".lock"
    }


def test_a_run_whose_text_is_gone_is_not_cleared(run: Path, do: Any) -> None:
    for name in ("best", "last"):
        shutil.rmtree(run / name)
    with pytest.raises(UserError):
        chargpt.train("missing.txt", out=run, resume="auto", quiet=True)
    assert (run / "metrics.jsonl").exists()
    assert (run / "summary.json").exists()


# --- terminals


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


CONTROLS = [chr(i) for i in (*range(9), *range(11, 32), *range(127, 160))]
TURNING = ["\u200b", "\u200e", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff", "\U000e0001"]


def vocabulary_of(alphabet: list[str]) -> Spoil:
    def change(known: list[str]) -> list[str]:
        return ["\n", *alphabet][: len(known)]

    return characters(change)


@pytest.mark.parametrize("alphabet", [CONTROLS, CONTROLS[21:], CONTROLS[42:] + TURNING])
def test_a_model_commands_no_terminal(alphabet: list[str], run: Path, do: Any) -> None:
    alphabet = (alphabet + CONTROLS)[:30]
    vocabulary_of(alphabet)(run)
    outcome = do("sample", stream=Terminal)
    assert outcome.code == 0
    assert "\\x" in outcome.out or "\\u" in outcome.out, "it wrote something of its vocabulary"
    assert not commands(outcome.out + outcome.err)


def test_a_prompt_and_a_line_that_is_typed_command_no_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, do: Any
) -> None:
    vocabulary_of(["\x1b", "]", "0", ";", "\x07", *"bcdefghijklmnopqrstuvwxyz"])(run)
    monkeypatch.setitem(COMMANDS, "sample", [*COMMANDS["sample"], "--prompt", "\x1b]0;\x07"])
    outcome = do("sample", stream=Terminal)
    assert outcome.code == 0
    assert outcome.out.startswith(r"\x1b]0;\x07")
    assert not commands(outcome.out + outcome.err)
    # A prompt with a character that the model does not know is told of.
    monkeypatch.setitem(COMMANDS, "sample", [*COMMANDS["sample"][:-1], "\x9b2J"])
    outcome = do("sample", stream=Terminal)
    assert outcome.code == 2
    assert not commands(outcome.out + outcome.err)
    typed = iter(["\x1b]0;\x07", "\x9b2J"])

    def type_line(prompt: str = "") -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setitem(COMMANDS, "sample", [*COMMANDS["sample"][:-2], "--interactive"])
    outcome = do("sample", stream=Terminal)
    assert outcome.code == 0
    assert not commands(outcome.out + outcome.err)


def test_surprise_commands_no_terminal_but_colours(
    run: Path, monkeypatch: pytest.MonkeyPatch, do: Any
) -> None:
    vocabulary_of(["\x1b", "]", "0", ";", "\x07", *"bcdefghijklmnopqrstuvwxyz"])(run)
    Path("evil.txt").write_text("bcd\x1b]0;e\x07\n")
    monkeypatch.setitem(COMMANDS, "sample", "sample run --surprise evil.txt --device cpu".split())
    outcome = do("sample", stream=Terminal)
    assert outcome.code == 0
    assert not commands(re.sub(r"\x1b\[[\d;]*m", "", outcome.out) + outcome.err)


@pytest.mark.parametrize("verb", ["check", "resume"])
@pytest.mark.parametrize(
    "spoil",
    {
        "format": in_json("config.json", lambda c: c.update(format=TITLE)),
        "setting": in_config("model", **{TITLE: TITLE}),
        "environment": in_json(
            "config.json", lambda c: c["environment"].update(torch=TITLE, numpy=TITLE)
        ),
        "source": in_config("data", sources=[TITLE]),
        "separator": in_config("data", document_separator=TITLE),
        "tokenizer": in_json("tokenizer.json", lambda t: t.update(format=TITLE)),
        "tensor": in_header(
            lambda h: {TITLE if k == "final_norm.bias" else k: v for k, v in h.items()}
        ),
        "optimizer": in_tensors(lambda t: {TITLE + k: v for k, v in t.items()}, OPTIMIZER),
        "step": in_state(step=TITLE),
        "summary": put("summary.json", json.dumps({"val_loss": TITLE}).encode()),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_file_commands_no_terminal(
    spoil: tuple[str, Spoil], verb: str, run: Path, do: Any
) -> None:
    spoil[1](run)
    outcome = do(verb, stream=Terminal)
    assert TITLE[:-1] not in outcome.out + outcome.err


def test_a_real_terminal_is_sent_no_command(run: Path) -> None:
    import pty

    vocabulary_of(CONTROLS)(run)
    ours, theirs = pty.openpty()
    arguments = [sys.executable, "-m", "chargpt", *COMMANDS["sample"]]
    process = subprocess.Popen(arguments, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # how a terminal tells of its end
        while piece := os.read(ours, 65536):
            said += piece
    os.close(ours)
    assert process.wait() == 0
    text = said.decode().replace("\r\n", "\n")  # the terminal's own line ends
    assert "\\x" in text
    assert not commands(text)


def test_a_model_of_half_pairs_writes_a_file(
    run: Path, monkeypatch: pytest.MonkeyPatch, do: Any
) -> None:
    vocabulary_of([chr(0xD800 + i) for i in range(30)])(run)
    monkeypatch.setitem(COMMANDS, "sample", [*COMMANDS["sample"], "--out", "sample.txt"])
    outcome = do("sample")
    check_outcome("sample", outcome, refused=False)


# --- memory, and loops that cannot be stopped from within: in a process of their own

HELPER = r"""
import json, os, resource, signal, sys, warnings
import chargpt
from chargpt.cli import main as cli
from chargpt.base.errors import TrainingError, UserError
from chargpt.measure.inspect import inspect_run
from chargpt.train import train
from chargpt.runs.folder import load

def check(run):
    bad = [finding for finding in inspect_run(run) if not finding.good]
    if bad:
        raise UserError(bad[0].remark)

def resume(run):
    try:
        cli.main(["train", "--out", run, "--resume", "--steps", "6"])
    except SystemExit as stop:
        if stop.code in (1, 2):
            raise UserError("told")

VERBS = {"load": load, "check": check, "resume": resume}

def attempt(verb, run):
    try:
        VERBS[verb](run)
    except (UserError, TrainingError) as error:
        return "refused"
    except BaseException as error:
        return type(error).__name__ + ": " + str(error)[:200]
    return "worked"

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
    """Does a verb to a run in a process of its own; returns the outcome and the MiB it took."""
    process = subprocess.Popen(
        [sys.executable, "-c", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(verb: str, run: Path) -> tuple[str, float]:
        assert process.stdin is not None
        assert process.stdout is not None
        print(
            json.dumps([verb, str(run), 10 * SECONDS, CPU_SECONDS]), file=process.stdin, flush=True
        )
        outcome, growth = json.loads(process.stdout.readline())
        return outcome, growth

    yield ask
    process.stdin.close()
    process.wait()
    process.stdout.close()


MANY = 20 * 2**20 // 3  # empty lists in 20 MB of JSON; in memory they have 400 MB


def many_lists(header: bytes = b'{"format": 2, "x": [') -> bytes:
    return header + b"[]," * MANY + b"1]}"


def sealed_config(**model: int) -> Spoil:
    return in_config("model", **model)


def amplified(run: Path) -> None:
    """A file of 1 MB whose tensors lie upon each other and make up the size of a large model."""
    config = json.loads((run / "config.json").read_text())
    width, n_layer = 256, 150  # 470 MB
    shape = {"d_model": width, "d_ff": 4 * width, "n_layer": n_layer, "n_head": 1}
    config["model_config"] |= shape
    (run / "config.json").write_text(json.dumps(seal(config)))
    from chargpt.compute.counts import parameters_of

    wanted = parameters_of(GPT2Config(**config["model_config"]))
    sizes = {
        "token_embedding.weight": [config["model_config"]["vocab_size"], width],
        "position_embedding.weight": [config["model_config"]["block_size"], width],
        "final_norm.weight": [width],
    }
    rest = wanted - sum(s[0] * (s[1] if len(s) > 1 else 1) for s in sizes.values())
    n_here = 2**18
    for i in range(rest // n_here):
        sizes[f"x{i}"] = [n_here]
    sizes["rest"] = [rest % n_here]
    header = {}
    for name, size in sizes.items():
        n = size[0] * (size[1] if len(size) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [0, 4 * n]}
    text = json.dumps(header).encode()
    put(MODEL, struct.pack("<Q", len(text)) + text + bytes(4 * n_here))(run)


def many_layers(run: Path) -> None:
    """A file of 2 MB whose config asks for 40,000 layers of one number each."""
    config = json.loads((run / "config.json").read_text())
    ones = dict.fromkeys(("d_model", "d_ff", "n_head", "block_size"), 1)
    config["model_config"] |= ones | {"n_layer": 40_000}
    (run / "config.json").write_text(json.dumps(seal(config)))
    from chargpt.compute.counts import parameters_of

    v = config["model_config"]["vocab_size"]
    sizes = {
        "token_embedding.weight": [v, 1],
        "position_embedding.weight": [1, 1],
        "final_norm.weight": [1],
    }
    sizes["x"] = [parameters_of(GPT2Config(**config["model_config"])) - v - 2]
    header, end = {}, 0
    for name, size in sizes.items():
        start, end = end, end + 4 * size[0]
        header[name] = {"dtype": "F32", "shape": size, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    put(MODEL, struct.pack("<Q", len(text)) + text + bytes(end))(run)


def endless_shape(run: Path) -> None:
    """Numbers whose product takes hours."""
    shape = ",".join(["9" * 4200] * 3000)
    header = f'{{"x": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'
    text = header.encode()
    put(MODEL, struct.pack("<Q", len(text)) + text + bytes(4))(run)


def weights_of_zeros(run: Path) -> None:
    pipe_for(f"best/{MODEL}")(run)
    link(f"best/{MODEL}", "/dev/zero")(run)


def sparse(name: str, size: int) -> Spoil:
    def spoil(run: Path) -> None:
        with (run / name).open("wb") as file:
            file.truncate(size)

    return spoil


def many_settings(run: Path) -> None:
    """A config.json with a correct seal and a part that has millions of entries."""
    import hashlib

    fields = json.loads((run / "config.json").read_text())
    fields.pop(SEAL)
    lists = "[" + "[]," * MANY + "1]"
    text = json.dumps({**fields, "zzz": 0}, sort_keys=True, separators=(",", ":"))
    text = text.replace('"zzz":0', f'"zzz":{lists}')
    digest = hashlib.sha256(text.encode()).hexdigest()
    (run / "config.json").write_text(text[:-1] + f',"{SEAL}":"{digest}"}}')


HEAVY: dict[str, tuple[Spoil, str, bool]] = {
    # how it is made; what is done to it; whether that must be refused
    "10^9 layers": (sealed_config(n_layer=10**9), "load check resume", True),
    "10^5 layers": (sealed_config(n_layer=10**5), "load check resume", True),
    "a width of 10^12": (sealed_config(d_model=10**12, d_ff=8), "load check resume", True),
    "a width of 10^12 for 7 heads": (
        sealed_config(d_model=10**12, n_head=7),
        "load check resume",
        True,
    ),
    "a block of 10^8": (sealed_config(block_size=10**8), "load check resume", True),
    "a hidden layer of 10^8": (sealed_config(d_ff=10**8), "load check resume", True),
    "a width of 4,000 digits": (sealed_config(d_model=10**4000), "load check resume", True),
    "layers of 4,300 digits": (sealed_config(n_layer=10**4299), "load check resume", True),
    "100 MB of nesting": (
        put("config.json", b"[" * (100 * 2**20)),
        "load check resume",
        True,
    ),
    "60 MB of nesting": (put("config.json", b"[" * (60 * 2**20)), "load", True),
    "millions of lists in config.json": (many_settings, "load check resume", False),
    "millions of lists in tokenizer.json": (
        put("tokenizer.json", many_lists()),
        "load check",
        True,
    ),
    "millions of lists in a manifest": (put(MANIFEST, many_lists()), "load check", True),
    "millions of lists in a state": (put(STATE, many_lists(b'{"step": [')), "check resume", True),
    "millions of lists in a header": (
        in_header(lambda _: many_lists(b'{"x": [')),
        "load check resume",
        True,
    ),
    "millions of lists in the summary": (put("summary.json", many_lists()), "check", False),
    "tensors upon each other": (amplified, "load check", True),
    "layers without end": (many_layers, "load check resume", True),
    "a shape without end": (endless_shape, "load check", True),
    "metrics of 150 MB": (sparse("metrics.jsonl", 150 * 2**20), "check", True),
    "a tokenizer of zeros without end": (link("tokenizer.json", "/dev/zero"), "load check", True),
    # what PyTorch does not look at before it computes with it
    "an optimizer of nothing": (in_tensors(lambda _: {}, OPTIMIZER), "resume", True),
    "an optimizer of numbers": (
        in_tensors(lambda t: {k: torch.tensor(1.0) for k in t}, OPTIMIZER),
        "resume",
        True,
    ),
    "an optimizer without its counter": (
        in_tensors(lambda t: {k: v for k, v in t.items() if v.dim()}, OPTIMIZER),
        "resume",
        True,
    ),
    "an optimizer without a part of its memory": (
        in_tensors(lambda t: {k: v for k, v in t.items() if "exp_avg_sq" not in k}, OPTIMIZER),
        "resume",
        True,
    ),
    "an optimizer of whole numbers": (
        in_tensors(lambda t: {k: v.to(torch.int8) for k, v in t.items()}, OPTIMIZER),
        "resume",
        True,
    ),
    "an optimizer with counters as large as the weights": (
        in_tensors(
            lambda t: {
                k: t[k.replace("/step", "/exp_avg")].clone() if k.endswith("/step") else v
                for k, v in t.items()
            },
            OPTIMIZER,
        ),
        "resume",
        True,
    ),
    "an optimizer of another model": (
        in_tensors(lambda t: {f"x{k}": v for k, v in t.items()}, OPTIMIZER),
        "resume",
        True,
    ),
    "an optimizer with a slot more": (
        in_tensors(lambda t: t | {"final_norm.bias/__class__": torch.zeros(8)}, OPTIMIZER),
        "resume",
        True,
    ),
    "a summary of zeros without end": (link("summary.json", "/dev/zero"), "check", True),
    "weights of zeros without end": (weights_of_zeros, "load check", True),
}


@pytest.mark.skipif(sys.platform != "linux", reason="measured as Linux tells it")
@pytest.mark.parametrize(
    ("name", "verb"), [(name, verb) for name, heavy in HEAVY.items() for verb in heavy[1].split()]
)
def test_a_hostile_folder_takes_no_memory_and_comes_to_an_end(
    name: str, verb: str, run: Path, helper: Any
) -> None:
    spoil, _, refused = HEAVY[name]
    spoil(run)
    outcome, growth = helper(verb, run)
    assert outcome in (("refused",) if refused else ("refused", "worked"))
    print(f"{verb} of {name}: {outcome}, {growth:.0f} MiB")
    assert growth <= 200
