"""Progress of long work on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from chargpt.base.units import human_count

PLAIN_INTERVAL_S = 10.0
BAR_AFTER_S = 1.0
Advance = Callable[[int], None]


@contextmanager
def progress(label: str, total: int, *, unit: str, quiet: bool = False) -> Iterator[Advance]:
    """Yield a function to call with how many more of `total` units are done."""
    if quiet or total == 0:
        yield lambda n: None
    elif sys.stderr.isatty():
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total, unit)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Advance]:
    """Yield a function that shows a bar, if the work takes more than a second."""
    from rich.console import Console  # here: help must be quick
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (TextColumn(f"{label:10}"), BarColumn(), TaskProgressColumn(show_speed=True), Left())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=total)
    start, is_shown = time.monotonic(), False

    def advance(n: int) -> None:
        nonlocal is_shown
        bar.advance(task, n)
        if not is_shown and time.monotonic() - start > BAR_AFTER_S:
            is_shown = True
            bar.start()

    try:
        yield advance
    finally:
        if is_shown:
            bar.stop()


def _lines(label: str, total: int, unit: str) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done, now = done + n, time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            rate = human_count(done / (now - start))
            with suppress(OSError):  # nobody reads it
                line = f"{label:10} {min(done / total, 1):.0%}, {rate} {unit}/s"
                print(line, file=sys.stderr, flush=True)

    return advance
