"""Ctrl-C and SIGTERM stop training after a step, or in the middle of work that changes nothing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal, Self

Interruption = Literal["interrupted", "terminated"]


_REASONS: dict[int, Interruption] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class StopRequested(Exception):  # noqa: N818 (not an error)
    """A signal has asked the program to stop, and here it is safe to do so."""

    def __init__(self, reason: Interruption) -> None:
        super().__init__(reason)
        self.reason = reason


def stop(number: int) -> None:
    """Raise `StopRequested` if `number` is a signal's; 0 means that none has come."""
    if number:
        raise StopRequested(_REASONS[number])


class StopSignals:
    """Records the first Ctrl-C or SIGTERM as a request; a second one ends the program at once."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number; 0: none yet
        self._interruptible = False
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # signal.signal's condition
            for number in _REASONS:
                self._old_handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore()

    def check(self) -> None:
        """Raise `StopRequested` if a signal has come."""
        stop(self.received)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise `StopRequested` at any point of the enclosed work, which must change no state."""
        self._interruptible = True
        try:
            self.check()
            yield
        finally:
            self._interruptible = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()
        if self._interruptible:
            self.check()

    def _restore(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}
