"""A server with one tiny model, and OpenAI's client for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, running

from chargpt.config import GPT2Config, TrainConfig
from chargpt.train import train


@pytest.fixture(scope="session")
def serve() -> Any:
    return running


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A run with widths that the C++ decoder supports."""
    shape = GPT2Config(block_size=16, n_layer=1, n_head=2, d_model=32)
    settings = TrainConfig(steps=12, batch_size=4, eval_interval=10, sample_length=0, device="cpu")
    out = tmp_path_factory.mktemp("served") / "hearts"
    return train(str(text_file), model_config=shape, train_config=settings, out=out, quiet=True).run


@pytest.fixture(scope="session")
def server(run: Path) -> Iterator[Running]:
    with running(run, n_slots=8) as server:
        yield server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.client() as client:
        yield client
