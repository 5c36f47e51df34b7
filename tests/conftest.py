"""Shared by many tests: a small text, a small model, and a run trained on that text."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from browsers import browser as browser  # noqa: PLC0414 (a fixture; one Chromium for all tests)
from variants import kernels_of

import chargpt
from chargpt.config import GPT2Config, TrainConfig
from chargpt.train import TrainResult, train

SMALL = GPT2Config(block_size=16, n_layer=2, n_head=2, d_model=16, dropout=0.1)
QUICK = TrainConfig(
    steps=12, batch_size=4, eval_interval=5, log_interval=1, sample_length=20, device="cpu",
    precision="fp32",
)  # fmt: skip


def words(n_characters: int, seed: int = 0) -> str:
    """Return a text of random words and lines from a fixed alphabet."""
    rng = random.Random(seed)
    vocabulary = ["the", "king", "and", "queen", "of", "hearts", "said:", "no!", "O", "Romeo"]
    text = ""
    while len(text) < n_characters:
        text += rng.choice(vocabulary) + rng.choice([" ", " ", " ", "\n"])
    return text[:n_characters]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "hearts.txt"
    path.write_text(words(3000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> TrainResult:
    """A finished run. Tests must not change its folder."""
    out = tmp_path_factory.mktemp("runs") / "hearts"
    return train(str(text_file), model_config=SMALL, train_config=QUICK, out=out, quiet=True)


@pytest.fixture(scope="module", params=["on", "off"])
def kernels(request: pytest.FixtureRequest) -> Any:
    """Run each test with the C++ kernels, if they work here, and without."""
    if request.param == "on":
        kernels_of("native")
    return request.param


@pytest.fixture
def model() -> chargpt.GPT2:
    """An untrained model of 11 tokens whose predictions are far from uniform."""
    torch.manual_seed(0)
    gpt2 = chargpt.GPT2(SMALL.replace(vocab_size=11))
    with torch.no_grad():
        gpt2.token_embedding.weight.mul_(20)
    return gpt2.eval()
