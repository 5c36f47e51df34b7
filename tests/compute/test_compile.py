"""Compiling the kernels: once per source, flags and processor, with any compiler and locale."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from variants import COMPILERS

from chargpt.compute import native
from chargpt.compute.native import KernelsError, library_path

pytestmark = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
# The least that `Kernels` needs; it compiles quickly. Like kernels.cpp, it is not ASCII.
TINY_SOURCE = """
extern "C" __attribute__((visibility("default"))) int chargpt_lanes() { return 12; }  // H × D
"""
load_uncached = native.load_kernels.__wrapped__


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a small source to compile into it."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    source = tmp_path / "kernels.cpp"
    source.write_text(TINY_SOURCE, encoding="utf-8")
    monkeypatch.setattr(native, "SOURCES", (source,))
    return tmp_path / "cache"


def test_source_flags_and_processor_determine_the_path(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [library_path()]
    assert library_path() == paths[0]
    assert paths[0].is_relative_to(cache / "chargpt" / "kernels")
    native.SOURCES[0].write_text(TINY_SOURCE + "\n// changed", encoding="utf-8")
    paths.append(library_path())
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    paths.append(library_path())
    monkeypatch.setattr(native, "cpu_name", lambda: "another")
    paths.append(library_path())
    monkeypatch.setattr(native, "cpu_info", lambda field: [f"other {field}"])
    paths.append(library_path())
    assert len(set(paths)) == 5
    assert not cache.exists()  # the path alone creates nothing


def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_uncached().lanes == 12
    monkeypatch.setattr(native, "_compile", lambda _: pytest.fail("compiled again"))
    assert load_uncached().lanes == 12


@pytest.mark.parametrize(("source", "path"), [("this is not C++", ""), (TINY_SOURCE, "/nowhere")])
def test_a_failed_compilation_is_an_error_of_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: str
) -> None:
    """The source is wrong, or there is no compiler."""
    native.SOURCES[0].write_text(source, encoding="utf-8")
    if path:
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CXX", raising=False)
    for _ in range(2):  # the first failure must not leave a file that looks like a library
        with pytest.raises(KernelsError) as caught:
            load_uncached()
        assert 0 < len(str(caught.value)) <= 200
        assert "\n" not in str(caught.value)


def test_a_cache_that_is_not_a_folder_is_a_kernels_error(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(KernelsError):
        load_uncached()


def test_a_damaged_library_is_compiled_again(cache: Path) -> None:
    library_path().parent.mkdir(parents=True)
    library_path().touch()
    assert load_uncached().lanes == 12


@pytest.mark.parametrize(
    ("version", "has_gcc_flags"), [("g++ 14", True), ("Ubuntu clang version 18", False)]
)
def test_cxx_may_have_arguments_and_clang_gets_no_gcc_flags(
    cache: Path, monkeypatch: pytest.MonkeyPatch, version: str, has_gcc_flags: bool
) -> None:
    log, script = cache.parent / "log", cache.parent / "compiler.sh"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo "{version}" && exit\n'
        f'echo "$@" > "{log}"\nexec {COMPILERS[0]} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"env LANGUAGE=en '{script}'")
    assert load_uncached().lanes == 12
    assert set(native.GCC_FLAGS).issubset(log.read_text().split()) == has_gcc_flags


CHILD = """
import sys
from pathlib import Path
import platformdirs
from chargpt.compute import native
platformdirs.user_cache_dir = lambda name: sys.argv[1]
native.SOURCES = (Path(sys.argv[2]),)
print("ready", flush=True)
sys.stdin.readline()
try:
    print(native.load_kernels().lanes)
except native.KernelsError as error:
    print("failed")
"""


def test_two_processes_may_compile_at_once(cache: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(cache), str(native.SOURCES[0])]
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


@pytest.mark.parametrize(("source", "printed"), [(TINY_SOURCE, "12"), ("× is not C++", "failed")])
def test_the_locale_does_not_matter(cache: Path, source: str, printed: str) -> None:
    """In the C locale, Python's default encoding is ASCII; sources and messages are UTF-8."""
    native.SOURCES[0].write_text(source, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(cache), str(native.SOURCES[0])],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"},
        input="start\n",
        capture_output=True,
        encoding="ascii",
        timeout=120,
        check=True,
    )
    assert done.stdout == f"ready\n{printed}\n"
