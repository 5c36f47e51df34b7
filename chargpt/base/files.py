"""Files that are whole or not there, and still there after a power cut.

The order is: write, flush the file to disk, rename, flush the folder. A name that reaches the disk
before its data would be a well-named file of zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from chargpt.base.errors import UserError

SEAL = "sha256"
"""Name of the field that holds the sum of all others in a sealed file."""
RENAME_ATTEMPTS = 20
MAX_JSON_BYTES = 2**20  # of a file of settings


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and flush it to disk; its name is the caller's to make durable.

    Raises:
        FileExistsError: something of this name is there, be it a link to nowhere.
    """
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable; Windows has no such call and needs none."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file in place of the one before, whole or not at all."""
    part = part_of(path)
    part.unlink(missing_ok=True)
    try:
        write_file(part, data)
        part.replace(path)  # atomic
    except OSError:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def part_of(path: Path) -> Path:
    """Return where a text is while it is being written."""
    return path.with_name(f".{path.name}.part")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, whole or not at all."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return a value as JSON to be read by people, too."""
    return json.dumps(value, indent=2) + "\n"


def read_text(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return a text file.

    Raises:
        UserError: it is missing, no plain file, not UTF-8, or larger than any of ours.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe would keep us waiting, a device never end
            raise UserError(f"{path} is no plain file: the run is damaged")
        if size > max_bytes:
            raise UserError(f"{path} has {size:,} bytes, more than any of ours: it is damaged")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): the run is damaged") from error


def read_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        UserError: it is missing or holds something else.
    """
    return parse_json(read_text(path, max_bytes=max_bytes), str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Return the object in a JSON text.

    Args:
        text: from a file that may be damaged, or made to do damage.
        name: of the file.

    Raises:
        UserError: it holds something else.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}): the run is damaged") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} holds no JSON object: the run is damaged")
    return value


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return an object with the SHA-256 of all its fields in a field more."""
    fields = {name: field for name, field in value.items() if name != SEAL}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return {**fields, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def check_seal(value: dict[str, Any], name: str) -> None:
    """Refuse a sealed object that has changed.

    Raises:
        UserError: the seal is missing or broken.
    """
    try:
        whole = value.get(SEAL) == seal(value)[SEAL]
    except RecursionError:
        whole = False
    if not whole:
        raise UserError(f"{name} has changed since it was written (its SHA-256 differs): {REMEDY}")


REMEDY = "take it from a backup, or train again"


def rename(source: Path, target: Path) -> None:
    """Rename a file or a folder; on Windows, try again while a virus scanner has it open."""
    for attempt in range(RENAME_ATTEMPTS if os.name == "nt" else 1):
        try:
            source.rename(target)
            return
        except PermissionError:
            if attempt + 1 == RENAME_ATTEMPTS or os.name != "nt":
                raise
            time.sleep(0.1)
