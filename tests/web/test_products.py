"""The WebAssembly that a page multiplies with, run outside of a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chargpt

ENGINE = Path(chargpt.__file__).parent / "web" / "engine"
wasmtime: Any = pytest.importorskip("wasmtime")


def test_the_binary_is_the_assembled_source() -> None:
    source = (ENGINE / "products.wat").read_text("utf-8")
    assert (ENGINE / "products.wasm").read_bytes() == wasmtime.wat2wasm(source)


@pytest.mark.parametrize(
    ("rows", "columns", "stride"), [(4, 4, 4), (8, 4, 12), (32, 128, 128), (12, 20, 24), (0, 4, 4)]
)
def test_it_multiplies_like_numpy(rows: int, columns: int, stride: int) -> None:
    store = wasmtime.Store()
    module = wasmtime.Module.from_file(store.engine, str(ENGINE / "products.wasm"))
    memory = wasmtime.Memory(store, wasmtime.MemoryType(wasmtime.Limits(1, None)))
    multiply = wasmtime.Instance(store, module, [memory]).exports(store)["multiply"]
    rng = np.random.default_rng(rows)
    matrix = rng.standard_normal((rows, stride), dtype=np.float32)
    vector = rng.standard_normal(columns, dtype=np.float32)
    data = np.frombuffer(memory.get_buffer_ptr(store), np.float32)
    data[:] = np.nan  # what it should not read
    at_matrix, at_vector, at_result = 64, 64 + 4 * matrix.size, 64 + 4 * (matrix.size + columns)
    data[at_matrix // 4 :][: matrix.size] = matrix.ravel()
    data[at_vector // 4 :][:columns] = vector
    multiply(store, at_result, at_matrix, at_vector, rows, columns, stride)
    result = data[at_result // 4 :][: rows + 1]
    np.testing.assert_allclose(result[:rows], matrix[:, :columns] @ vector, rtol=1e-5, atol=1e-5)
    assert np.isnan(result[rows]), "it writes no more than the rows"
