"""Token ids of large texts, in files that later starts map into memory.

The folder ``tokens`` in the cache holds, for texts of any number:

    KEY/                 a whole entry: tokens.bin, and entry.json with its seal
    unfinished-START/    a text that is being encoded: plan.json, journal, entry/
    START.json           the key of the sources' entry, and when they were read
    START.lock           held by the process that encodes them

KEY depends on the text's bytes and the settings, START on the files' names, sizes, times and the
settings. An entry appears by one rename when it is whole. Everything here may be deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.base.files import (
    check_seal,
    parse_json,
    read_text,
    rename,
    seal,
    sync_folder,
    write_json,
)
from chargpt.base.progress import progress
from chargpt.config import DataConfig
from chargpt.data.byte_tokenizer import tokenizer_from_json
from chargpt.data.encoding import CHANGED, Ids, Sizes
from chargpt.data.passes import EncodingPlan, TextFacts, encode_in_file, plan_encoding
from chargpt.data.texts import Source
from chargpt.data.tokenizer import CharTokenizer
from chargpt.data.workers import Workers, available_cores

FORMAT = 1
CACHE_DIR_VARIABLE = "CHARGPT_CACHE_DIR"
KEPT_S = 30 * 86_400  # how long unfinished work of other texts is kept
MOST_PROCESSES = 8  # more would wait for the SHA-256 of the text, which is one chain
_RACY_S = 2.0  # the coarsest clock of a file system: a file may change twice within it
_MAX_JSON_BYTES = 1 << 30  # more than a text of 10^8 files needs

Report = Callable[[str], None]


class Entry(NamedTuple):
    """A whole text."""

    facts: TextFacts
    tokenizer: CharTokenizer
    tokens: Ids  # a read-only map of a file, (n,)
    notes: tuple[str, ...]  # lines for the user


def cache_folder() -> Path:
    """Return the folder for files that can be made again."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    import platformdirs  # here, for a quick `import chargpt`

    return Path(platformdirs.user_cache_dir("chargpt"))


class Store:
    """The place of some sources' token ids. `characters` join the vocabulary."""

    def __init__(
        self,
        sources: Sequence[Source],
        config: DataConfig,
        characters: Iterable[str] = (),
        *,
        sizes: Sizes,
        quiet: bool,
        report: Report,
    ) -> None:
        self.sources, self.config, self.characters = sources, config, sorted({*characters})
        self.sizes, self.quiet, self.report = sizes, quiet, report
        self.folder = cache_folder() / "tokens"
        self._state = _state(sources)
        self.n_bytes = sum(size for _, size, *_ in self._state)
        fields = {k: v for k, v in asdict(config).items() if k != "validation_fraction"}
        self._settings = [FORMAT, fields, self.characters]
        self._start = _digest([self._settings, self.sizes, self._state])
        self._index = self.folder / f"{self._start}.json"
        self._work = self.folder / f"unfinished-{self._start}"

    # --- reading

    def find(self) -> Entry | None:
        """Return the entry of the sources, if they have not changed since it was made."""
        with suppress(OSError, UserError, KeyError, TypeError):
            index = parse_json(read_text(self._index), "")
            if self._is_older_than(index["read_at"]):
                with suppress(OSError):  # a cache that others fill
                    os.utime(self._index)
                return self._open(index["key"])
        return None

    def _open(self, key: str) -> Entry | None:
        """Return an entry; remove it if it is damaged."""
        path = self.folder / key
        if not path.exists():
            return None
        try:
            values = parse_json(read_text(path / "entry.json", max_bytes=_MAX_JSON_BYTES), "")
            check_seal(values, "")
            tokenizer = tokenizer_from_json(values["tokenizer"])
            tokens = np.memmap(path / "tokens.bin", tokenizer.dtype, mode="r")
            if len(tokens) == values["n_tokens"]:
                facts = from_dict(TextFacts, values["facts"])
                return Entry(facts, tokenizer, tokens, tuple(values["notes"]))
        except (OSError, KeyError, TypeError, ValueError):  # UserError is a ValueError
            pass
        self.report(f"tokens     {path} is damaged: encoding the text again")
        shutil.rmtree(path, ignore_errors=True)
        return None

    def _is_older_than(self, read_at: float) -> bool:
        """Return whether a change after `read_at` would show in the times of the files."""
        return max(time for _, _, time, _ in self._state) < (read_at - _RACY_S) * 1e9

    # --- writing

    def make(self) -> Entry:
        """Encode the sources, unless another start has done so; continue what a start left.

        Raises:
            UserError: as `plan_encoding` and `encode_in_file` do, or the cache cannot be written.
        """
        needed = self.n_bytes
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _remove_old(self.folder)
            with self._lock(), Workers(self._n_workers) as workers:
                if entry := self.find():
                    return entry
                plan, read_at = self._plan(workers)
                needed = plan.n_bytes
                key = _digest([self._settings, plan.facts.sha256, plan.layout])
                entry = self._open(key)
                if entry is None:
                    self._encode(plan, self.folder / key, workers)
                    entry = self._open(key)
                self._check_unchanged()
                write_json(self._index, {"key": key, "read_at": read_at})
                shutil.rmtree(self._work, ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"{error.filename or self.folder}: {error.strerror or error}; the text needs "
                f"{needed:,} bytes in {self.folder}: make room there, or set {CACHE_DIR_VARIABLE} "
                "to another folder"
            ) from error
        assert entry is not None
        return entry

    @contextmanager
    def _lock(self) -> Iterator[None]:
        lock = filelock.FileLock(self.folder / f"{self._start}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            self.report("tokens     another start is encoding this text: waiting for it")
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _plan(self, workers: Workers) -> tuple[EncodingPlan, float]:
        """Return the plan that an unfinished start left, or make one, and when it was made."""
        file = self._work / "plan.json"
        with suppress(OSError, KeyError, TypeError, ValueError):
            values = parse_json(read_text(file, max_bytes=_MAX_JSON_BYTES), "")
            check_seal(values, "")
            if self._is_older_than(values["read_at"]):
                self.report("tokens     continuing where an earlier start stopped")
                return EncodingPlan.from_dict(values["plan"]), values["read_at"]
        self.report(f"tokens     encoding the text into {self.folder}, which may be deleted later")
        read_at = time.time()
        shutil.rmtree(self._work, ignore_errors=True)
        with progress("reading", self.n_bytes, unit="B", quiet=self.quiet) as step:
            arguments = (self.sources, self.config, self.characters)
            plan = plan_encoding(*arguments, workers=workers, sizes=self.sizes, advance=step)
        self._check_unchanged()
        self._work.mkdir()
        write_json(file, seal({"plan": plan.to_dict(), "read_at": read_at}))
        return plan, read_at

    def _encode(self, plan: EncodingPlan, path: Path, workers: Workers) -> None:
        """Write the entry `path` from a plan and what the journal says is done."""
        units = plan.units(self.sources, self.config, self.sizes)
        part = self._work / "entry"
        part.mkdir(exist_ok=True)
        tokens, journal = part / "tokens.bin", self._work / "journal"
        done = _read_journal(journal, tokens, plan)
        self._reserve(tokens, plan.n_bytes)
        with (
            progress("encoding", self.n_bytes, unit="B", quiet=self.quiet) as advance,
            journal.open("a", encoding="ascii") as lines,
        ):
            advance(sum(units[i].n_bytes for i in done))
            for number, checksum in encode_in_file(
                tokens,
                plan,
                units,
                done=done,
                config=self.config,
                workers=workers,
                sizes=self.sizes,
            ):
                lines.write(f"{number} {checksum}\n")
                lines.flush()
                advance(units[number].n_bytes)
        self._check_unchanged()
        with tokens.open("r+b") as file:
            os.fsync(file.fileno())
        facts = asdict(plan.facts)
        values = {
            "facts": facts,
            "tokenizer": plan.tokenizer.to_json(),
            "n_tokens": plan.n_tokens,
            "notes": list(plan.notes),
        }
        write_json(part / "entry.json", seal(values))
        rename(part, path)
        sync_folder(self.folder)

    def _reserve(self, file: Path, n_bytes: int) -> None:
        """Make a file of `n_bytes`, so that a full disk shows before the work."""
        with file.open("ab") as opened:
            missing = n_bytes - opened.tell()
            if missing > shutil.disk_usage(self.folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, n_bytes)
            opened.truncate(n_bytes)

    @property
    def _n_workers(self) -> int:
        return min(available_cores(), MOST_PROCESSES, 1 + self.n_bytes // self.sizes.unit)

    def _check_unchanged(self) -> None:
        for source, was, now in zip(self.sources, self._state, _state(self.sources), strict=True):
            if was != now:
                raise UserError(CHANGED.format(source.name))


def _state(sources: Sequence[Source]) -> list[tuple[str, int, int, int]]:
    """Return each source's name, bytes, time of its last change in ns, and file number."""
    state = []
    for source in sources:
        if source.path is None:  # a data set, whose content never changes
            state.append((source.name, 0, 0, 0))
        else:
            info = source.path.stat()
            path = str(source.path.absolute())
            state.append((path, info.st_size, info.st_mtime_ns, info.st_ino))
    return state


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _read_journal(journal: Path, tokens: Path, plan: EncodingPlan) -> dict[int, int]:
    """Return the checksums of the units whose ids are in the file, by number."""
    done: dict[int, int] = {}
    with suppress(OSError, ValueError), tokens.open("rb") as file:
        for line in journal.read_text("ascii").splitlines(keepends=True):
            number, checksum = map(int, line.split())
            file.seek(plan.places[number])
            size = plan.places[number + 1] - plan.places[number]
            if line.endswith("\n") and zlib.crc32(file.read(size)) == checksum:
                done[number] = checksum
    return done


def _remove_old(folder: Path) -> None:
    """Remove what other starts left unfinished long ago, their locks, and what they looked up."""
    for path in [*folder.glob("unfinished-*"), *folder.glob("*.lock"), *folder.glob("*.json")]:
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > KEPT_S:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
