"""The kernels compiled for this processor, for older ones, and with allocations that can fail."""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from chargpt.compute import native
from chargpt.compute.device import cpu_info
from chargpt.compute.native import Kernels, load_kernels

COMPILERS = [name for name in native.COMPILERS if shutil.which(name)]
# Without -m flags, a compiler uses what its processor family always has (SSE2, NEON: 4 lanes).
# znver3 is AVX2 with GCC's tuning for AMD's Zen 3, which splits multiply-adds without GCC_FLAGS.
FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "znver3": ["-mavx2", "-mfma", "-mtune=znver3"],
    "plain": [],
    "clang": ["-march=native"],
    "failing": ["-Wl,-Bsymbolic"],
}
# Replaces operator new inside the library: allocation number n from now on fails, once.
FAILING_NEW = """
#include <atomic>
#include <cstdlib>
#include <new>
static std::atomic<long> left{-1};
extern "C" __attribute__((visibility("default"))) void fail_allocation(int n) { left = n; }
void* operator new(std::size_t size, std::align_val_t alignment) {
  const std::size_t line = (std::size_t)alignment, whole = (size + line - 1) / line * line;
  void* p = left >= 0 && left-- == 0 ? nullptr : std::aligned_alloc(line, whole);
  if (!p) throw std::bad_alloc();
  return p;
}
void* operator new(std::size_t size) { return operator new(size, std::align_val_t(64)); }
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
"""


@functools.cache
def kernels_of(variant: str) -> Kernels:
    """Return the kernels of ``native`` or a variant of `FLAGS`, compiled once per process.

    Skips the calling test if it cannot run them.
    """
    if not COMPILERS:
        pytest.skip("no C++ compiler here")
    compiler = "clang++" if variant == "clang" else COMPILERS[0]
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} here")
    if variant == "native":
        return load_kernels()
    if "-mavx2" in FLAGS[variant] and not {"avx2", "fma"} <= set(
        "".join(cpu_info("flags")).split()
    ):
        pytest.skip("no AVX2 here")
    flags = [flag for flag in native.FLAGS if not flag.startswith("-march")]
    flags += [*FLAGS[variant], *native.gcc_flags([compiler]), "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library, failing_new = Path(folder, f"{variant}.so"), Path(folder, "failing_new.cpp")
        failing_new.write_text(FAILING_NEW)
        sources = [*native.SOURCES, *([failing_new] if variant == "failing" else [])]
        command = [compiler, *flags, *map(str, sources), "-o", str(library)]
        subprocess.run(command, check=True)
        return Kernels(library)
