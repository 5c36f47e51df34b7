"""Checkpoints in nanoGPT's format: the same function as a run, and hostile ones that do nothing.

CHARGPT_NANOGPT may name a clone of nanoGPT, whose own model is then the reference.
"""

import contextlib
import copy
import importlib.util
import io
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nanogpt_files import ARGS, SORTED, UNSORTED, checkpoint, random_state, vocabulary, write
from pickle_attacks import ATTACKS
from torch import Tensor

from chargpt.base.errors import UserError
from chargpt.cli import main as cli
from chargpt.export.nanogpt import import_nanogpt
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import read_state
from chargpt.runs.folder import load, read_config


def reference(state: dict[str, Tensor], args: dict[str, Any], ids: Tensor) -> Tensor:
    """Return nanoGPT's logits of one sequence, (T, V): its formulas, one head at a time."""
    state = {name: value.double() for name, value in state.items()}
    n_head, size = args["n_head"], args["n_embd"] // args["n_head"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: len(ids)]
    past = torch.ones(len(ids), len(ids)).tril().bool()
    for layer in range(args["n_layer"]):
        block = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").split(n_head * size, 1)
        heads = []
        for h in range(n_head):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            heads.append(scores.masked_fill(~past, -torch.inf).softmax(-1) @ v[:, part])
        x = x + linear(torch.cat(heads, 1), f"{block}.attn.c_proj")
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


# --- the same function


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("characters", [SORTED, UNSORTED])
def test_the_run_computes_what_nanogpt_computes(
    tmp_path: Path, bias: bool, prefix: str, characters: str
) -> None:
    args = ARGS | {"bias": bias}
    line = import_nanogpt(*write(tmp_path, checkpoint(args, prefix), vocabulary(characters)))
    assert "7 characters, step 2,000, validation loss 1.4697" in line
    model, tokenizer = load(tmp_path / "run")
    assert (model.config.dropout, model.config.bias) == (0.2, bias)
    order = [characters.index(character) for character in tokenizer.characters]
    text = "abc\n𝄞é ab𝄞𝄞c"
    ours = torch.tensor(tokenizer.encode(text).astype("int64"))
    theirs = torch.tensor([characters.index(character) for character in text])
    expected = reference(random_state(args), args, theirs)[:, order]  # (T, V)
    with torch.no_grad():
        torch.testing.assert_close(model(ours[None])[0].double(), expected, atol=1e-5, rtol=1e-5)
    assert read_config(tmp_path / "run").imported_from == "nanoGPT"
    assert read_state(tmp_path / "run" / "best")["step"] == 2000
    assert all(finding.good for finding in inspect_run(tmp_path / "run"))


def test_the_order_in_the_vocabulary_does_not_matter(tmp_path: Path) -> None:
    meta = vocabulary(SORTED)
    meta["itos"] = dict(reversed(meta["itos"].items()))
    import_nanogpt(*write(tmp_path, checkpoint(ARGS), meta))
    assert load(tmp_path / "run").tokenizer.characters == tuple(SORTED)


def test_old_and_half_precise_checkpoints(tmp_path: Path) -> None:
    """Old versions name no dropout and bias, save the causal mask, and no loss."""
    args = {name: value for name, value in ARGS.items() if name not in ("dropout", "bias")}
    state = {name: value.bfloat16() for name, value in random_state(ARGS).items()}
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12)}
    values = {"model": state | mask, "model_args": args, "iter_num": 3, "best_val_loss": 1e9}
    import_nanogpt(*write(tmp_path, values, vocabulary(SORTED)))
    ids = torch.arange(7)
    with torch.no_grad():
        logits = load(tmp_path / "run").model(ids[None])[0].double()
    torch.testing.assert_close(logits, reference(state, ARGS, ids), atol=1e-5, rtol=1e-5)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ckpt, meta, out = map(str, write(tmp_path, checkpoint(ARGS), vocabulary(SORTED)))
    for arguments, code in (
        (["import", "nanogpt", ckpt, "--meta", meta, "--out", out], 0),
        (["sample", out, "--prompt", "abc", "--max-new-tokens", "5"], 0),
        (["import", "nanogpt", ckpt, "--meta", meta, "--out", out], 2),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert (stop.value.code or 0) == code
    assert "run exists: give the name of a new folder" in capsys.readouterr().err


@pytest.mark.skipif("CHARGPT_NANOGPT" not in os.environ, reason="no clone of nanoGPT")
@pytest.mark.parametrize("bias", [True, False])
def test_beside_nanogpt_itself(tmp_path: Path, bias: bool) -> None:
    path = Path(os.environ["CHARGPT_NANOGPT"], "model.py")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec and spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    args = ARGS | {"bias": bias}
    torch.manual_seed(0)
    theirs = module.GPT(module.GPTConfig(**args)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    values = {"model": theirs.state_dict(), "model_args": args}
    import_nanogpt(*write(tmp_path, values, vocabulary(SORTED)))
    ids = torch.randint(7, (5, 12))
    with torch.no_grad():
        expected, _ = theirs(ids, targets=ids)  # with targets: the logits of all positions
        difference = (load(tmp_path / "run").model(ids) - expected).abs().max()
    assert difference < 1e-5


# --- files that do not fit

Edit = Callable[[dict[str, Any]], Any]


def weight(name: Any, value: Any) -> Edit:
    return lambda values: values["model"].update({name: value})


def args(**changes: Any) -> Edit:
    return lambda values: values["model_args"].update(changes)


WTE = "transformer.wte.weight"
WRONG_CHECKPOINTS: dict[str, tuple[Edit, str]] = {
    "no model": (lambda v: v.pop("model"), "has no model"),
    "a list": (lambda v: v.update(model=[1]), "has no model"),
    "no args": (lambda v: v.pop("model_args"), "has no model_args"),
    "no depth": (lambda v: v["model_args"].pop("n_layer"), "no n_layer in its model_args"),
    "text": (args(n_layer="2"), "n_layer is neither"),
    "nested": (args(n_head=[[[]]]), "n_head is neither"),
    "zero": (args(n_head=0), "n_head is 0"),
    "heads": (args(n_head=3), "n_head is 3, which does not divide"),
    "huge": (args(n_layer=10**9), "too small for the model"),
    "huge context": (args(block_size=2**70), "too small for the model"),
    "deep": (lambda v: v["model_args"].update(n_layer=100, n_embd=2), "too few tensors"),
    "twice": (weight(f"_orig_mod.{WTE}", torch.ones(7, 8)), "two of one name"),
    "a number as name": (weight(0, torch.ones(8)), "two of one name"),
    "missing": (lambda v: v["model"].pop("transformer.h.1.ln_2.weight"), "blocks.1.feed_forward.n"),
    "unknown": (weight("transformer.h.2.ln_1.weight", torch.ones(8)), "blocks.2.attention.norm"),
    "ours": (weight("blocks.0.attention.norm", torch.ones(8)), "'blocks.0.attention.norm' is m"),
    "no tensor": (weight(WTE, 5), "token_embedding.weight"),
    "shape": (weight(WTE, torch.ones(7, 9)), "token_embedding.weight"),
    "integers": (weight(WTE, torch.ones(7, 8, dtype=torch.long)), "token_embedding.weight"),
    "expanded": (weight(WTE, torch.ones(1, 1).expand(10**9, 10**6)), "token_embedding.weight"),
    "untied": (weight("lm_head.weight", torch.ones(7, 8)), "output layer .* is not its token emb"),
    "other head": (weight("lm_head.weight", torch.ones(9, 8)), "output layer"),
    "NaN": (weight("transformer.ln_f.weight", torch.full((8,), torch.nan)), "is not finite"),
    "no bias": (args(bias=False), "blocks.0.attention.norm.bias"),
}


@pytest.mark.parametrize(("edit", "message"), WRONG_CHECKPOINTS.values(), ids=WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    values = checkpoint(copy.deepcopy(ARGS))
    values.pop("optimizer")
    edit(values)
    ckpt, meta, out = write(tmp_path, values, vocabulary(SORTED))
    with pytest.raises(UserError, match=message):
        import_nanogpt(ckpt, meta, out)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pt", "meta.pkl"}


GOOD = vocabulary(SORTED)
WRONG_VOCABULARIES: dict[str, tuple[Any, str]] = {
    "a number": (7, "is not a vocabulary"),
    "only a size": ({"vocab_size": 7}, "itos does not map"),
    "empty": (vocabulary(""), "itos does not map"),
    "a gap": (GOOD | {"itos": {i + (i > 3): c for i, c in GOOD["itos"].items()}}, "itos does not"),
    "texts as ids": (GOOD | {"itos": {str(i): c for i, c in GOOD["itos"].items()}}, "itos does"),
    "two characters": (GOOD | {"itos": GOOD["itos"] | {6: "ab"}}, "'ab' is not one character"),
    "no character": (GOOD | {"itos": GOOD["itos"] | {6: ""}}, "'' is not one character"),
    "a number as character": (GOOD | {"itos": GOOD["itos"] | {6: 5}}, "5 is not one character"),
    "twice": (GOOD | {"itos": GOOD["itos"] | {6: "a"}}, "stoi is not the inverse"),
    "no inverse": (GOOD | {"stoi": GOOD["stoi"] | {"a": 3, "b": 2}}, "stoi is not the inverse"),
    "more in stoi": (GOOD | {"stoi": GOOD["stoi"] | {"z": 7}}, "stoi is not the inverse"),
    "another size": (GOOD | {"vocab_size": 8}, "vocab_size is 8, itos has 7"),
    "fewer": (vocabulary(SORTED[:-1]), "has 7 tokens, .* 6 characters"),
}


@pytest.mark.parametrize(("meta", "message"), WRONG_VOCABULARIES.values(), ids=WRONG_VOCABULARIES)
def test_a_wrong_vocabulary_is_refused(tmp_path: Path, meta: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        import_nanogpt(*write(tmp_path, checkpoint(ARGS), meta))
    assert not (tmp_path / "run").exists()


def test_missing_files_and_half_a_character(tmp_path: Path) -> None:
    ckpt, meta, out = write(tmp_path, checkpoint(ARGS), GOOD)
    with pytest.raises(UserError, match="none.pt is not a file: give the ckpt.pt"):
        import_nanogpt(tmp_path / "none.pt", meta, out)
    with pytest.raises(UserError, match="none.pkl is not a vocabulary .it is not a file"):
        import_nanogpt(ckpt, tmp_path / "none.pkl", out)
    meta.write_bytes(pickle.dumps(vocabulary(SORTED[:-1] + "\ud800"), 0))
    with pytest.raises(UserError, match="is half a character"):
        import_nanogpt(ckpt, meta, out)


# --- hostile files


def archive(pickled: bytes, name: str = "ckpt/data.pkl", **others: bytes) -> bytes:
    """Return a checkpoint with this pickle and one storage of 4 kB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(name, pickled)
        parts = {"ckpt/byteorder": b"little", "ckpt/data/0": bytes(4096), "ckpt/version": b"3\n"}
        for part, data in {**parts, **others}.items():
            zipped.writestr(part, data)
    return file.getvalue()


def with_weight(numel: int, size: bytes, stride: bytes) -> bytes:
    """Return a pickled checkpoint whose embedding is a view of a storage of `numel` numbers."""
    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    view = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"\x8a\x08"
        + numel.to_bytes(8, "little")
    )
    view += b"tQK\x00" + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"
    state = b"}X\x16\x00\x00\x00transformer.wte.weight" + view + b"s"
    settings = pickle.dumps(ARGS, 2)[2:-1]
    return (
        b"\x80\x02}(X\x05\x00\x00\x00model"
        + state
        + b"X\x0a\x00\x00\x00model_args"
        + settings
        + b"u."
    )


def compressed(n_bytes: int) -> bytes:
    """Return a zip bomb: a pickle that unpacks to `n_bytes`."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped,
        zipped.open("ckpt/data.pkl", "w", force_zip64=True) as part,
    ):
        for _ in range(n_bytes >> 20):
            part.write(bytes(1 << 20))
    return file.getvalue()


def overlapping() -> bytes:
    """Return a zip bomb without compression: the directory names the same bytes many times."""
    data = bytearray(archive(b"\x80\x02}."))
    start = data.index(b"PK\x01\x02")
    size = data.index(b"ckpt/data.pkl", start) - 46 + 24  # of the first entry
    data[size : size + 4] = data[size - 4 : size] = b"\xff\xff\xff\x7f"
    return bytes(data)


def torchscript() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


def legacy(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def saved(values: Any) -> bytes:
    file = io.BytesIO()
    torch.save(values, file)
    return file.getvalue()


Hostile = Callable[[Path], bytes]
PAIR = b"K\x07K\x08\x86"
HOSTILE: dict[str, Hostile] = {
    **{f"{name}, in a zip": lambda p, a=a: archive(a(p)) for name, a in ATTACKS.items()},
    "a plain pickle": lambda p: pickle.dumps(Bomb(p)),
    "torch.save": lambda p: saved({"model": Bomb(p)}),
    "torch.save, before 2020": lambda p: legacy({"model": Bomb(p)}),
    "harmless, before 2020": lambda p: legacy({"model": {}}),
    "TorchScript": lambda p: torchscript(),
    "two pickles": lambda p: archive(b"\x80\x02}.", **{"ckpt/DATA.PKL": ATTACKS["INST"](p)}),
    "upper case": lambda p: archive(ATTACKS["INST"](p), "ckpt/DATA.PKL"),
    "a zip bomb": lambda p: compressed(2**28),
    "parts over each other": lambda p: overlapping(),
    "no pickle": lambda p: archive(b"", "ckpt/other"),
    "an empty pickle": lambda p: archive(b""),
    "empty": lambda p: b"",
    "text": lambda p: b"hello\n",
    "cut": lambda p: saved(checkpoint(ARGS))[:-100],
    "cut in the middle": lambda p: saved(checkpoint(ARGS))[:2000],
    "only the end": lambda p: saved(checkpoint(ARGS))[2000:],
    "a list": lambda p: saved([1, 2]),
    "a module": lambda p: saved(torch.nn.Linear(2, 2)),
    "bytearray of 1 TB": lambda p: archive(
        b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x7f\x85R."
    ),
    "storage of 4 TB": lambda p: archive(with_weight(2**40, PAIR, b"K\x08K\x01\x86")),
    "storage of negative size": lambda p: archive(with_weight(2**63, PAIR, b"K\x08K\x01\x86")),
    "a view beyond its storage": lambda p: archive(
        with_weight(8, b"J\xff\xff\xff\x7fK\x08\x86", b"K\x08K\x01\x86")
    ),
    "negative strides": lambda p: archive(with_weight(1024, PAIR, b"J\xff\xff\xff\xffK\x01\x86")),
    "tuples in tuples": lambda p: archive(b"\x80\x02}()" + b"\x85" * 900_000 + b"K\x01u."),
    "lists in lists": lambda p: archive(b"\x80\x02" + b"]" * 400_000 + b"a" * 399_999 + b"."),
    "a pickle of 2 MB": lambda p: archive(b"\x80\x02" + b"(" * 2**21 + b"."),
    "a million marks": lambda p: archive(b"\x80\x02" + b"(" * 1_000_000 + b"."),
    "a dictionary in itself": lambda p: archive(
        b"\x80\x02}q\x00X\x0a\x00\x00\x00model_argsh\x00sX\x05\x00\x00\x00modelh\x00s."
    ),
    "memo": lambda p: archive(b"\x80\x02h\x07."),
    "a bad escape": lambda p: archive(b"S'\\z'\n."),
}
IN_LIMITS = """
import resource, sys
from pathlib import Path
from chargpt.base.errors import UserError
from chargpt.export.nanogpt import import_nanogpt
taken = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**28, taken + 2**28))
meta, out, *names = map(Path, sys.argv[1:])
for ckpt in names:
    try:
        print(import_nanogpt(ckpt, meta, out))
    except UserError as error:
        print("refused", ckpt.name, error)
"""


def test_hostile_checkpoints_do_nothing(tmp_path: Path) -> None:
    """Nothing runs, and each takes less than 256 MiB more than the program and its libraries."""
    marker, folder = tmp_path / "it-ran", tmp_path / "files"
    pickle.loads(pickle.dumps(Bomb(tmp_path / "control")))
    assert (tmp_path / "control").exists()
    folder.mkdir()
    (folder / "meta.pkl").write_bytes(pickle.dumps(GOOD))
    for number, attack in enumerate(HOSTILE.values()):
        (folder / f"{number}.pt").write_bytes(attack(marker))
    limits = IN_LIMITS if sys.platform == "linux" else IN_LIMITS.replace("resource", "# ", 1)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", limits, "meta.pkl", "run"]
        + [f"{number}.pt" for number in range(len(HOSTILE))],
        capture_output=True, text=True, encoding="utf-8", check=False, cwd=folder,
    )  # fmt: skip
    lines = [line.split()[:2] for line in done.stdout.splitlines()]
    assert lines == [["refused", f"{number}.pt"] for number in range(len(HOSTILE))], done.stderr
    assert not marker.exists()
    assert not (folder / "run").exists()
    assert not list(folder.glob(".*"))


def test_a_changed_checkpoint_raises_nothing_else(tmp_path: Path) -> None:
    """Bytes of the pickle, with the checksums of the zip file made to fit."""
    rng = random.Random(0)
    ckpt, meta, out = write(tmp_path, checkpoint(ARGS), GOOD)
    with zipfile.ZipFile(ckpt) as zipped:
        parts = {name: zipped.read(name) for name in zipped.namelist()}
    [name] = (name for name in parts if name.endswith(".pkl"))
    for _ in range(200):
        changed = bytearray(parts[name])
        changed[rng.randrange(len(changed))] = rng.choice([rng.randrange(256), *b"}]()tRbQqhKJ.s"])
        with zipfile.ZipFile(ckpt, "w") as zipped:
            for part, data in (parts | {name: bytes(changed)}).items():
                zipped.writestr(part, data)
        with contextlib.suppress(UserError):
            import_nanogpt(ckpt, meta, out)
            shutil.rmtree(out)


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_hostile_vocabularies_do_nothing(tmp_path: Path, attack: Hostile) -> None:
    ckpt, meta, out = write(tmp_path, checkpoint(ARGS), GOOD)
    meta.write_bytes(attack(tmp_path / "it-ran"))
    with pytest.raises(UserError, match="meta.pkl is not a vocabulary"):
        import_nanogpt(ckpt, meta, out)
    assert not (tmp_path / "it-ran").exists()
