"""A run that may still be training: its facts and its newest model, whenever its files change."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from chargpt.base.terminal import visible
from chargpt.export.facts import Facts, gather_facts
from chargpt.runs.checkpoint import MANIFEST
from chargpt.runs.report import METRICS, SAMPLES
from chargpt.serve.models import Served
from chargpt.training.summary import SUMMARY


class State(NamedTuple):
    """What the page shows at a moment."""

    tag: str
    """An ETag: another one means that something has changed."""
    facts: dict[str, Any]


class Live:
    """Reads the files of a served run again when they have changed.

    The measurements of a finished run take seconds, so a thread makes them, once.
    """

    def __init__(self, served: Served) -> None:
        self._served = served
        self._lock = asyncio.Lock()
        self._state = State("", {})
        self._measured: Facts | None = None
        self._thread: threading.Thread | None = None

    async def current(self) -> State:
        """Return the facts of the run as it is now."""
        async with self._lock:
            tag = self._tag()
            if tag != self._state.tag:
                self._state = State(tag, await asyncio.to_thread(self._read))
            return self._state

    def _tag(self) -> str:
        run, which = self._served.run, self._served.which
        names = (METRICS, SAMPLES, SUMMARY, f"{which}/{MANIFEST}", f"last/{MANIFEST}")
        what = [_stamp(run / name) for name in names], self._measured is not None
        return f'"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"'

    def _read(self) -> dict[str, Any]:
        served = self._served
        facts = self._gather(measure=False)
        if self._measured is not None:
            measured = self._measured
            facts = replace(
                facts,
                baselines=measured.baselines,
                novelty=measured.novelty,
                note=measured.note,
            )
        elif facts.summary and self._thread is None:
            self._thread = threading.Thread(target=self._measure, daemon=True)
            self._thread.start()
        return {
            "name": visible(served.name),
            "run": facts.to_json(),
            "config": asdict(served.model.config),
            "characters": list(served.tokenizer.characters),
            "end_of_text_id": served.tokenizer.end_of_text_id,
        }

    def _measure(self) -> None:
        self._measured = self._gather(measure=True)

    def _gather(self, *, measure: bool) -> Facts:
        served = self._served
        return gather_facts(
            served.run, served.model, served.tokenizer, which=served.which, measure=measure
        )


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file; None: it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
