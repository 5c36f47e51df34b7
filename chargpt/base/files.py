"""Files that are complete or absent, also after a power cut.

The order is: write, flush the file, rename it, flush the folder. A name that reached the disk
before the data could become a file of zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chargpt.base.errors import UserError, is_out_of_memory

SEAL = "sha256"  # the field with the SHA-256 of all other fields of a sealed file
REMEDY = "take it from a backup, or train again"
MAX_JSON_BYTES = 2**20  # larger than any settings file
_RENAME_WAITS_S = (0.1, 0.3, 1.0) if os.name == "nt" else ()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new, hidden path beside `path`; the file written there replaces `path` at the end.

    After any failure `path` stays as it was. Of several writers at a time, the last one wins.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        with part.open("r+b") as file:  # Windows flushes only writable files
            os.fsync(file.fileno())
        rename(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden folder beside `out`, which becomes `out` at the end, or is removed.

    Raises:
        UserError: `out` exists and is not an empty folder, or cannot be made.
    """
    try:
        if not out.name or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
            raise UserError(f"{out} exists: give the name of a new folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f".{out.name:.200}.{secrets.token_hex(4)}.part")
        part.mkdir()
        try:
            yield part
            if out.exists():
                out.rmdir()  # an empty one; Windows cannot replace it
            rename(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}): give a folder") from error
    sync_folder(out.parent)


def rename(source: Path, target: Path) -> None:
    """Move a file or a folder in one step; on Windows wait for a virus scanner that holds it."""
    for seconds in _RENAME_WAITS_S:
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(seconds)
    source.replace(target)


def write_file(path: Path, data: bytes) -> None:
    """Write a file that must not exist, and flush it to disk; the caller flushes its folder."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk. Windows has no such call and does not need it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write or replace a file, completely or not at all."""
    with replacing(path) as part:
        part.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write or replace a UTF-8 text file, completely or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write or replace a JSON file, completely or not at all."""
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=2) + "\n"


def read_text(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """Return the content of a text file; a MemoryError does not mean that it is damaged.

    Raises:
        UserError: it is missing, not a regular file, not UTF-8, or larger than `max_bytes`.
    """
    try:
        size = path.stat().st_size
        if not path.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{path} is not a regular file: the run is damaged")
        if size > max_bytes:
            raise UserError(f"{path} is too large ({size:,} bytes): the run is damaged")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        if is_out_of_memory(error):
            raise MemoryError(f"not enough memory to read {path}") from error
        raise UserError(f"{path} cannot be read ({error}): the run is damaged") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises as `read_text` and `parse_json` do."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Return the object in a JSON text, or raise a UserError that begins with the file's `name`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error}): the run is damaged") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} does not hold a JSON object: the run is damaged")
    return value


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """Return the object with one more field, the SHA-256 of all its other fields."""
    fields = {name: field for name, field in value.items() if name != SEAL}
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return {**fields, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def check_seal(value: dict[str, Any], name: str) -> None:
    """Raise a UserError that begins with the file's `name` if a sealed object has changed."""
    try:
        intact = value.get(SEAL) == seal(value)[SEAL]
    except RecursionError:
        intact = False
    if not intact:
        raise UserError(f"{name} has changed since it was written (its SHA-256 differs): {REMEDY}")
