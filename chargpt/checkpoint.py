"""The run folder: everything a run leaves, readable without this package, and never half-written.

    config.json       format version, model, training, data, environment
    tokenizer.json    the vocabulary
    best/             model.safetensors of the lowest validation loss, state.json, manifest.json
    last/             the same and optimizer.safetensors: where to go on
    metrics.jsonl  summary.json  samples.txt  loss.png

A checkpoint is a folder with a manifest of SHA-256 sums. It is written beside the one it replaces,
flushed to disk, and moved into place; whenever the machine stops, one of the two is whole, and
reading finds it. There is no pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from chargpt.config import GPT2Config
from chargpt.errors import UserError
from chargpt.model import GPT2
from chargpt.seeding import own_random_state
from chargpt.tokenizer import CharTokenizer
from chargpt.validation import from_dict

FORMAT = 1
CONFIG, TOKENIZER, STATE, MANIFEST = "config.json", "tokenizer.json", "state.json", "manifest.json"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"

Which = Literal["best", "last"]
Tensors = dict[str, Tensor]


class Loaded(NamedTuple):
    """A model ready to use, and the alphabet it speaks."""

    model: GPT2
    tokenizer: CharTokenizer


def load(run: str | Path, *, which: Which = "best", device: str | torch.device = "cpu") -> Loaded:
    """Read a trained model from its run folder; nothing else is needed.

    Args:
        run: the folder.
        which: the checkpoint of the lowest validation loss, or the last one. A run that was
            stopped before its first evaluation has only a last one, which then serves for both.
        device: where to put the model.

    Returns:
        The model, in evaluation mode, and its tokenizer.

    Raises:
        UserError: not a run folder, a missing or damaged checkpoint, or a newer format.
    """
    folder = Path(run)
    config = from_dict(GPT2Config, read_config(folder)["model"])
    tokenizer = CharTokenizer.from_json(_read_text(folder / TOKENIZER))
    if not has_checkpoint(folder, which):
        which = "last"
    checkpoint = find_checkpoint(folder, which)
    with own_random_state():
        model = GPT2(config).to(device)
    load_model_tensors(model, read_tensors(checkpoint / MODEL))
    return Loaded(model.eval(), tokenizer)


def read_config(run: Path) -> dict[str, Any]:
    """Return ``config.json`` of a run folder.

    Raises:
        UserError: not a run folder, or one of a newer format.
    """
    if not (run / CONFIG).is_file():
        what = "holds no config.json" if run.is_dir() else "does not exist"
        raise UserError(
            f"{run} {what}, so it is no run: give the folder that `chargpt train` named"
        )
    config = _read_json(run / CONFIG)
    if config.get("format") != FORMAT:
        raise UserError(
            f"{run} has format {config.get('format')}, this chargpt reads {FORMAT}: upgrade chargpt"
        )
    for part in ("model", "train", "data", "environment"):
        if not isinstance(config.get(part), dict):
            raise UserError(f"{run / CONFIG} has no part {part!r}: the run is damaged")
    return config


# --- tensors


def model_tensors(model: nn.Module) -> Tensors:
    """Return the parameters of an uncompiled model by name; the tied head is not written twice."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_model_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Copy what `model_tensors` returned into a model of the same shape.

    Raises:
        UserError: a parameter is missing, unknown or of another shape (named).
    """
    parameters = dict(model.named_parameters())
    wrong = sorted(parameters.keys() ^ tensors.keys())
    wrong += [n for n in parameters if n not in wrong and parameters[n].shape != tensors[n].shape]
    if wrong:
        raise UserError(f"the weights do not fit config.json at {wrong[0]}: the run is damaged")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """Return an optimizer's state as tensors named ``parameter/entry``."""
    return {
        f"{name}/{entry}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors
) -> None:
    """Give an optimizer of the same kind the state that `optimizer_tensors` returned.

    Raises:
        UserError: the state is of another model.
    """
    parameters = dict(model.named_parameters())
    for full_name, value in tensors.items():
        name, _, entry = full_name.rpartition("/")
        if name not in parameters or (value.dim() and value.shape != parameters[name].shape):
            raise UserError(f"the optimizer does not fit the model at {full_name}: train again")
        parameter = parameters[name]
        # AdamW's step counter stays where the optimizer keeps it: on the CPU unless fused.
        scalar_on_cpu = value.dim() == 0 and not optimizer.defaults.get("fused")
        device = torch.device("cpu") if scalar_on_cpu else parameter.device
        optimizer.state[parameter][entry] = value.to(device, copy=True)  # not a view of the file


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): the run is damaged") from error


# --- checkpoints


def save_checkpoint(run: Path, which: Which, parts: Mapping[str, Tensors], state: Any) -> None:
    """Write a checkpoint in place of the one before; at every moment one of them is whole.

    Args:
        run: the run folder.
        which: the name of the checkpoint.
        parts: tensors by file name.
        state: anything JSON can hold, for ``state.json``.
    """
    new = _new(run, which)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    manifest: dict[str, str] = {}
    files = {name: _to_bytes(tensors) for name, tensors in parts.items()}
    files[STATE] = _to_json(state)
    for name, data in files.items():
        _write_durably(new / name, data)
        manifest[name] = hashlib.sha256(data).hexdigest()
    _write_durably(new / MANIFEST, _to_json({"format": FORMAT, "sha256": manifest}))
    _sync_folder(new)
    old, current = _old(run, which), run / which
    shutil.rmtree(old, ignore_errors=True)
    if current.exists():
        current.rename(old)
    new.rename(current)
    _sync_folder(run)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(run: Path, which: Which) -> Path:
    """Return the folder of the newest whole checkpoint of this name.

    Raises:
        UserError: there is none, or every one is damaged.
    """
    there = _candidates(run, which)
    whole = next((folder for folder in there if _is_whole(folder)), None)
    if whole is not None:
        return whole
    if there:
        raise UserError(f"{run / which} is damaged (its SHA-256 sums differ): train again")
    raise UserError(f"{run} has no checkpoint {which!r}: train it, or let it train longer")


def _candidates(run: Path, which: Which) -> list[Path]:
    """Return the folders that may hold the checkpoint, newest first."""
    return [f for f in (_new(run, which), run / which, _old(run, which)) if f.is_dir()]


def has_checkpoint(run: Path, which: Which) -> bool:
    """Return whether there is a checkpoint of this name; one half written for the first is none."""
    new, *finished = (_new(run, which), run / which, _old(run, which))
    return any(folder.is_dir() for folder in finished) or _is_whole(new)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return ``state.json`` of a checkpoint."""
    return _read_json(checkpoint / STATE)


def _is_whole(checkpoint: Path) -> bool:
    try:
        sums: dict[str, str] = json.loads((checkpoint / MANIFEST).read_bytes())["sha256"]
        return all(
            hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == expected
            for name, expected in sums.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _new(run: Path, which: Which) -> Path:
    return run / f".{which}.new"


def _old(run: Path, which: Which) -> Path:
    return run / f".{which}.old"


# --- files


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, _to_json(value).decode())


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    _write_durably(part, text.encode())
    part.replace(path)  # atomic
    _sync_folder(path.parent)


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make names in a folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_bytes(tensors: Tensors) -> bytes:
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(on_cpu, metadata={"format": "pt"})


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the run is damaged") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): the run is damaged") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: the run is damaged")
    return value
