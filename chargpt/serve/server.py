"""uvicorn with models that load while it already answers, and an orderly end."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from chargpt.serve.app import make_app
from chargpt.serve.models import Served, load_served
from chargpt.serve.settings import ServeSettings


def serve(
    runs: Mapping[str, Path],
    listener: socket.socket,
    settings: ServeSettings,
    options: Mapping[str, Any],
    *,
    grace: float,
    started: Callable[[str, Mapping[str, Served]], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        runs: by the name of the model.
        listener: a socket that listens already.
        settings: limits and keys.
        options: for `load_served`.
        grace: seconds for running requests after a signal.
        started: called with the address and the models when all models are loaded.

    Raises:
        UserError: a run cannot be loaded.
    """
    served: dict[str, Served] = {}
    ready = threading.Event()
    app = make_app(served, settings, ready=ready)
    server = make_server(app, grace)
    failures: list[BaseException] = []

    def load_all() -> None:
        try:
            for name, run in runs.items():
                one = load_served(run, name=name, **options)
                app.state.connect(one)
                served[name] = one
            ready.set()
            started(address(listener), served)
        except BaseException as error:  # the main thread raises it
            failures.append(error)
            server.should_exit = True

    app.state.load_all = threading.Thread(target=load_all, name="loader", daemon=True)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def address(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI, grace: float = 10.0) -> uvicorn.Server:
    """Return a uvicorn server; it closes its socket at the first signal and ends in `grace`."""
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        lifespan="on",
        timeout_graceful_shutdown=grace,  # type: ignore[arg-type]  # asyncio takes a float
        h11_max_incomplete_event_size=2**16,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Ends with exit code 0 after a signal; a second signal ends it at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and SIGINT in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        old = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
