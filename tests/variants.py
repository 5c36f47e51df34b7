"""The kernels compiled for this processor, and as a lesser one would have them."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from chargpt.compute import native
from chargpt.compute.native import Kernels, load_kernels

COMPILERS = [name for name in native.COMPILERS if shutil.which(name)]
# What no flag names is what the processor family always has: SSE2 or NEON, vectors of four.
# znver3 is AVX2 with GCC's tuning for AMD's Zen 3, which splits multiply-adds unless told not to.
FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "znver3": ["-mavx2", "-mfma", "-mtune=znver3"],
    "plain": [],
}
LANES = {"avx2": 8, "znver3": 8, "plain": 4}


@functools.cache
def kernels_of(variant: str) -> Kernels:
    """Return the kernels of ``native``, ``avx2``, ``znver3`` or ``plain``; the latter three without OpenMP.

    They are compiled once a process. The calling test is skipped where they cannot be.
    """
    if not COMPILERS:
        pytest.skip("no C++ compiler here")
    if variant == "native":
        return load_kernels()
    if "-mavx2" in FLAGS[variant]:
        cpuinfo = Path("/proc/cpuinfo")
        if not cpuinfo.exists() or not {"avx2", "fma"} <= set(cpuinfo.read_text().split()):
            pytest.skip("no AVX2 here")
    flags = [flag for flag in native.FLAGS if not flag.startswith("-march")] + FLAGS[variant]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, f"{variant}.so")
        sources = map(str, native.SOURCES)
        flags += native.gcc_flags(COMPILERS[:1])
        command = [COMPILERS[0], *flags, "-shared", "-fPIC", *sources, "-o", str(library)]
        subprocess.run(command, check=True)
        kernels = Kernels(library)
    assert kernels.lanes == LANES[variant]
    return kernels
