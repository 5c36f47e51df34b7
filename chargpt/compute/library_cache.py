"""Compiles the kernels once into the user's cache folder.

Loading a library runs its code, so folder and files must belong to the user alone, and each
library has its SHA-256 beside it. What a library was made of (sources, flags, variant, machine,
compiler) is in its name. A compilation that failed leaves a file with the reason.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import filelock
import platformdirs

from chargpt.base.files import replacing, write_text
from chargpt.compute import build
from chargpt.compute.build import Variant

RETRY_S = 86_400  # a compilation that failed is tried again after a day


def compiled(variant: Variant) -> tuple[Path, str]:
    """Return a variant's library, which can be loaded, and whether it was compiled before.

    Raises:
        OSError: there is no compiler, it failed before, or other users may write to the cache.
        subprocess.CalledProcessError: the compiler fails.
    """
    compiler = build.find_compiler()
    key = hashlib.sha256(_identity(compiler).encode()).hexdigest()[:16]
    folder = _private_folder()
    path = folder / f"{build.library_name(variant)}-{key}{build.SUFFIX}"
    with filelock.FileLock(folder / ".lock", mode=0o600):
        if _is_intact(path) and loads(path):
            return path, f"compiled before, {variant.name}"
        _raise_if_failed_before(path)
        start = time.perf_counter()
        _compile(variant, compiler, path)
        seconds = time.perf_counter() - start
    return path, f"compiled for {variant.name} in {seconds:.1f} s"


def loads(path: Path) -> bool:
    """Load a library, and return whether that worked; one for a newer C library does not."""
    with suppress(OSError):
        ctypes.CDLL(str(path))
        return True
    return False


def one_line(error: Exception) -> str:
    """Return what a compiler or the system says, in one line."""
    message = getattr(error, "stderr", None) or str(error)
    return " ".join(message.split())[:200] or type(error).__name__


def _identity(compiler: Sequence[str]) -> str:
    """Return the machine, and what changes if a compiler is repaired or exchanged."""
    version = build.run([*compiler, "--version"]).partition("\n")[0]  # the rest may be translated
    programs = [Path(found).stat() for word in compiler if (found := shutil.which(word))]
    files = [(program.st_size, program.st_mtime_ns) for program in programs]
    return f"{platform.machine()} {[*compiler]} {version} {files}"


def _private_folder() -> Path:
    folder = Path(platformdirs.user_cache_dir("chargpt"), "kernels")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise PermissionError(f"other users may write to {folder}: remove it")
    folder.chmod(0o700)
    return folder


def _compile(variant: Variant, compiler: Sequence[str], path: Path) -> None:
    try:
        with replacing(path) as part:
            build.compile_variant(variant, compiler, part)
            part.chmod(0o600)
            digest = _sha256(part)
        write_text(_digest_file(path), digest)
        ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        if getattr(error, "returncode", 1) > 0:  # else a signal ended the compiler, such as Ctrl-C
            with suppress(OSError):
                write_text(_failure_file(path), one_line(error))
        raise


def _raise_if_failed_before(path: Path) -> None:
    file = _failure_file(path)
    if file.exists() and time.time() - file.stat().st_mtime < RETRY_S:
        reason = file.read_text(encoding="utf-8", errors="replace")
        raise OSError(f"failed before: {reason} (to try again, remove {file})")


def _is_intact(path: Path) -> bool:
    """Return whether a library is ours and as it was compiled."""
    digest = _digest_file(path)
    for file in (path, digest):
        if file.is_symlink() or not file.is_file() or not _is_ours(file):
            return False
    return digest.read_text(encoding="utf-8", errors="replace") == _sha256(path)


def _is_ours(path: Path) -> bool:
    """Return whether a path belongs to this user, and no other user may write to it."""
    if os.name == "nt":  # a user's cache folder is private there
        return True
    info = path.stat()
    return info.st_uid == os.getuid() and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _failure_file(library: Path) -> Path:
    return library.with_suffix(".failed")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
