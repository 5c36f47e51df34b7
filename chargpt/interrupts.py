"""Ctrl-C and SIGTERM as wishes that a loop grants between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar, Literal, Self

Interruption = Literal["interrupted", "terminated"]


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a wish; the second one ends the program at once."""

    _REASONS: ClassVar[dict[int, Interruption]] = {
        signal.SIGINT: "interrupted",
        signal.SIGTERM: "terminated",
    }

    def __init__(self) -> None:
        self.received: Interruption | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows none
            for number in self._REASONS:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self._REASONS[number]
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
