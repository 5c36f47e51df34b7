"""Who may train into a run folder, and whether a run is started or resumed: decided here, once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

from chargpt.base.errors import UserError, warn
from chargpt.config import CheckpointName, Tracker
from chargpt.runs.checkpoint import FormatError, has_checkpoint, recover
from chargpt.runs.folder import CONFIG, LOCK, locked, read_config

Resume = bool | Literal["auto"]
"""True: resume the run or fail; ``auto``: resume it, or start it; False: start it or fail."""


def free_folder(sources: Sequence[str]) -> Path:
    """Return a run folder named after the text that does not exist yet."""
    name = Path(sources[0]).stem if len(sources) == 1 else "texts"
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:60].strip(".-") or "text"
    candidates = (Path("runs", f"{name}-{i}" if i > 1 else name) for i in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


@contextmanager
def reserved(folder: Path, resume: Resume) -> Iterator[bool]:
    """Hold a run folder for this process; yield whether to resume from a whole ``last/``.

    The folder is made if needed. If an exception ends the block before anything was learned, the
    folder is left as it was found.

    Raises:
        UserError: the folder is taken, is not writable, or holds nothing that `resume` needs.
    """
    try:
        _check_folder(folder, resume)
        missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
        is_new = _is_free(folder)
        _refuse_links([folder / LOCK])
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder).lock
    except OSError as error:
        raise UserError(
            f"{folder} cannot be a run folder ({error.strerror}): give another --out"
        ) from error
    failed = True
    try:
        _refuse_links(_own_paths(folder))
        yield _is_resumed(folder, resume)
        failed = False
    finally:
        learned = any(has_checkpoint(folder, name) for name in get_args(CheckpointName))
        undo = failed and is_new and not learned and folder.exists()
        if undo:
            _clear(folder)
        lock.release()
        if undo:
            with suppress(OSError):  # another run may have come into a folder above
                for path in missing:
                    path.rmdir()


def _check_folder(folder: Path, resume: Resume) -> None:
    """Refuse a run folder that is taken, has no run to resume, or cannot be written."""
    has_run = (folder / CONFIG).exists()
    if resume is True and not has_run:
        raise UserError(
            f"{folder} has no run to resume: check --out, or give --resume auto to start one"
        )
    if has_run:
        origin = read_config(folder).imported_from  # others have files of this name, too
        if resume and origin:
            raise UserError(
                f"{folder} was imported from {origin}, without a text and an optimizer to resume "
                "with: train a new model with another --out"
            )
    if has_run and not resume:
        raise UserError(f"{folder} already has a run: give another --out, or --resume")
    if not has_run and not _is_free(folder):
        raise UserError(f"{folder} is in use by something else: give another --out")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is not writable: give another --out")


def _is_resumed(folder: Path, resume: Resume) -> bool:
    """Return whether there is a checkpoint to resume from; a save that was cut off is finished."""
    if (folder / CONFIG).exists() and recover(folder, "last"):
        try:
            recover(folder, "best")
        except FormatError:
            raise
        except UserError as error:  # training will find another best one
            warn(str(error))
        return True
    if has_checkpoint(folder, "best"):
        raise UserError(
            f"{folder} has a best checkpoint but no last one to resume from: take last/ from a "
            "backup, or train again with another --out"
        )
    if resume is True:
        raise UserError(
            f"{folder} has no checkpoint to resume from: give --resume auto to start from step 0"
        )
    return False


def _is_free(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a run leaves that was killed as it started."""
    if not folder.exists():
        return True
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else [""]
    return all(name == LOCK or name.startswith(f".{CONFIG}.") for name in names)


def _own_paths(folder: Path) -> Iterator[Path]:
    """Yield everything in a run folder except what trackers keep there."""
    for path in folder.iterdir():
        if path.name not in get_args(Tracker):
            yield path
            yield from path.rglob("*")


def _refuse_links(paths: Iterable[Path]) -> None:
    """Refuse links and pipes: a write would change something outside the folder."""
    for path in paths:
        if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
            raise UserError(f"{path} is a link or a pipe, which no run has: remove it")


def _clear(folder: Path) -> None:
    """Empty a folder; on Windows the lock file stays until it is released."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(PermissionError):
                path.unlink()
