"""The kernels give the same bits in float on any number of threads and for any vector width."""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from kernels.emulator import Replay
from kernels.record import FUNCTIONS, Array, Caller, call_all
from variants import COMPILERS, kernels_of

from chargpt.compute.library import get_library

if not COMPILERS:
    pytest.skip("no C++ compiler here", allow_module_level=True)

Results = Sequence[tuple[str, list[Array]]]


class Reference:
    """What this processor's variant computes on three threads, and its record."""

    def __init__(self, record: Path) -> None:
        self.record = record
        with record.open("wb") as file:
            self.results = results_of("native", 3, Caller(kernels_of("native").library, file))
        arrays = (array for _, arrays in self.results for array in arrays)
        assert not any(np.isnan(array).any() for array in arrays)  # NaNs have many patterns of bits


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("kernels") / "calls")


def results_of(variant: str, threads: int, call: Caller | None = None) -> Results:
    library = kernels_of(variant).library
    call = call or Caller(library)
    library.chargpt_set_threads(threads)
    call_all(call)
    return call.results


def assert_equal(ours: Results, expected: Results) -> None:
    for (name, arrays), (other, others) in zip(ours, expected, strict=True):
        assert name == other
        for i, (array, exact) in enumerate(zip(arrays, others, strict=True)):
            differs = (array.view(np.uint32) != exact.view(np.uint32)).flatten()
            at = differs.argmax()
            values = f"{array.flat[at]!r}, expected {exact.flat[at]!r}"
            assert not differs.any(), f"{name}: array {i}, value {at}: {values}"


@pytest.mark.parametrize(
    "variant", ["plain", "avx2", "avx512", "avx512bf16", "amx", "neon", "clang"]
)
def test_threads_and_vectors(reference: Reference, variant: str) -> None:
    for threads in (1, 2, 4):
        assert_equal(results_of(variant, threads), reference.results)


def test_neon(reference: Reference, tmp_path: Path) -> None:
    replay = Replay(tmp_path, "armv8-a")
    for threads in (1, 3):
        done = replay.run(reference.record, threads)
        lines = done.stdout.splitlines()
        assert done.returncode == 0, [line for line in lines if not line.endswith("equal")]
        assert len(lines) == len(reference.results)


def test_every_function_is_called(reference: Reference) -> None:
    """A function that is exported, but not in ``functions.h`` and ``record.py``, proves nothing."""
    called = {name for name, _ in reference.results}
    assert called == {name for name in FUNCTIONS if not name.endswith("_bf16")}
    if not shutil.which("nm"):
        pytest.skip("no nm here: it lists what the library exports")
    command = ["nm", "-D", "--defined-only", str(get_library().path)]
    symbols = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    exported = {symbol for symbol in symbols if symbol.startswith("decoder_")}
    exported |= {symbol for symbol in symbols if symbol.endswith("_fp32")}
    assert exported == called
