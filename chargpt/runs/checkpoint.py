"""Checkpoints: folders with a manifest, of which two whole ones stand whenever a save begins.

    best/             model.safetensors of the lowest validation loss, state.json, manifest.json
    last/             the same and optimizer.safetensors: where to go on
    best.previous/  last.previous/      the ones before them

The manifest has the SHA-256 and the size of each file. A checkpoint is written to `.last.new/`,
flushed to disk, and only then moved into place; whenever the machine stops, at least the one before
is whole, and reading finds the newest that is.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chargpt.base.errors import UserError, warn
from chargpt.base.files import check_seal, read_json, seal, sync_folder, to_json, write_file
from chargpt.config import CheckpointName
from chargpt.runs.weights import Tensors, to_bytes

FORMAT = 3
"""Version of a run folder's files. Others are refused."""
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST = "manifest.json"
_FILES = {MODEL, OPTIMIZER, STATE}


def save_checkpoint(
    run: Path, which: CheckpointName, parts: Mapping[str, Tensors], state: Any
) -> None:
    """Write a checkpoint in place of the one before, and keep that.

    Args:
        run: the run folder.
        which: the name of the checkpoint.
        parts: tensors by file name.
        state: anything JSON can hold, for ``state.json``.

    Raises:
        OSError: it cannot be written; those before it are as they were.
    """
    new = _new(run, which)
    try:
        _write(new, parts, state)
    except OSError:
        shutil.rmtree(new, ignore_errors=True)  # the space may be needed
        raise
    _move_into_place(run, which)


def _move_into_place(run: Path, which: CheckpointName) -> None:
    """Make the new checkpoint, which is whole, the current one."""
    new, current, previous = _new(run, which), run / which, _previous(run, which)
    if current.exists():
        shutil.rmtree(previous, ignore_errors=True)
        current.rename(previous)
    new.rename(current)
    sync_folder(run)


def finish_save(run: Path, which: CheckpointName) -> None:
    """Finish what a save that was cut off had begun, or take it away; only its trainer may do so.

    A damaged checkpoint goes, too, if the one before is whole: the next save would put it there.

    Raises:
        UserError: one is of a newer format.
        OSError: it cannot be moved.
    """
    new, current, previous = _new(run, which), run / which, _previous(run, which)
    if new.exists():
        if _problem(new) is None:
            _move_into_place(run, which)
        else:
            shutil.rmtree(new)
    if current.exists() and _problem(current) and previous.exists() and _problem(previous) is None:
        shutil.rmtree(current)
        previous.rename(current)
        sync_folder(run)


def _write(folder: Path, parts: Mapping[str, Tensors], state: Any) -> None:
    """Write a new checkpoint, the manifest last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    manifest: dict[str, dict[str, Any]] = {}
    for name in (*parts, STATE):  # one at a time: the bytes of a file are as large as its tensors
        data = to_json(state).encode() if name == STATE else to_bytes(parts[name])
        write_file(folder / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sealed = seal({"format": FORMAT, "files": manifest})
    write_file(folder / MANIFEST, to_json(sealed).encode())
    sync_folder(folder)


def find_checkpoint(run: Path, which: CheckpointName) -> Path:
    """Return the folder of the newest whole checkpoint of this name.

    A damaged one that is passed over is named in a warning.

    Raises:
        UserError: there is none, every one is damaged, or one is of a newer format.
    """
    damaged: list[str] = []
    for folder in checkpoint_folders(run, which):
        problem = _problem(folder)
        if problem is None:
            if damaged:
                warn(f"{'; '.join(damaged)}: using {folder}, the one before")
            return folder
        # One that was being written when the machine stopped is no loss to speak of.
        if folder != _new(run, which):
            damaged.append(f"{folder} is damaged ({problem})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: train again, or take it from a backup")
    raise UserError(f"{run} has no checkpoint {which!r}: train it, or let it train longer")


def checkpoint_folders(run: Path, which: CheckpointName) -> list[Path]:
    """Return the folders that may hold a checkpoint, newest first."""
    folders = (_new(run, which), run / which, _previous(run, which))
    return [folder for folder in folders if folder.is_dir()]


def has_checkpoint(run: Path, which: CheckpointName) -> bool:
    """Return whether there is a checkpoint of this name; one half written for the first is none."""
    new = _new(run, which)
    return any(f != new or find_problem(f) is None for f in checkpoint_folders(run, which))


def find_problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, with the file's name; None: it is whole."""
    try:
        return _problem(checkpoint)
    except _NewerError as error:
        return str(error)


def _problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint.

    Raises:
        _NewerError: it is of a newer format, which is no damage.
    """
    if not (checkpoint / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = _manifest(checkpoint)
    except _NewerError:
        raise
    except (UserError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} has changed or is none"
    if not {MODEL, STATE} <= files.keys() <= _FILES:  # a path out of the folder is none of them
        return f"{MANIFEST} names other files"
    for name, expected in files.items():
        problem = _file_problem(checkpoint / name, expected)
        if problem:
            return f"{name} {problem}"
    return None


class _NewerError(UserError):
    """A format that is not known yet."""


def _manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """Return what should be known of each file, whatever the format."""
    manifest = read_json(checkpoint / MANIFEST)
    check_seal(manifest, MANIFEST)  # first: a number that has changed is no newer format
    if manifest["format"] != FORMAT:
        raise _NewerError(
            f"{checkpoint / MANIFEST} has format {manifest['format']!r:.20}: upgrade chargpt"
        )
    return {name: {k: v[k] for k in ("bytes", "sha256")} for name, v in manifest["files"].items()}


def _file_problem(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if not path.is_file():
            return "is no plain file"
        if size != expected["bytes"]:
            return f"has {size:,} bytes and should have {expected['bytes']!r:.20}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read, {error.strerror}"
    return None if digest == expected["sha256"] else "has changed, its SHA-256 differs"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return ``state.json`` of a checkpoint.

    Raises:
        UserError: it is no JSON object.
    """
    return read_json(checkpoint / STATE)


def _new(run: Path, which: CheckpointName) -> Path:
    return run / f".{which}.new"


def _previous(run: Path, which: CheckpointName) -> Path:
    return run / f"{which}.previous"
