"""A wheel holds every file of the package and all kernels, and runs without the repository."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from variants import COMPILERS

from chargpt.compute import build

ROOT = Path(__file__).parent.parent
CODE = {".py", ".cpp", ".h"}
PAGE = {".html", ".css", ".js", ".wat", ".wasm"}
KINDS = CODE | PAGE | {".json", ".typed"}


def make_wheel(root: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """Build the wheel of a project; return its path and what the builder prints."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(
        command, cwd=root, check=True, env=os.environ | environment, text=True, capture_output=True
    )
    [wheel] = folder.glob("chargpt-*.whl")
    return wheel, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_runs_by_itself(tmp_path: Path) -> None:
    wheel, _ = make_wheel(ROOT, tmp_path, CHARGPT_PURE_WHEEL="1")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    site = tmp_path / "site"
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.*")}
    assert {"chargpt/py.typed", "chargpt/data/tinyshakespeare.edits.json"} <= names
    in_repository = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "chargpt").rglob("*.*")
        if path.suffix in KINDS
    }
    assert {Path(name).suffix for name in in_repository} == KINDS
    assert {name for name in names if name.startswith("chargpt/")} == in_repository
    assert all(name.startswith("chargpt") for name in names)
    run = f"import sys; sys.path.insert(0, {str(site)!r}); from chargpt.cli.main import main; "
    command = [sys.executable, "-I", "-c", run + "main(['--version'])"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("chargpt ")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What a wheel needs of this project, with a small source for the kernels."""
    root = tmp_path / "project"
    cpp = root / "chargpt" / "compute" / "cpp"
    cpp.mkdir(parents=True)
    (root / "chargpt" / "base").mkdir()
    files = ["pyproject.toml", "README.md", "LICENSE", "hatch_build.py"]
    for file in (*files, "chargpt/base/version.py", "chargpt/compute/build.py"):
        shutil.copyfile(ROOT / file, root / file)
    (cpp / "tiny.cpp").write_text("int f() { return 1; }")
    return root


def libraries_in(wheel: Path) -> list[str]:
    """Return the names of the variants in a wheel, and check its tag."""
    with zipfile.ZipFile(wheel) as archive:
        [info] = [name for name in archive.namelist() if name.endswith(".dist-info/WHEEL")]
        tag = wheel.stem.partition("-")[2].partition("-")[2]
        assert f"Tag: {tag}\n" in archive.read(info).decode()
        names = [Path(n) for n in archive.namelist() if n.startswith("chargpt/compute/lib/")]
    return sorted(name.stem.partition("-")[0] for name in names)


@pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
def test_a_wheel_holds_all_variants_of_its_platform(project: Path, tmp_path: Path) -> None:
    wheel, _ = make_wheel(project, tmp_path / "here")
    variants = build.variants_of(platform.machine())
    assert libraries_in(wheel) == sorted(variant.name for variant in variants)
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux may build for others")
def test_a_wheel_for_another_machine_has_its_variants_and_tag(
    project: Path, tmp_path: Path
) -> None:
    """The compiler is a script that writes its arguments where the library should be."""
    compiler = tmp_path / "compiler.sh"
    compiler.write_text('#!/bin/sh\nfor last; do :; done; echo "$@" > "$last"\n')
    compiler.chmod(0o755)
    target = {"_PYTHON_HOST_PLATFORM": "linux-aarch64", "CXX": str(compiler)}
    wheel, _ = make_wheel(project, tmp_path / "there", **target)
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    assert libraries_in(wheel) == ["neon", "neonbf16"]


@pytest.mark.parametrize("environment", [{"CXX": "/nowhere"}, {"CHARGPT_PURE_WHEEL": "1"}])
def test_a_wheel_without_libraries_is_for_any_platform(
    project: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    wheel, printed = make_wheel(project, tmp_path / "any", **environment)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert libraries_in(wheel) == []
    assert ("has no compiled kernels" in printed) == ("CXX" in environment)
