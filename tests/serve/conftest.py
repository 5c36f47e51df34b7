"""A server with one tiny model, and OpenAI's client for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, running

from chargpt.train import TrainResult


@pytest.fixture(scope="session")
def serve() -> Any:
    return running


@pytest.fixture(scope="session")
def run(result: TrainResult) -> Path:
    return result.run


@pytest.fixture(scope="session")
def server(run: Path) -> Iterator[Running]:
    with running(run, n_slots=8) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
