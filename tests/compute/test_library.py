"""The library of kernels: which variant, prebuilt or compiled, and what of the cache is trusted."""

import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from variants import COMPILERS

from chargpt.compute import build, library, library_cache
from chargpt.compute.library import (
    CHOICE,
    KernelsError,
    choose_variant,
    find_library,
    get_library,
    why_not_tried,
)
from chargpt.compute.native import Kernels

needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
needs_posix = pytest.mark.skipif(os.name == "nt", reason="owners, modes and scripts are POSIX's")
# The least that `Kernels` needs; it compiles quickly. Like the real ones, it is not ASCII.
TINY_SOURCE = """
extern "C" __attribute__((visibility("default"))) int chargpt_lanes() { return 12; }  // H × D
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the cache, which does not exist yet; only a small source, nothing prebuilt."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / name))
    monkeypatch.setattr(library, "PREBUILT", tmp_path / "lib")
    monkeypatch.setattr(build, "FOLDER", tmp_path / "cpp")
    monkeypatch.delenv(CHOICE, raising=False)
    build.FOLDER.mkdir()
    (build.FOLDER / "tiny.cpp").write_text(TINY_SOURCE, encoding="utf-8")
    return tmp_path / "chargpt" / "kernels"


Compiler = Callable[[str], None]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    """Set ``$CXX`` to a shell script, which logs its arguments and then runs the given lines."""
    script = tmp_path / "compiler.sh"

    def write(lines: str) -> None:
        version = '[ "$1" = --version ] && echo "tiny 1.0" && exit'
        script.write_text(f'#!/bin/sh\n{version}\necho "$@" >> "{tmp_path}/log"\n{lines}\n')
        script.chmod(0o755)
        monkeypatch.setenv("CXX", f"env LANGUAGE=en '{script}'")

    return write


def n_compilations(cache: Path) -> int:
    log = cache.parents[1] / "log"
    return len(log.read_text().splitlines()) if log.exists() else 0


# --- which variant

FLAGS = {
    "plain": "sse sse2",
    "avx2": "avx2 fma f16c bmi1 bmi2 abm",
    "avx512": "avx512f avx512bw avx512cd avx512dq avx512vl",
    "avx512bf16": "avx512_bf16",
    "amx": "amx_tile amx_bf16",
}
PYTORCH_NAMES = {"fma": "fma3", "bmi1": "bmi", "abm": "lzcnt"}


def fake_processor(
    patch: pytest.MonkeyPatch, *cores: str, pytorch: str = "amx", machine: str = "x86_64"
) -> None:
    """Fake what Linux says of each core and what PyTorch says, each up to a variant of `FLAGS`."""

    def up_to(variant: str) -> list[str]:
        names = list(FLAGS)
        return " ".join(FLAGS[name] for name in names[: names.index(variant) + 1]).split()

    report: dict[str, Any] = {"architecture": machine, "l2_cache_size": 1, "avx10_1": False}
    for name in up_to(pytorch):
        spelled = PYTORCH_NAMES.get(name, name)
        report[spelled.replace("avx512", "avx512_").replace("__", "_")] = True
    patch.setattr(torch.cpu, "get_capabilities", lambda: report)
    patch.setattr(library, "cpu_info", lambda field: [" ".join(up_to(core)) for core in cores])
    patch.setattr(platform, "machine", lambda: machine)


@pytest.mark.parametrize("name", FLAGS)
def test_a_processor_gets_the_fastest_variant_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    fake_processor(monkeypatch, name)
    assert choose_variant().name == name
    fake_processor(monkeypatch, pytorch=name)  # not on Linux
    assert choose_variant().name == name
    fake_processor(monkeypatch, "amx", pytorch=name)
    assert choose_variant().name == name
    fake_processor(monkeypatch, "amx", name)  # cores of two kinds
    assert choose_variant().name == name


@pytest.mark.parametrize("missing", FLAGS["avx2"].split())
def test_a_single_missing_instruction_rules_a_variant_out(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    fake_processor(monkeypatch, "amx")
    flags = " ".join(FLAGS.values()).replace(missing, "")
    monkeypatch.setattr(library, "cpu_info", lambda field: [flags])
    assert choose_variant().name == "plain"


@pytest.mark.parametrize(
    ("machine", "name"),
    [("AMD64", "amx"), ("aarch64", "neon"), ("arm64", "neon"), ("riscv64", "plain")],
)
def test_each_machine_has_variants(
    monkeypatch: pytest.MonkeyPatch, machine: str, name: str
) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    fake_processor(monkeypatch, machine=machine)
    assert choose_variant().name == name


def test_the_environment_chooses_a_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processor(monkeypatch, "avx512")
    monkeypatch.setenv(CHOICE, "avx2")
    assert choose_variant().name == "avx2"
    for wanted, why in (("amx", "this processor cannot run"), ("neon", "does not exist on this")):
        monkeypatch.setenv(CHOICE, wanted)
        with pytest.raises(KernelsError, match=f"^{CHOICE} is '{wanted}', which {why}.*") as error:
            find_library()
        assert str(error.value).endswith("give plain or avx2 or avx512")


# --- the cache


@needs_compiler
def test_a_library_is_compiled_once(cache: Path) -> None:
    first, second = find_library(), find_library()
    assert first.how.startswith("compiled for ") and second.how.startswith("compiled before, ")
    assert first.path == second.path and first.path.parent == cache
    assert Kernels(first.path).library.chargpt_lanes() == 12
    assert first.name == second.name and first.name.startswith(f"{choose_variant().name}-")


@needs_compiler
@needs_posix
def test_what_a_library_is_made_of_determines_its_path(
    cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = build.Variant("plain", ())

    def path() -> Path:
        return library_cache.compiled(variant)[0]

    paths = [path()]
    assert path() == paths[0]
    (build.FOLDER / "tiny.cpp").write_text(TINY_SOURCE + "// changed", encoding="utf-8")
    paths.append(path())
    (build.FOLDER / "tiny.h").write_text("// new", encoding="utf-8")
    paths.append(path())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-O1"))
    paths.append(path())
    variant = build.Variant("plain", ("-g",))
    paths.append(path())
    variant = build.Variant("other", ("-g",))
    paths.append(path())
    monkeypatch.setattr(platform, "machine", lambda: "other")
    paths.append(path())
    compiler(f'exec {COMPILERS[0]} "$@"')
    paths.append(path())
    assert len(set(paths)) == 8
    assert n_compilations(cache) == 1


def change_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # the process may have loaded it
    path.write_bytes(data)
    path.chmod(0o600)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:5000])
    path.chmod(0o600)


def remove_the_digest(path: Path) -> None:
    path.with_suffix(".sha256").unlink()


def replace_by_a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def allow_others_to_write(path: Path) -> None:
    path.chmod(0o620)


DAMAGES = [change_a_bit, cut, remove_the_digest, replace_by_a_link, allow_others_to_write]


@needs_compiler
@needs_posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_library_that_is_not_as_it_was_compiled_is_compiled_again(
    cache: Path, damage: Callable[[Path], None]
) -> None:
    path = find_library().path
    before = path.read_bytes()
    damage(path)
    assert find_library().how.startswith("compiled for ")
    assert path.read_bytes() == before and not path.is_symlink()
    assert find_library().how.startswith("compiled before")


@needs_compiler
@needs_posix
def test_a_library_that_does_not_load_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one compiled elsewhere, for another C library."""
    name = find_library().path.name
    other = cache.with_name("other")  # a process loads a path only once
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda _: str(other))
    path = other / "kernels" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no ELF")
    path.with_suffix(".sha256").write_text(hashlib.sha256(b"no ELF").hexdigest())
    assert find_library().how.startswith("compiled for ")
    assert find_library().path == path and Kernels(path).library.chargpt_lanes() == 12


@needs_compiler
@needs_posix
def test_only_the_user_may_write_to_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o755, parents=True)  # as older versions made it
    path = find_library().path
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    for mode in (0o770, 0o702):
        cache.chmod(mode)
        with pytest.raises(KernelsError, match="other users may write to .*kernels: remove it"):
            find_library()
    cache.chmod(0o700)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    with pytest.raises(KernelsError, match="other users may write"):
        find_library()


def test_a_cache_that_is_not_a_folder_is_a_kernels_error(cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(KernelsError):
        find_library()


# --- a compilation that fails


@needs_compiler
@needs_posix
def test_a_failed_compilation_is_tried_again_a_day_later_or_with_another_compiler(
    cache: Path, compiler: Compiler
) -> None:
    compiler('echo "no space in × the sources\nand no luck" >&2; exit 1')
    reason = "no space in × the sources and no luck"
    for begin in ("", "failed before: "):
        with pytest.raises(KernelsError, match=f"^{begin}{reason}"):
            find_library()
        assert n_compilations(cache) == 1
    [marker] = cache.glob("*.failed")
    os.utime(marker, (0, 0))
    with pytest.raises(KernelsError):
        find_library()
    assert n_compilations(cache) == 2
    compiler(f'exec {COMPILERS[0]} "$@"')
    assert find_library().how.startswith("compiled for")
    assert n_compilations(cache) == 3


@needs_posix
def test_a_compiler_that_a_signal_ends_is_not_a_failure_to_remember(
    cache: Path, compiler: Compiler
) -> None:
    compiler("kill -TERM $$")
    for n in (1, 2):
        with pytest.raises(KernelsError):
            find_library()
        assert n_compilations(cache) == n


@needs_posix
def test_a_library_that_cannot_be_loaded_is_a_failed_compilation(
    cache: Path, compiler: Compiler
) -> None:
    compiler('for last; do :; done; echo "no ELF" > "$last"')
    for _ in range(2):
        with pytest.raises(KernelsError):
            find_library()
        assert n_compilations(cache) == 1


def test_without_a_compiler_the_reason_says_so(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(cache))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(KernelsError, match=r"^no C\+\+ compiler found"):
        find_library()


def test_a_process_looks_for_the_library_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise KernelsError("no luck")

    monkeypatch.setattr(library, "find_library", fail)
    library._find_once.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(KernelsError, match="^no luck$"):
                get_library()
        assert len(calls) == 1
    finally:
        library._find_once.cache_clear()


# --- prebuilt


@needs_compiler
def test_a_prebuilt_library_needs_no_compiler(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = choose_variant().name
    out = ["--variant", variant, "--out", str(library.PREBUILT)]
    monkeypatch.setattr(sys, "argv", ["build", *out])
    build.main()
    [path] = library.PREBUILT.iterdir()
    assert str(path) in capsys.readouterr().out
    monkeypatch.setenv("CXX", "/nowhere")
    found = find_library()
    assert (found.path, found.how) == (path, f"prebuilt, {variant}")
    assert path.stem == found.name
    assert not cache.exists()
    monkeypatch.delenv("CXX")
    (build.FOLDER / "tiny.cpp").write_text(TINY_SOURCE + "// changed", encoding="utf-8")
    found = find_library()
    assert found.path.parent == cache  # the other was built from other sources
    (library.PREBUILT / (found.name + build.SUFFIX)).write_bytes(b"no ELF")
    assert find_library().path == found.path


def test_without_linux_only_prebuilt_libraries_are_tried(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    assert why_not_tried() == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "prebuilt" in why_not_tried()
    library.PREBUILT.mkdir()
    (library.PREBUILT / (build.library_name(choose_variant()) + build.SUFFIX)).touch()
    assert why_not_tried() == ""


# --- several processes, any locale


CHILD = """
import sys
from pathlib import Path
import platformdirs
from chargpt.compute import build, library, native
platformdirs.user_cache_dir = lambda name: sys.argv[1]
build.FOLDER, library.PREBUILT = Path(sys.argv[2]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
try:
    print(native.load_kernels().library.chargpt_lanes())
except library.KernelsError as error:
    print("failed")
"""


@needs_compiler
def test_two_processes_may_compile_at_once(cache: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(cache), str(build.FOLDER)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    children = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    try:
        assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
        for child in children:  # both have imported the module: now they race
            child.stdin.write("start\n")
            child.stdin.flush()
        assert [child.communicate(timeout=120)[0] for child in children] == ["12\n"] * 2
    finally:
        for child in children:
            child.kill()


@needs_compiler
@pytest.mark.parametrize(("source", "printed"), [(TINY_SOURCE, "12"), ("× is not C++", "failed")])
def test_the_locale_does_not_matter(cache: Path, source: str, printed: str) -> None:
    """In the C locale, Python's default encoding is ASCII; sources and messages are UTF-8."""
    (build.FOLDER / "tiny.cpp").write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(cache), str(build.FOLDER)],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        input="start\n",
        capture_output=True,
        encoding="ascii",
        timeout=120,
        check=True,
    )
    assert done.stdout == f"ready\n{printed}\n"
