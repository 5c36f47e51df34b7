"""Builds the kernels: ``python -m chargpt.compute.build``. Standard library only.

The variants differ in the instructions that they may use. `hatch_build.py` builds all of them into
a wheel, `chargpt.compute.library` builds one on its first use, the tests build some of them. No
variant depends on the processor that builds it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "cpp"
COMPILERS = ("c++", "g++", "clang++") if os.name != "nt" else ("clang++",)
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
# A product and a sum must not become one rounding in one variant and two in another, hence
# -ffp-contract=off: the sources say where they fuse.
FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-shared", "-w"),
    *(() if os.name == "nt" else ("-fPIC", "-pthread", "-fno-semantic-interposition")),
)


class Variant(NamedTuple):
    """The kernels for one kind of processor."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    """What the processor must be capable of, as /proc/cpuinfo names it, without underscores."""


_AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "abm"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_BF16 = _AVX512 | {"avx512bf16"}
_BF16_FLAGS = ("-march=x86-64-v4", "-mavx512bf16")
_AMX_FLAGS = (*_BF16_FLAGS, "-mamx-tile", "-mamx-bf16")
VARIANTS = {  # by machine; the later, the faster
    "x86_64": (
        Variant("plain", ("-march=x86-64",)),
        Variant("avx2", ("-march=x86-64-v3",), _AVX2),
        Variant("avx512", ("-march=x86-64-v4",), _AVX512),
        Variant("avx512bf16", _BF16_FLAGS, _BF16),
        Variant("amx", _AMX_FLAGS, _BF16 | {"amxtile", "amxbf16"}),
    ),
    "aarch64": (
        Variant("neon", ("-march=armv8-a",)),
        Variant("neonbf16", ("-march=armv8.2-a+bf16",), frozenset({"bf16"})),
    ),
}


def variants_of(machine: str) -> tuple[Variant, ...]:
    """Return a machine's variants, the fastest last; `platform.machine` names machines."""
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine.lower(), machine)
    return VARIANTS.get(name, (Variant("plain", ()),))


def library_name(variant: Variant) -> str:
    """Return a variant's name and 16 digits that stand for its sources and flags."""
    parts = [*FLAGS, *variant.flags]
    for file in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.h")]):
        parts += [file.name, file.read_text(encoding="utf-8")]
    return f"{variant.name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"


def is_library_name(name: str) -> bool:
    """Return whether a library with this name is a variant of these sources, for any machine."""
    return any(name == library_name(v) for variants in VARIANTS.values() for v in variants)


def find_compiler(command: str = "") -> list[str]:
    """Return `command` or ``$CXX``, which may include arguments, or else the first compiler found.

    Raises:
        FileNotFoundError: no compiler is found.
    """
    words = shlex.split(command or os.environ.get("CXX", ""), posix=os.name != "nt")
    words = words or [*filter(shutil.which, COMPILERS)][:1]
    if not words:
        raise FileNotFoundError(f"no C++ compiler found ({', '.join(COMPILERS)})")
    return words


def compile_variant(
    variant: Variant, compiler: Sequence[str], target: Path, extra: Iterable[str] = ()
) -> None:
    """Compile a variant into the file `target`; `extra` are more arguments for the compiler.

    Raises:
        OSError, subprocess.CalledProcessError: the compiler does not start, or it fails.
    """
    sources = sorted(map(str, FOLDER.glob("*.cpp")))
    run([*compiler, *FLAGS, *variant.flags, *sources, *extra, "-o", str(target)])


def run(command: Sequence[str]) -> str:
    """Run a compiler and return what it prints, in any locale; raises as `compile_variant`."""
    done = subprocess.run(
        command, check=True, capture_output=True, encoding="utf-8", errors="replace"
    )
    return done.stdout


def build(variants: Iterable[Variant], compiler: Sequence[str], folder: Path) -> list[Path]:
    """Compile variants side by side into a folder; return the libraries' paths."""

    def build_one(variant: Variant) -> Path:
        target = folder / (library_name(variant) + SUFFIX)
        compile_variant(variant, compiler, target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build_one, variants))


def main() -> None:
    """Build the variants that the command line names, or all variants of this machine."""
    parser = argparse.ArgumentParser(description="Build the C++ kernels of chargpt.")
    parser.add_argument("--machine", default=platform.machine(), help="such as aarch64")
    parser.add_argument("--variant", help="one of the machine's variants; all if left out")
    parser.add_argument("--compiler", default="", help="$CXX, or the first one found, if left out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "lib")
    chosen = parser.parse_args()
    known = {variant.name: variant for variant in variants_of(chosen.machine)}
    if chosen.variant not in (None, *known):
        parser.error(f"{chosen.variant} is not a variant of {chosen.machine}: {', '.join(known)}")
    variants = [known[chosen.variant]] if chosen.variant else known.values()
    chosen.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        for path in build(variants, find_compiler(chosen.compiler), chosen.out):
            print(f"{path}  {path.stat().st_size:,} bytes")
    except FileNotFoundError as error:
        parser.error(f"{error}: give --compiler or set CXX")
    except subprocess.CalledProcessError as error:
        parser.error(f"{error.cmd[0]} fails: {error.stderr.strip()[:500]}")
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
