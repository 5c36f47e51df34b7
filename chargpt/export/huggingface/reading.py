"""Read a folder of transformers that may come from a stranger: JSON and safetensors, no pickle.

The sizes of all tensors are compared with config.json before any is made.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from chargpt.base.errors import UserError, is_out_of_memory
from chargpt.base.files import MAX_JSON_BYTES
from chargpt.base.seeding import own_random_state
from chargpt.compute.counts import parameters_of
from chargpt.config import GPT2Config
from chargpt.export.huggingface import mapping
from chargpt.export.huggingface import tokenizer as hf_tokenizer
from chargpt.model import GPT2
from chargpt.runs.folder import MAX_TOKENIZER_BYTES, Loaded
from chargpt.runs.weights import MAX_HEADER_BYTES, Tensors, load_model_tensors

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
_MASK = re.compile(r"h\.\d+\.attn\.(masked_)?bias")  # constants in old files
_PREFIX = "transformer."
_HEAD = "lm_head.weight"
_MOST_BRACKETS = 1000  # lists of lists take forty times their size
_TYPES = ("F32", "F16", "BF16")


def load_hf(folder: Path) -> Loaded:
    """Return the model in a folder of transformers, on the CPU, and its tokenizer.

    Raises:
        UserError: it is not a GPT2LMHeadModel in safetensors with one character per token, or it
            is damaged.
    """
    _refuse_other_folders(folder)
    values = _read_object(folder / CONFIG, MAX_JSON_BYTES)
    with _naming(folder / CONFIG):
        config = mapping.from_hf_config(values)
        recorded = mapping.recorded_config(values)
    contents = _read_object(folder / TOKENIZER, MAX_TOKENIZER_BYTES)
    with _naming(folder / TOKENIZER):
        tokenizer, order = hf_tokenizer.from_hf_tokenizer(contents, values.get("eos_token_id"))
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder}: the model has {config.vocab_size} tokens, its tokenizer "
            f"{tokenizer.vocab_size}: give a folder in which they are the same"
        )
    tensors = _read_weights(folder / WEIGHTS, config)
    has_bias = any(tensor.any() for name, tensor in tensors.items() if name.endswith(".bias"))
    if recorded is not None:
        config = recorded.replace(bias=recorded.bias or has_bias)
    parameters = mapping.from_hf_tensors(tensors, config.n_layer, bias=config.bias)
    embedding = parameters["token_embedding.weight"]
    parameters["token_embedding.weight"] = embedding[torch.tensor(order)]
    with own_random_state():
        model = GPT2(config)
    load_model_tensors(model, parameters)
    return Loaded(model.eval(), tokenizer)


def _refuse_other_folders(folder: Path) -> None:
    """Raise UserError if a file that is needed is missing, with the reason if it is known."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that transformers saved")
    if not (folder / WEIGHTS).exists():
        remedy = "save the model with transformers' save_pretrained"
        if (folder / f"{WEIGHTS}.index.json").exists():
            what, remedy = "has its weights in several files", f'{remedy}(max_shard_size="99GB")'
        elif any(folder.glob("*.bin")):
            what = f"has its weights in a pickle, which can run code, not in {WEIGHTS}"
        else:
            what = f"has no {WEIGHTS}"
        raise UserError(f"{folder} {what}: {remedy}")
    for name, what in ((CONFIG, "model"), (TOKENIZER, "tokenizer")):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} has no {name}: save the {what} with transformers' save_pretrained"
            )


def _read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Return the object in a JSON file."""
    try:
        if not path.is_file() or path.stat().st_size > max_bytes:
            raise ValueError(f"it is not a file of at most {max_bytes:,} bytes")
        text = path.read_text(encoding="utf-8")
        if text.count("[") + text.count("{") > _MOST_BRACKETS:
            raise ValueError("it has too many lists and objects")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"not enough memory to read {path}") from error
        raise UserError(
            f"{path} cannot be read ({error!s:.200}): give a folder of a character-level "
            "GPT2LMHeadModel"
        ) from error
    return value


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Begin the message of a UserError with a file's name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _read_weights(path: Path, config: GPT2Config) -> Tensors:
    """Return the tensors that `hf_shapes` names, in float32.

    Raises:
        UserError: the file is damaged, or does not hold exactly what `config` asks for.
    """
    try:
        if not path.is_file():
            raise ValueError("it is not a plain file")
        with path.open("rb") as file:
            if int.from_bytes(file.read(8), "little") > MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
        with safe_open(path, framework="pt") as weights:
            names = _full_names(weights, config)
            tensors = {name: weights.get_tensor(full).float() for name, full in names.items()}
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"{path} does not fit into memory") from error
        raise UserError(
            f"{path} does not hold the weights of a GPT2LMHeadModel ({error!s:.200}): save the "
            "folder again"
        ) from error
    head = tensors.pop(_HEAD, None)
    if head is not None and not torch.equal(head, tensors["wte.weight"]):
        raise UserError(f"{path}: the head is not tied to the embedding, which GPT-2 requires")
    return tensors


def _full_names(weights: Any, config: GPT2Config) -> dict[str, str]:
    """Return the name in the file of each tensor, after a check of all types and sizes."""
    found = {}
    for full in weights.keys():  # noqa: SIM118
        name = full.removeprefix(_PREFIX)
        if not _MASK.fullmatch(name):
            found[name] = full
    slices = {name: weights.get_slice(full) for name, full in found.items()}
    shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
    for name, piece in slices.items():
        if piece.get_dtype() not in _TYPES:
            raise ValueError(f"{name!r:.80} has type {piece.get_dtype()}")
    head = shapes.pop(_HEAD, None)
    n_parameters = sum(map(math.prod, shapes.values()))
    if n_parameters != parameters_of(config) or len(shapes) < config.n_layer:
        raise ValueError(
            f"it has {n_parameters:,} parameters in {len(shapes):,} tensors, not the "
            f"{parameters_of(config):,} of {CONFIG}"
        )
    expected = mapping.hf_shapes(config)
    wrong = [name for name in {**expected, **shapes} if expected.get(name) != shapes.get(name)]
    if head not in (None, expected["wte.weight"]):
        wrong.append(_HEAD)
    if wrong:
        raise ValueError(f"{wrong[0]!r:.80} is missing, unknown, or has another shape")
    return found
