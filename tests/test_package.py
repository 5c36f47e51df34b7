"""The wheel holds what the package needs, and nothing else is needed to run it."""

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
    assert "chargpt/data/tinyshakespeare.edits.json" in names
    assert "chargpt/py.typed" in names
    assert not [name for name in names if name.startswith("tests/")]
    run = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); import chargpt.cli.main as c; "
    command = [sys.executable, "-I", "-c", run + "c.main(['--version'])"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("chargpt ")
