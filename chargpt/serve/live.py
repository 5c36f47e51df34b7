"""A run that may still be training: its facts and its newest model, whenever its files change.

A new checkpoint gets a new worker. Texts that the old one writes are finished by it; a text of the
page, which is written in parts, may continue with the new model.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from chargpt.base.errors import UserError
from chargpt.export.facts import Facts, gather_facts
from chargpt.runs.checkpoint import MANIFEST
from chargpt.runs.folder import load
from chargpt.runs.report import METRICS, SAMPLES
from chargpt.serve.bridge import Bridge
from chargpt.serve.models import Served, exact_decoder
from chargpt.serve.worker import Worker
from chargpt.training.summary import SUMMARY

log = logging.getLogger("chargpt.serve")


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
        self._loaded = self._checkpoint()

    async def current(self) -> State:
        """Return the facts of the run as it is now."""
        async with self._lock:
            tag = self._tag()
            if tag != self._state.tag:
                await self._update_model()
                self._state = State(tag, await asyncio.to_thread(self._read))
            return self._state

    def _tag(self) -> str:
        files = [_stamp(self._served.run / name) for name in (METRICS, SAMPLES, SUMMARY)]
        what = files, self._checkpoint(), self._measured is not None
        return f'"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"'

    def _checkpoint(self) -> tuple[int, int] | None:
        """Return what changes with the checkpoint that is served."""
        run, which = self._served.run, self._served.which
        return _stamp(run / which / MANIFEST) or _stamp(run / "last" / MANIFEST)

    async def _update_model(self) -> None:
        checkpoint = self._checkpoint()
        if checkpoint == self._loaded:
            return
        try:
            await reload(self._served)
        except UserError as error:  # it is being replaced again: the next look will find it
            log.warning("the new checkpoint is not used: %s", error)
        else:
            self._loaded = checkpoint

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
            "name": served.name,
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


async def reload(served: Served) -> None:
    """Replace a served model by the newest checkpoint of its run.

    Raises:
        UserError: the checkpoint is missing or damaged, or the run is another one now; nothing has
            changed.
    """
    old = served.worker
    device = served.model.token_embedding.weight.device
    model, tokenizer = await asyncio.to_thread(load, served.run, which=served.which, device=device)
    if (tokenizer, model.config) != (served.tokenizer, served.model.config):
        raise UserError(f"{served.run} has another model now: start the server again")
    decoder = await asyncio.to_thread(exact_decoder, model, old.n_slots, served.kernels)
    worker = Worker(decoder, max_waiting=old.max_waiting, name=f"worker of {served.name}")
    worker.pace = Bridge(asyncio.get_running_loop())
    served.model, served.worker = model, worker
    threading.Thread(target=_retire, args=[old], daemon=True).start()


def _retire(worker: Worker) -> None:
    """Stop a worker when it has written all its texts."""
    while worker.n_running or worker.n_waiting:
        time.sleep(0.1)
    worker.stop()


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file; None: it does not exist."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
