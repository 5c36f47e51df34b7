"""The kernels compiled for a processor with NEON, which an emulator runs."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernels.record import HERE, arrays_in, packed_call
from torch import Tensor

from chargpt.compute import build

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


class Replay:
    """The program ``replay.cpp`` for an architecture that GCC knows, such as ``armv8-a``.

    Skips the calling test if the compiler or the emulator is missing.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        missing = [program for program in (COMPILER, EMULATOR) if not shutil.which(program)]
        if missing:
            pytest.skip(f"no {' and no '.join(missing)} here")
        self.path = folder / "replay"
        flags = [flag for flag in build.FLAGS if flag != "-shared"]
        flags += [f"-march={architecture}", "-static", f"-I{build.FOLDER}"]
        sources = map(str, (HERE / "replay.cpp", *build.FOLDER.glob("*.cpp")))
        subprocess.run([COMPILER, *flags, *sources, "-o", str(self.path)], check=True)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [EMULATOR, "-cpu", "max", str(self.path), *map(str, arguments)]
        return subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)


class EmulatedKernels:
    """Calls like those of `chargpt.compute.native.Kernels`, each a run of a program.

    An array of pointers is a list of tensors here.
    """

    dtypes = frozenset({torch.float32, torch.bfloat16})

    def __init__(self, replay: Replay, folder: Path) -> None:
        self._replay, self._folder = replay, folder

    def __call__(self, name: str, dtype: torch.dtype, *arguments: Any) -> None:
        name += "_fp32" if dtype == torch.float32 else "_bf16"
        values = [_numpy(argument) for argument in arguments]
        record, results = self._folder / "record", self._folder / "results"
        record.write_bytes(packed_call(name, values, values))
        assert self._replay.run(record, 2, results).returncode == 0
        with results.open("rb") as file:
            for array in arrays_in(values):
                array[...] = np.fromfile(file, array.dtype, array.size).reshape(array.shape)


def _numpy(argument: Any) -> Any:
    """Return a tensor's memory as an array; numpy does not know bfloat16."""
    if isinstance(argument, list):
        return [_numpy(item) for item in argument]
    if not isinstance(argument, Tensor):
        return argument
    tensor = argument.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
