"""Evaluations score a fixed part of a long validation text, a tenth of the time at most."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, SMALL

import chargpt
from chargpt.config import DataConfig, TrainConfig
from chargpt.runs.checkpoint import read_state
from chargpt.runs.report import read_metrics
from chargpt.train import train
from chargpt.training import trainer as training
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer


@pytest.fixture
def make(text_file: Path, tmp_path: Path) -> Any:
    def make(n_validation: int, step: int = 0, **changes: Any) -> Trainer:
        """Return a trainer of 64 tokens a step whose validation part has so many tokens."""
        plan = make_plan(
            [str(text_file)],
            model_config=SMALL,
            train_config=TrainConfig(**{"steps": 10, "batch_size": 4, "device": "cpu"} | changes),
            data_config=DataConfig(),
            out=tmp_path,
            resuming=False,
        )
        plan.trainer.validation = np.zeros(n_validation, dtype=np.uint8)
        plan.trainer.state.step = step
        return plan.trainer

    return make


@pytest.mark.parametrize(
    ("n_validation", "step", "asked", "expected"),
    [
        (111_540, 10, 0, 2**17),  # Tiny Shakespeare: whole
        (14_000_000, 3, 0, 2**17),  # hardly trained
        (14_000_000, 10_000, 0, 192_000),  # 0.3 times 640,000 tokens
        (14_000_000, 10**6, 0, 10**6),  # never more
        (14_000_000, 10, 5_000, 5_000),
    ],
)
def test_the_part_follows_from_what_was_trained_by_then(
    make: Any, n_validation: int, step: int, asked: int, expected: int
) -> None:
    trainer = make(n_validation, step, eval_characters=asked)
    assert trainer.choose_eval_tokens() == expected
    trainer.state.step, trainer.state.evaluated_step = 10**9, step
    assert trainer.choose_eval_tokens() == expected  # losses stay comparable


def test_a_run_that_was_begun_without_a_choice_keeps_scoring_everything(make: Any) -> None:
    trainer = make(14_000_000, 100)
    trainer.state.evaluated_step = 50
    assert trainer.choose_eval_tokens() == 14_000_000


def test_evaluation_takes_a_tenth_of_the_time_by_itself(make: Any) -> None:
    for n_validation in (10_000, 10**6, 10**9):
        trainer = make(n_validation)
        trainer.state.step = trainer.eval_interval
        scored = min(n_validation, trainer.choose_eval_tokens())
        # A forward pass takes a third of a step.
        assert scored / 3 <= 0.101 * trainer.eval_interval * trainer.tokens_per_step


def test_a_run_says_which_part_it_scored_and_keeps_it_when_resumed(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "WHOLE_PART", 100)
    out = tmp_path / "run"
    config = dataclasses.replace(QUICK, steps=5, eval_interval=0)
    options = {"model_config": SMALL, "out": out, "quiet": True}
    first = train(str(text_file), train_config=config, **options).summary
    scored = 100 // 16 * 16
    assert f"(on {scored} of 300 tokens, evenly spread)" in first.verdict
    assert first.val_tokens == scored
    longer = dataclasses.replace(config, steps=12)
    second = train(str(text_file), train_config=longer, resume=True, **options).summary
    assert read_state(out / "last")["eval_tokens"] == 100
    rows = [row for row in read_metrics(out) if row["split"] == "validation"]
    assert [row["val_tokens"] for row in rows] == [scored] * 2
    assert json.loads((out / "summary.json").read_text())["val_tokens"] == scored
    loaded = chargpt.load(out)
    tokens = chargpt.load_corpus([str(text_file)]).validation
    best = chargpt.evaluate(loaded.model, tokens, 16, most=100)
    assert second.val_loss == pytest.approx(best, rel=1e-6)
