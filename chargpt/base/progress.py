"""Progress of long work on stderr: a bar on a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

PLAIN_INTERVAL_S = 10.0
Advance = Callable[[int], None]


@contextmanager
def reading(label: str, n_bytes: int, *, quiet: bool = False) -> Iterator[Advance]:
    """Yield a function to call with the number of bytes that were just read, of `n_bytes`."""
    if quiet or n_bytes == 0:
        yield lambda n: None
    elif sys.stderr.isatty():
        with _bar(label, n_bytes) as advance:
            yield advance
    else:
        yield _lines(label, n_bytes)


@contextmanager
def _bar(label: str, n_bytes: int) -> Iterator[Advance]:
    from rich.console import Console  # here: help must be quick
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (TextColumn(f"{label:10}"), BarColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=n_bytes)
        yield lambda n: bar.advance(task, n)


def _lines(label: str, n_bytes: int) -> Advance:
    start = last = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done, now = done + n, time.monotonic()
        if now - last >= PLAIN_INTERVAL_S:
            last = now
            rate = done / 1e6 / (now - start)
            with suppress(OSError):  # nobody reads it
                print(
                    f"{label:10} {done / n_bytes:.0%}, {rate:.0f} MB/s", file=sys.stderr, flush=True
                )

    return advance
