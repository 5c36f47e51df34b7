"""The wheel holds every file of the package, and runs without the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_runs_by_itself(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("chargpt-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    site = tmp_path / "site"
    names = {path.relative_to(site).as_posix() for path in site.rglob("*.*")}
    assert {"chargpt/py.typed", "chargpt/data/tinyshakespeare.edits.json"} <= names
    in_repository = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "chargpt").rglob("*.*")
        if path.suffix in (".py", ".cpp", ".h", ".html", ".json", ".typed")
    }
    assert {Path(name).suffix for name in in_repository} >= {".cpp", ".h", ".json", ".typed"}
    assert {name for name in names if name.startswith("chargpt/")} == in_repository
    assert all(name.startswith("chargpt") for name in names)
    run = f"import sys; sys.path.insert(0, {str(site)!r}); from chargpt.cli.main import main; "
    command = [sys.executable, "-I", "-c", run + "main(['--version'])"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("chargpt ")
