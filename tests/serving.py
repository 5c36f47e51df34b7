"""A server on a free port, in a thread; and clients for it."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

from chargpt.serve.app import make_app
from chargpt.serve.models import Served, load_served
from chargpt.serve.server import address, make_server
from chargpt.serve.settings import ServeSettings


class Running:
    """A server in a thread; `served` is in the same process."""

    def __init__(self, url: str, served: dict[str, Served]) -> None:
        self.url, self.served = url, served
        self.host, _, port = url.removeprefix("http://").rpartition(":")
        self.port = int(port)
        self.worker = next(iter(served.values())).worker

    def client(self, key: str = "any") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=30)

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=30, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=30)


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for another thread, with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


@contextlib.contextmanager
def running(
    *runs: Path, settings: ServeSettings | None = None, **options: Any
) -> Iterator[Running]:
    names = [run.name for run in runs]
    served = {n: load_served(run, name=n, **options) for n, run in zip(names, runs, strict=True)}
    server = make_server(make_app(served, settings or ServeSettings(log_requests=False)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Running(address(listener), served)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            assert not thread.is_alive()
