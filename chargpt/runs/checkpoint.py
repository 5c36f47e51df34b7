"""Checkpoints: folders with a manifest. Two whole ones exist whenever a save starts.

    best/             model.safetensors of the lowest validation loss, state.json, manifest.json
    last/             the same, and optimizer.safetensors: where to resume
    best.previous/  last.previous/      the ones before them

The manifest has the size and the SHA-256 of each file. A checkpoint is written to ``.last.new/``,
flushed to disk, and then moved into place. Whenever the machine stops, at least the one before is
whole, and reading takes the newest that is.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chargpt.base.errors import UserError, warn
from chargpt.base.files import check_seal, read_json, rename, seal, sync_folder, to_json, write_file
from chargpt.config import CheckpointName
from chargpt.runs.weights import Tensors, to_bytes

FORMAT = 3
"""Version of a run folder's files. Others are refused."""
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
MANIFEST = "manifest.json"
_FILES = {MODEL, OPTIMIZER, STATE}


def save_checkpoint(
    run: Path, name: CheckpointName, parts: Mapping[str, Tensors], state: Any
) -> None:
    """Write a checkpoint of tensors by file name and a JSON state; keep the one before it.

    Raises:
        OSError: it cannot be written; the existing checkpoints are unchanged.
        MemoryError: the bytes of a file do not fit into memory; likewise.
    """
    new = _new(run, name)
    try:
        _write(new, parts, state)
    except (OSError, MemoryError):
        shutil.rmtree(new, ignore_errors=True)  # the space may be needed
        raise
    _move_into_place(run, name)


def _write(folder: Path, parts: Mapping[str, Tensors], state: Any) -> None:
    """Write a new checkpoint, the manifest last."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    manifest: dict[str, dict[str, Any]] = {}
    for name in (*parts, STATE):  # one at a time: a file's bytes are as large as its tensors
        data = to_json(state).encode() if name == STATE else to_bytes(parts[name])
        write_file(folder / name, data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    sealed = seal({"format": FORMAT, "files": manifest})
    write_file(folder / MANIFEST, to_json(sealed).encode())
    sync_folder(folder)


def _move_into_place(run: Path, name: CheckpointName) -> None:
    """Make the new checkpoint, which is whole, the current one."""
    current, previous = run / name, _previous(run, name)
    if current.exists():
        shutil.rmtree(previous, ignore_errors=True)
        rename(current, previous)
    rename(_new(run, name), current)
    sync_folder(run)


def recover(run: Path, name: CheckpointName) -> bool:
    """Return whether there is a checkpoint, which is then ``run/name`` and whole.

    Finishes a save that was cut off, or removes it. A damaged checkpoint is removed if the one
    before is whole, and named in a warning. Only for the process that holds the run folder.

    Raises:
        UserError: every checkpoint is damaged, or one has another format.
        OSError: a folder cannot be moved.
    """
    new, current = _new(run, name), run / name
    whole = find_checkpoint(run, name) if has_checkpoint(run, name) else None
    if whole == new:
        _move_into_place(run, name)
        return True
    shutil.rmtree(new, ignore_errors=True)
    if whole and whole != current:
        shutil.rmtree(current, ignore_errors=True)
        rename(whole, current)
        sync_folder(run)
    return whole is not None


def find_checkpoint(run: Path, name: CheckpointName) -> Path:
    """Return the newest whole checkpoint of this name; a warning names damaged newer ones.

    Raises:
        UserError: no checkpoint exists, all are damaged, or one has another format.
    """
    damaged: list[str] = []
    for folder in checkpoint_folders(run, name):
        problem = _problem(folder)
        if problem is None:
            if damaged:
                warn(f"{'; '.join(damaged)}: using {folder}, the one before")
            return folder
        # A checkpoint that was being written when the machine stopped is no loss.
        if folder != _new(run, name):
            damaged.append(f"{folder} is damaged ({problem})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}: train again, or take it from a backup")
    raise UserError(f"{run} has no checkpoint {name!r}: train it, or let it train longer")


def checkpoint_folders(run: Path, name: CheckpointName) -> list[Path]:
    """Return the folders that may hold a checkpoint, newest first."""
    folders = (_new(run, name), run / name, _previous(run, name))
    return [folder for folder in folders if folder.is_dir()]


def has_checkpoint(run: Path, name: CheckpointName) -> bool:
    """Return whether there is a checkpoint, damaged or not; a first one half written is not one."""
    folders = checkpoint_folders(run, name)
    return folders not in ([], [_new(run, name)]) or any(find_problem(f) is None for f in folders)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return ``state.json`` of a checkpoint; a UserError if it is not a JSON object."""
    return read_json(checkpoint / STATE)


def find_problem(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, with the file's name; None: it is whole."""
    try:
        return _problem(checkpoint)
    except FormatError as error:
        return str(error)


class FormatError(UserError):
    """A checkpoint of another format, which is not damaged."""


def _problem(checkpoint: Path) -> str | None:
    path = checkpoint / MANIFEST
    if not path.is_file():
        return f"{MANIFEST} is missing"
    try:
        manifest = read_json(path)
        check_seal(manifest, MANIFEST)  # first: a format that was changed by damage is damage
        if manifest["format"] != FORMAT:
            raise FormatError(
                f"{path} has format {manifest['format']!r:.20}, this chargpt reads {FORMAT}: "
                "use the chargpt that wrote it"
            )
        files = {name: (v["bytes"], v["sha256"]) for name, v in manifest["files"].items()}
    except FormatError:
        raise
    except (UserError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} has changed or is not a manifest"
    if not {MODEL, STATE} <= files.keys() <= _FILES:  # paths out of the folder are not among them
        return f"{MANIFEST} names other files"
    problems = ((name, _file_problem(checkpoint / name, *files[name])) for name in files)
    return next((f"{name} {problem}" for name, problem in problems if problem), None)


def _file_problem(path: Path, expected_size: Any, sha256: Any) -> str | None:
    try:
        size = path.stat().st_size
        if not path.is_file():
            return "is not a plain file"
        if size != expected_size:
            return f"has {size:,} bytes and should have {expected_size!r:.20}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot be read, {error.strerror}"
    return None if digest == sha256 else "has changed, its SHA-256 differs"


def _new(run: Path, name: CheckpointName) -> Path:
    return run / f".{name}.new"


def _previous(run: Path, name: CheckpointName) -> Path:
    return run / f"{name}.previous"
