"""The kernels as a test needs them: any variant, or with allocations that can fail."""

import functools
import platform
import shutil
import tempfile
from pathlib import Path

import pytest

from chargpt.compute import build
from chargpt.compute.library import capabilities, choose_variant
from chargpt.compute.library_cache import compiled
from chargpt.compute.native import Kernels, load_kernels

COMPILERS = [name for name in build.COMPILERS if shutil.which(name)]
VARIANTS = {variant.name: variant for variant in build.variants_of(platform.machine())}
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
    """Return the kernels of a variant of `build`, ``native`` (the best), ``clang`` or ``failing``.

    Skips the calling test if this machine cannot compile or run them.
    """
    if not COMPILERS:
        pytest.skip("no C++ compiler here")
    if variant == "native":
        return load_kernels()
    if variant == "failing":
        return _failing_kernels()
    if variant == "clang":
        return _clang_kernels()
    if variant not in VARIANTS or not VARIANTS[variant].needs <= capabilities():
        pytest.skip(f"no {variant} here")
    path, _ = compiled(VARIANTS[variant])
    return Kernels(path)


def _clang_kernels() -> Kernels:
    if not shutil.which("clang++"):
        pytest.skip("no clang++ here")
    with tempfile.TemporaryDirectory() as folder:
        build.compile_variant(choose_variant(), ["clang++"], Path(folder, "clang.so"))
        return Kernels(Path(folder, "clang.so"))


def _failing_kernels() -> Kernels:
    plain = next(iter(VARIANTS.values()))
    with tempfile.TemporaryDirectory() as folder:
        library, failing_new = Path(folder, "failing.so"), Path(folder, "failing_new.cpp")
        failing_new.write_text(FAILING_NEW)
        extra = [str(failing_new), "-Wl,-Bsymbolic"]
        build.compile_variant(plain, build.find_compiler(), library, extra)
        return Kernels(library)
