"""A model's weights as bytes for a web page: integers, with one scale per row of a matrix.

With int16, a matrix takes as many bytes as with fp16 and is several times more exact: fp16 spends
five of its bits on exponents that the numbers of one row do not need.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from chargpt.base.errors import UserError
from chargpt.config import GPT2Config
from chargpt.model import GPT2

NumberType = Literal["int8", "int16", "float32"]


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor is. Before a matrix of integers come its scales, a float32 per row."""

    name: str
    shape: tuple[int, ...]
    type: NumberType
    offset: int
    """Of its first byte; a multiple of 4."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def pack(model: GPT2, number_type: Literal["int8", "int16"]) -> tuple[list[StoredTensor], bytes]:
    """Return the tensors of a model and their bytes, little-endian; vectors stay float32.

    Raises:
        UserError: a weight is NaN or infinite.
    """
    tensors: list[StoredTensor] = []
    data = bytearray()
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().cpu().numpy()
        if not np.isfinite(values).all():
            raise UserError(f"the weight {name} is NaN or infinite: train the model again")
        stored: NumberType = "float32" if values.ndim == 1 else number_type
        tensors.append(StoredTensor(name=name, shape=values.shape, type=stored, offset=len(data)))
        data += values.astype("<f4").tobytes() if values.ndim == 1 else _round(values, number_type)
        data += bytes(-len(data) % 4)
    return tensors, bytes(data)


def _round(matrix: npt.NDArray[np.float32], number_type: Literal["int8", "int16"]) -> bytes:
    """Return the scale of each row, then the integers that come nearest when multiplied by it."""
    most = np.iinfo(number_type).max
    scales = (np.abs(matrix).max(axis=1, keepdims=True) / most).astype("<f4")  # (rows, 1)
    # A row of zeros, or of numbers too small for a scale, becomes zeros.
    ratio = np.divide(matrix, scales, out=np.zeros_like(matrix), where=scales > 0)
    integers = np.rint(ratio).clip(-most, most)
    stored = integers.astype(np.dtype(number_type).newbyteorder("<"))
    return bytes(scales.tobytes() + stored.tobytes())


def unpack(config: GPT2Config, tensors: list[dict[str, Any]], data: bytes) -> GPT2:
    """Return the model that `pack` stored, with the weights that the page computes with."""
    model = GPT2(config).eval()
    stored = {tensor["name"]: tensor for tensor in tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(_read(stored[name], data)))
    return model


def _read(tensor: dict[str, Any], data: bytes) -> npt.NDArray[np.float32]:
    shape, offset = tensor["shape"], tensor["offset"]
    if tensor["type"] == "float32":
        return np.frombuffer(data, "<f4", shape[0], offset).astype(np.float32)
    rows, columns = shape
    scales = np.frombuffer(data, "<f4", rows, offset)[:, None]
    numbers = np.dtype(tensor["type"]).newbyteorder("<")
    integers = np.frombuffer(data, numbers, rows * columns, offset + 4 * rows)
    return scales.astype(np.float32) * integers.reshape(rows, columns).astype(np.float32)
