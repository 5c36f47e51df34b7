"""Parameters and optimizer state as named tensors, and the safetensors files they are kept in.

A file is looked at before anything is made for it: its header must name just the tensors of the
shapes that the configuration asks for, all in float32, and be as long as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from chargpt.base.errors import UserError
from chargpt.compute.counts import parameters_of
from chargpt.compute.muon import MuonAdamW
from chargpt.config import GPT2Config
from chargpt.model import GPT2

Tensors = dict[str, Tensor]

MAX_HEADER_BYTES = 4 * 2**20  # of two thousand layers; a larger one takes memory to look at
_ADAMW, _MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
_DAMAGED = "the run is damaged"


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
        raise UserError(f"the weights do not fit config.json at {wrong[0]!r:.80}: {_DAMAGED}")
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
    _check_optimizer(optimizer, parameters, tensors)
    for full_name, value in tensors.items():
        name, _, entry = full_name.rpartition("/")
        parameter = parameters[name]
        # AdamW's step counter stays where the optimizer keeps it: on the CPU unless fused.
        scalar_on_cpu = value.dim() == 0 and not optimizer.defaults.get("fused")
        device = torch.device("cpu") if scalar_on_cpu else parameter.device
        optimizer.state[parameter][entry] = value.to(device, copy=True)  # not a view of the file


def _check_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Tensors
) -> None:
    """Refuse a state that is not the optimizer's: compiled code does not look at sizes again."""
    if not tensors:  # before the first update there is none
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    wanted: dict[str, torch.Size] = {}
    has_muon = isinstance(optimizer, MuonAdamW)
    for number, group in enumerate(optimizer.param_groups):
        entries = _MUON if has_muon and number == 0 else _ADAMW
        for parameter in group["params"]:
            for entry in entries:
                shape = torch.Size() if entry == "step" else parameter.shape
                wanted[f"{names[id(parameter)]}/{entry}"] = shape
    wrong = sorted(wanted.keys() ^ tensors.keys())
    wrong += [
        name
        for name, shape in wanted.items()
        if name in tensors
        and (tensors[name].shape != shape or tensors[name].dtype != torch.float32)
    ]
    if wrong:
        raise UserError(f"the optimizer does not fit the model at {wrong[0]!r:.80}: {_DAMAGED}")


# --- files


def to_bytes(tensors: Tensors) -> bytes:
    """Return tensors as the contents of a safetensors file."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(on_cpu, metadata={"format": "pt"})


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_DAMAGED}") from error


def check_model_file(path: Path, config: GPT2Config) -> None:
    """Refuse a file of weights that is not that of a model; nothing is made to find out.

    Args:
        path: a safetensors file.
        config: the shape, with its vocabulary size; however large, it costs nothing here.

    Raises:
        UserError: the header is damaged, or does not fit the configuration.
    """
    header = _read_header(path)
    for name, shape in {
        "token_embedding.weight": [config.vocab_size, config.d_model],
        "position_embedding.weight": [config.block_size, config.d_model],
        "final_norm.weight": [config.d_model],
    }.items():
        if name not in header or header[name]["shape"] != shape:
            raise UserError(f"the weights do not fit config.json at {name}: {_DAMAGED}")
    n_there = sum(math.prod(tensor["shape"]) for tensor in header.values())
    n_wanted = parameters_of(config)
    if n_there != n_wanted:
        raise UserError(
            f"{path} holds {n_there:,} parameters, config.json asks for others: {_DAMAGED}"
        )
    # Layers are alike, so that two models tell how many tensors any number of them has.
    one, two = (len(_shapes(config.replace(n_layer=n))) for n in (1, 2))
    if len(header) != one + (config.n_layer - 1) * (two - one):
        raise UserError(
            f"{path} holds {len(header):,} tensors, config.json asks for others: {_DAMAGED}"
        )
    shapes = _shapes(config)  # as large as the file at most: the numbers of parameters agree
    wrong = sorted(shapes.keys() ^ header.keys())
    wrong += [
        name for name, shape in shapes.items() if name in header and header[name]["shape"] != shape
    ]
    if wrong:
        raise UserError(f"the weights do not fit config.json at {wrong[0]!r:.80}: {_DAMAGED}")


def _shapes(config: GPT2Config) -> dict[str, list[int]]:
    with torch.device("meta"):
        return {name: list(p.shape) for name, p in GPT2(config).named_parameters()}


def _read_header(path: Path) -> dict[str, Any]:
    """Return shape and place of each tensor of a safetensors file, once they make sense."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise ValueError("it is no plain file")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("the header's length is impossible")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(text, str) for item in metadata.items() for text in item):
            raise ValueError("its metadata are no texts")
        end = 0
        for tensor in sorted(header.values(), key=lambda tensor: tensor["data_offsets"][0]):
            end = _check_entry(tensor, end)
        if end != size - 8 - length:
            raise ValueError("it is not as long as its tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no file of weights ({error}): {_DAMAGED}") from error
    return dict(header)


def _check_entry(tensor: Mapping[str, Any], start: int) -> int:
    """Refuse what is not a float32 tensor from `start` on; return where it ends."""
    shape, (begins, ends) = tensor["shape"], tensor["data_offsets"]
    if len(shape) > 2 or not all(
        type(number) is int and 0 <= number < 2**48 for number in (*shape, begins, ends)
    ):
        raise ValueError("a size is impossible")
    if tensor["dtype"] != "F32" or begins != start or ends - begins != 4 * math.prod(shape):
        raise ValueError("a tensor is not float32, or not where it should be")
    return int(ends)
