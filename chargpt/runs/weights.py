"""Parameters and optimizer state as named tensors, and their safetensors files.

A model's file is checked before any tensor is made: it must hold exactly the names and shapes that
config.json asks for, all in float32.
"""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from chargpt.base.errors import UserError, is_out_of_memory
from chargpt.compute.counts import parameters_of
from chargpt.compute.muon import MuonAdamW
from chargpt.compute.sharding import gathered, is_shared, own, shared_like
from chargpt.config import GPT2Config
from chargpt.model import GPT2

Tensors = dict[str, Tensor]

MAX_HEADER_BYTES = 8 * 2**20
"""The optimizer of 1,900 layers. The library accepts 100 MB, which take 1.5 GB to parse."""
_ADAMW, _MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
_DAMAGED = "the run is damaged"


def model_tensors(model: nn.Module) -> Tensors:
    """Return the parameters of an uncompiled model by name; the tied head is left out.

    If processes share the tensors, all must call this, and rank 0 gets the values on its CPU.
    """
    return {name: gathered(parameter.detach()) for name, parameter in model.named_parameters()}


def load_model_tensors(model: nn.Module, tensors: Tensors) -> None:
    """Copy the result of `model_tensors` into a model that `check_model_file` found to fit."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = tensors[name]
            own(parameter).copy_(
                own(shared_like(value, parameter)) if is_shared(parameter) else value
            )


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Tensors:
    """Return an optimizer's state as tensors named ``parameter/entry``; see `model_tensors`."""
    return {
        f"{name}/{entry}": gathered(value)
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Tensors
) -> None:
    """Give an optimizer the result of `optimizer_tensors`; a UserError if it does not fit."""
    parameters = dict(model.named_parameters())
    if tensors:  # empty before the first update
        forms = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        expected = _optimizer_forms(optimizer, parameters)
        _refuse_difference(expected, forms, "the optimizer does not fit the model")
    for full_name, value in tensors.items():
        name, _, entry = full_name.rpartition("/")
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU, unless it is fused.
        scalar_on_cpu = value.dim() == 0 and not optimizer.defaults.get("fused")
        device = torch.device("cpu") if scalar_on_cpu else parameter.device
        state = value.to(device, copy=True)  # not a view of the file
        if is_shared(parameter) and value.shape == parameter.shape:
            state = shared_like(value, parameter).clone()
        optimizer.state[parameter][entry] = state


def _optimizer_forms(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return type and shape of each state tensor: compiled code does not check them."""
    names = {parameter: name for name, parameter in parameters.items()}
    forms = {}
    for number, group in enumerate(optimizer.param_groups):
        is_muon = isinstance(optimizer, MuonAdamW) and number == 0
        for parameter in group["params"]:
            for entry in _MUON if is_muon else _ADAMW:
                shape = torch.Size() if entry == "step" else parameter.shape
                forms[f"{names[parameter]}/{entry}"] = (torch.float32, shape)
    return forms


def _refuse_difference(expected: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Raise UserError with the first name that is missing, unknown, or has another form."""
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [name for name in expected if name in found and expected[name] != found[name]]
    if wrong:
        raise UserError(f"{what} at {wrong[0]!r:.80}: {_DAMAGED}")


def to_bytes(tensors: Tensors) -> bytes:
    """Return the contents of a safetensors file; a MemoryError if two copies do not fit."""
    try:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        # Without memory for its first copy, the library aborts the process: try both copies here.
        size = sum(tensor.nbytes for tensor in on_cpu.values()) + MAX_HEADER_BYTES
        [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        return save(on_cpu, metadata={"format": "pt"})
    except BaseException as error:
        # Without memory for its second copy, the library panics, outside of Exception.
        if type(error).__name__ == "PanicException" or is_out_of_memory(error):
            raise MemoryError("the tensors to save do not fit into memory") from error
        raise


def read_tensors(path: Path) -> Tensors:
    """Return the tensors of a safetensors file; a UserError if it is missing or damaged."""
    with _reading(path):
        return load_file(path)


def check_model_file(path: Path, config: GPT2Config) -> None:
    """Refuse a file of weights that does not fit a configuration, before any tensor is made.

    A huge configuration takes no memory here.

    Raises:
        UserError: the header is damaged, or does not fit the configuration.
        MemoryError: the file does not fit into memory.
    """
    with _reading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: list(piece.get_shape()) for name, piece in slices.items()}
        if any(piece.get_dtype() != "F32" for piece in slices.values()):
            raise ValueError("a tensor is not float32")
    n_parameters = sum(map(math.prod, shapes.values()))
    misfit = (
        f"{path} holds {len(shapes):,} tensors with {n_parameters:,} parameters, "
        f"not those of config.json: {_DAMAGED}"
    )
    # The library has checked that the tensors fill the file without overlap. If the sums agree,
    # config.json asks for no more than the file holds.
    if n_parameters != parameters_of(config):
        raise UserError(misfit)
    with torch.device("meta"):  # without memory
        model = GPT2(config.replace(n_layer=1))
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    block = [name for name in expected if name.startswith("blocks.0.")]
    if len(shapes) != len(expected) + (config.n_layer - 1) * len(block):
        raise UserError(misfit)
    for number in range(1, config.n_layer):  # all blocks are alike
        for name in block:
            expected[name.replace("0", str(number), 1)] = expected[name]
    _refuse_difference(expected, shapes, "the weights do not fit config.json")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Report a damaged file as UserError, and missing memory as MemoryError."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a plain file")
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
        yield
    except (OSError, SafetensorError, ValueError, RuntimeError, MemoryError) as error:
        no_memory = getattr(error, "errno", None) == errno.ENOMEM
        if no_memory or is_out_of_memory(error) or "annot allocate memory" in str(error):
            raise MemoryError(f"{path} does not fit into memory") from error
        raise UserError(f"{path} is not a file of weights ({error}): {_DAMAGED}") from error
