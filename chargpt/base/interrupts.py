"""Ctrl-C and SIGTERM as wishes, granted after a step or amid work that may be dropped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, ClassVar, Literal, Self

Interruption = Literal["interrupted", "terminated"]


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The wish to end is granted here."""

    def __init__(self, reason: Interruption) -> None:
        super().__init__(reason)
        self.reason = reason


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a wish; the second one ends the program at once."""

    _REASONS: ClassVar[dict[int, Interruption]] = {
        signal.SIGINT: "interrupted",
        signal.SIGTERM: "terminated",
    }

    def __init__(self) -> None:
        self._received: Interruption | None = None
        self._amid = False
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

    def grant(self) -> None:
        """End here if that was wished for.

        Raises:
            Interrupted: it was.
        """
        if self._received:
            raise Interrupted(self._received)

    @contextmanager
    def amid(self) -> Iterator[None]:
        """Grant a wish wherever it comes, in work that changes nothing and may take long.

        Raises:
            Interrupted: it came.
        """
        self._amid = True
        try:
            self.grant()
            yield
        finally:
            self._amid = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._REASONS[number]
        self._restore()
        if self._amid:
            self.grant()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
