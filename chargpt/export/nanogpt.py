"""A model that nanoGPT's train.py saved (ckpt.pt and meta.pkl) becomes a run. No code in it is run.

Neither file is unpickled freely. meta.pkl is read by `chargpt.export.pickles`. For ckpt.pt, which
is a zip file of tensors around a pickle, PyTorch's ``weights_only`` loader makes only tensors and
plain values; before that, the pickle may name only what nanoGPT's checkpoints name.

nanoGPT computes GPT-2 with the exact GELU (its versions before June 2023 used the tanh form, which
a checkpoint does not tell). Its linear layers and the order of queries, keys and values are ours.
"""

from __future__ import annotations

import math
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from chargpt.base.errors import UserError
from chargpt.base.seeding import own_random_state
from chargpt.base.units import human_count
from chargpt.compute.counts import parameters_of
from chargpt.config import GPT2Config
from chargpt.data.tokenizer import CharTokenizer
from chargpt.export.pickles import PickleError, read_pickle
from chargpt.model import GPT2
from chargpt.runs.imported import write_imported_run

MAX_PICKLE_BYTES = 2**20  # in ckpt.pt; a model of 12 layers takes 70 kB
MAX_TUPLES = 20_000  # five per tensor; hashing ones nested more deeply would end the process
_STORAGES = "Float Half BFloat16 Double Long Int Short Char Byte Bool".split()
_GLOBALS = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2"),
    *(f"torch {name}Storage" for name in _STORAGES),
}
_REFUSED = "INST OBJ NEWOBJ NEWOBJ_EX STACK_GLOBAL EXT1 EXT2 EXT4 PERSID".split()
_SETTINGS = {
    "block_size": "block_size",
    "vocab_size": "vocab_size",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "dropout": "dropout",
    "bias": "bias",
}
_EMBEDDING = "token_embedding.weight"
_OUTER_NAMES = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position_embedding",
    "transformer.ln_f": "final_norm",
}
_BLOCK_NAMES = {
    "ln_1": "attention.norm",
    "attn.c_attn": "attention.sublayer.qkv",
    "attn.c_proj": "attention.sublayer.projection",
    "ln_2": "feed_forward.norm",
    "mlp.c_fc": "feed_forward.sublayer.expand",
    "mlp.c_proj": "feed_forward.sublayer.projection",
}


def import_nanogpt(ckpt: Path, meta: Path, out: Path) -> str:
    """Write a run folder with nanoGPT's model, and return a line about it.

    Args:
        ckpt: the checkpoint that train.py saved.
        meta: the vocabulary that data/shakespeare_char/prepare.py saved.
        out: the run folder, new or empty.

    Raises:
        UserError: a file is missing, damaged, hostile or not of a character model; the two do not
            belong together; or `out` is taken. Nothing has been run or written.
    """
    characters = read_vocabulary(meta)
    checkpoint = read_checkpoint(ckpt)
    config = _shape(checkpoint, ckpt)
    if config.vocab_size != len(characters):
        raise UserError(
            f"the model in {ckpt} has {config.vocab_size} tokens, {meta} {len(characters)} "
            "characters: give the meta.pkl of the text it was trained on"
        )
    tensors = _tensors(checkpoint, config, ckpt)
    tokenizer = CharTokenizer(characters)
    # Our vocabulary is sorted; nanoGPT's usually is, too.
    order = [characters.index(character) for character in tokenizer.characters]
    tensors[_EMBEDDING] = tensors[_EMBEDDING][order]
    with own_random_state():
        model = GPT2(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
    step, val_loss = _progress(checkpoint)
    write_imported_run(out, model, tokenizer, origin="nanoGPT", step=step, val_loss=val_loss)
    loss = "" if val_loss is None else f", validation loss {val_loss:.4f}"
    return (
        f"{out}: {human_count(parameters_of(config))} parameters, {len(characters)} characters, "
        f"step {step:,}{loss}"
    )


# --- meta.pkl


def read_vocabulary(meta: Path) -> list[str]:
    """Return the characters of a meta.pkl in the order of their ids.

    Raises:
        UserError: it is missing, or is not a vocabulary of single characters.
    """
    remedy = "give the meta.pkl that nanoGPT's prepare.py wrote beside the text"
    try:
        found = read_pickle(meta)
        parts = [found.get(name) for name in ("vocab_size", "itos", "stoi")]
        size, itos, stoi = parts
        if type(itos) is not dict or list(itos) != list(range(len(itos))) or not itos:
            raise PickleError("itos does not map 0, 1, 2, … to characters")
        for character in itos.values():
            if type(character) is not str or len(character) != 1:
                raise PickleError(f"{character!r:.20} is not one character")
            if "\ud800" <= character <= "\udfff":
                raise PickleError(f"{character!r} is half a character")
        if stoi != {character: i for i, character in itos.items()} or len(stoi) != len(itos):
            raise PickleError("stoi is not the inverse of itos")
        if size != len(itos):
            raise PickleError(f"vocab_size is {size!r:.20}, itos has {len(itos)} entries")
    except (PickleError, AttributeError) as error:
        raise UserError(f"{meta} is not a vocabulary ({error}): {remedy}") from error
    except OSError as error:
        raise UserError(f"{meta} cannot be read ({error.strerror}): {remedy}") from error
    return list(itos.values())


# --- ckpt.pt


def read_checkpoint(ckpt: Path) -> dict[str, Any]:
    """Return what a checkpoint of nanoGPT holds; its tensors are read from the file when used.

    Raises:
        UserError: it is missing, damaged, or names anything but tensors.
    """
    if not ckpt.is_file():
        raise UserError(f"{ckpt} is not a file: give the ckpt.pt that nanoGPT's train.py wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, about TorchScript
            _check_archive(ckpt)
            checkpoint: dict[str, Any] = torch.load(
                ckpt, map_location="cpu", mmap=True, weights_only=True
            )
        for name in ("model", "model_args"):
            if type(checkpoint) is not dict or not isinstance(checkpoint.get(name), dict):
                raise ValueError(f"it has no {name}")
    except Exception as error:  # hostile files fail in many ways
        # PyTorch's own message would advise to load it without this protection.
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise UserError(
            f"{ckpt} cannot be read ({reason:.200}): give the ckpt.pt that nanoGPT's train.py wrote"
        ) from error
    return checkpoint


def _check_archive(ckpt: Path) -> None:
    """Refuse a zip file that unpacks to more than its size, or whose pickle names other things."""
    if not zipfile.is_zipfile(ckpt):
        raise ValueError("it is not a zip file, in which PyTorch saves since 2020")
    with zipfile.ZipFile(ckpt) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed, which PyTorch's are not")
        if sum(entry.file_size for entry in entries) > ckpt.stat().st_size:
            raise ValueError("its parts are larger than the file")
        # PyTorch ignores upper and lower case.
        pickles = [entry for entry in entries if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it has {len(pickles)} pickles instead of one")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise ValueError("its pickle is too large")
        _check_pickle(archive.read(pickles[0]))


def _check_pickle(data: bytes) -> None:
    n_tuples = 0
    for instruction, argument, _ in pickletools.genops(data):
        name = instruction.name
        if name == "GLOBAL" and argument not in _GLOBALS:
            raise ValueError(f"it names {argument!r}, which was not run")
        if name in _REFUSED:
            raise ValueError(f"it has the instruction {name}, which was not run")
        n_tuples += name.startswith("TUPLE")
        if n_tuples > MAX_TUPLES:
            raise ValueError(f"it has more than {MAX_TUPLES:,} tuples")


def _shape(checkpoint: Mapping[str, Any], ckpt: Path) -> GPT2Config:
    """Return the shape that ``model_args`` names, no larger than the file."""
    given = checkpoint["model_args"]
    if missing := [name for name in _SETTINGS if name not in {*given, "dropout", "bias"}]:
        raise UserError(f"{ckpt} has no {missing[0]} in its model_args: nanoGPT writes one")
    values = {ours: given[theirs] for theirs, ours in _SETTINGS.items() if theirs in given}
    for name, value in values.items():
        if type(value) not in (int, float, bool):
            raise UserError(f"the model_args of {ckpt}: {name} is neither a number nor a bool")
    try:
        config = GPT2Config(activation_function="gelu_exact", **values)
    except UserError as error:
        raise UserError(f"the model_args of {ckpt}: {error}") from error
    if 2 * parameters_of(config) > ckpt.stat().st_size:  # at least two bytes each
        raise UserError(
            f"{ckpt} is too small for the model that its model_args name: it is damaged"
        )
    return config


def _tensors(checkpoint: Mapping[str, Any], config: GPT2Config, ckpt: Path) -> dict[str, Tensor]:
    """Return the parameters under our names; all of them, each of its shape, and no others."""
    found = checkpoint["model"]
    theirs = {n.removeprefix("_orig_mod."): value for n, value in found.items() if type(n) is str}
    if config.n_layer > len(theirs):
        raise UserError(f"{ckpt} has fewer tensors than its model_args say layers: it is damaged")
    head = theirs.pop("lm_head.weight", None)
    tensors = {
        _our_name(name): value
        for name, value in theirs.items()
        if not name.endswith(".attn.bias")  # the causal mask of old versions
    }
    with torch.device("meta"):  # without memory
        expected = {name: p.shape for name, p in GPT2(config).named_parameters()}
    wrong = sorted(expected.keys() ^ tensors.keys())
    wrong += [n for n in expected if n in tensors and not _fits(tensors[n], expected[n])]
    if wrong:
        raise UserError(
            f"{ckpt}: {wrong[0]!r:.80} is missing, unknown, or has another shape than model_args "
            "say: it is not nanoGPT's, or damaged"
        )
    tied = tensors[_EMBEDDING]
    if head is not None and not (
        _fits(head, tied.shape) and torch.equal(head.float(), tied.float())
    ):
        raise UserError(
            f"the output layer in {ckpt} is not its token embedding, as in nanoGPT and here: such "
            "a model cannot be imported"
        )
    return {name: tensor.float() for name, tensor in tensors.items()}


def _our_name(name: str) -> str:
    """Return our name of a parameter of nanoGPT; others keep theirs, which is unknown here."""
    path, _, kind = name.rpartition(".")
    if path in _OUTER_NAMES:
        return f"{_OUTER_NAMES[path]}.{kind}"
    match path.split(".", 3):
        case ["transformer", "h", number, layer] if layer in _BLOCK_NAMES:
            return f"blocks.{number}.{_BLOCK_NAMES[layer]}.{kind}"
    return name


def _fits(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()


def _progress(checkpoint: Mapping[str, Any]) -> tuple[int, float | None]:
    """Return the step and the validation loss, as far as the checkpoint has them."""
    step, val_loss = checkpoint.get("iter_num"), checkpoint.get("best_val_loss")
    if isinstance(val_loss, Tensor) and val_loss.numel() == 1:
        val_loss = float(val_loss)
    known = type(val_loss) is float and math.isfinite(val_loss)
    return (step if type(step) is int and 0 <= step < 2**53 else 0), val_loss if known else None
