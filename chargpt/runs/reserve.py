"""Reserving a run folder: it is free, or holds the run to resume, and one process trains into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal, get_args

from chargpt.base.errors import UserError
from chargpt.config import CheckpointName, Tracker
from chargpt.runs.checkpoint import has_checkpoint
from chargpt.runs.folder import (
    CONFIG,
    LOCK,
    locked,
    read_config,
)


def free_folder(sources: Sequence[str]) -> Path:
    """Return a run folder named after the text, that does not exist yet."""
    name = Path(sources[0]).stem if len(sources) == 1 else "texts"
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)[:60].strip(".-") or "text"
    candidates = (Path("runs", f"{name}-{i}" if i > 1 else name) for i in range(1, 1_000_000))
    return next(path for path in candidates if not path.exists())


def _check_folder(folder: Path, resume: bool | Literal["auto"]) -> None:
    """Refuse a run folder that cannot be used.

    Raises:
        UserError: the folder is taken, has no run to go on with, or cannot be written.
    """
    has_run = (folder / CONFIG).exists()
    if resume is True and not has_run:
        raise UserError(
            f"{folder} holds no run to go on with: check --out, or give --resume auto to begin one"
        )
    if has_run:
        read_config(folder)  # others have files of this name, too
    if has_run and not resume:
        raise UserError(
            f"{folder} already holds a run: give another --out, or --resume to go on with it"
        )
    if not has_run and not _is_free(folder):
        raise UserError(f"{folder} is in use by something else: give another --out")
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise UserError(f"{existing} is not writable: give another --out")


def _is_free(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a run leaves that was killed as it began."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        path.name == LOCK or path.name.startswith(f".{CONFIG}.") for path in folder.iterdir()
    )


# --- the run itself


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make a run folder and be the only one to train into it; if nothing is learned, undo that.

    Raises:
        UserError: it cannot be made, or another process trains into it.
    """
    missing = [path for path in (folder, *folder.absolute().parents) if not path.exists()]
    is_ours = _is_free(folder)  # nobody's work is in it
    try:
        _refuse_links([folder / LOCK])
        folder.mkdir(parents=True, exist_ok=True)
        lock = ExitStack()
        lock.enter_context(locked(folder))
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made a run ({error.strerror}): give another --out"
        ) from error
    with lock:
        try:
            _refuse_links(_own_paths(folder))
            yield
        except BaseException:
            learned = any(has_checkpoint(folder, which) for which in get_args(CheckpointName))
            if is_ours and not learned and folder.exists():
                _clear(folder)
                with suppress(OSError):  # another run may have come into a folder above
                    for path in missing:
                        path.rmdir()
            raise


def _own_paths(folder: Path) -> Iterator[Path]:
    """Yield everything in a run folder but what trackers keep there."""
    for path in folder.iterdir():
        if path.name not in get_args(Tracker):
            yield path
            yield from path.rglob("*")


def _refuse_links(paths: Iterable[Path]) -> None:
    """Refuse files that are elsewhere: writing to them would change what is there.

    Raises:
        UserError: naming the link.
    """
    for path in paths:
        if path.is_symlink() or (path.exists() and not (path.is_file() or path.is_dir())):
            raise UserError(f"{path} is a link or a pipe, which no run has: remove it")


def _clear(folder: Path) -> None:
    """Empty a folder."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()
