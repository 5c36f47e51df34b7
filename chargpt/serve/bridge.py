"""From a worker's thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

AHEAD = 2  # steps that the worker may compute before the event loop has looked at its sockets
_TURNS = 3  # of the loop, until it has acted on a connection that was closed before the first


class Bridge:
    """Hands the tokens of each step to the event loop, and lets the worker wait for the loop.

    The loop learns of closed connections between the steps. So at most `AHEAD` characters of a text
    are computed after its connection was closed.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._permits = threading.Semaphore(AHEAD)
        self._calls: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def begin(self) -> None:
        """Wait for the loop; not forever, because it may have ended."""
        self._permits.acquire(timeout=5)

    def post(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the event loop at the end of the step."""
        self._calls.append((call, arguments))

    def end(self) -> None:
        """Hand over the calls of this step."""
        calls, self._calls = self._calls, []
        try:
            self._loop.call_soon_threadsafe(self._deliver, calls)
        except RuntimeError:  # the loop is closed: nobody reads
            self._permits.release()

    def _deliver(self, calls: list[tuple[Callable[..., None], tuple[Any, ...]]]) -> None:
        for call, arguments in calls:
            call(*arguments)
        self._let_pass(_TURNS)

    def _let_pass(self, turns: int) -> None:
        if turns:
            self._loop.call_soon(self._let_pass, turns - 1)
        else:
            self._permits.release()
