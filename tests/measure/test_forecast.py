"""``chargpt plan``: the model of a step's time, budgets, and what the command prints."""

import json
from pathlib import Path
from typing import Any

import pytest

from chargpt.cli.main import run
from chargpt.compute.counts import parameters_of
from chargpt.config import GPT2Config, TrainConfig
from chargpt.data.corpus import load_corpus
from chargpt.measure import forecast as forecasting
from chargpt.measure.forecast import StepTime, fit_step, forecast
from chargpt.training.plan import Plan
from chargpt.training.size import Rates, TextSize, choose

CONFIG = GPT2Config(block_size=16, vocab_size=0, n_layer=8, n_head=2, d_model=32)
TRUE = StepTime(fixed=0.003, layer=0.002, sequence=0.001, both=0.004)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take what `TRUE` says."""

    def seconds(plan: Plan, _: float) -> float:
        trainer = plan.trainer
        return TRUE.of(trainer.model.config.n_layer, trainer.train_config.batch_size)

    monkeypatch.setattr(forecasting, "_seconds", seconds)


@pytest.mark.usefixtures("clock")
def test_four_small_models_give_the_constants() -> None:
    assert fit_step(CONFIG.replace(vocab_size=11), TrainConfig(steps=1)) == pytest.approx(TRUE)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("budget", "steps"), [({"steps": 40}, 40), ({"epochs": 2.0}, 84), ({"minutes": 1.0}, None)]
)
def test_the_time_follows_from_the_budget(
    text_file: Path, budget: dict[str, Any], steps: int | None
) -> None:
    corpus = load_corpus([str(text_file)])
    train_config = TrainConfig(batch_size=4, **budget)
    figures = forecast(corpus, CONFIG, train_config)
    step = TRUE.of(8, 4)
    assert figures.seconds_per_step == pytest.approx(step)
    assert figures.steps == (round(60 / step) if steps is None else steps)
    assert figures.seconds == pytest.approx(figures.steps * step)
    assert figures.epochs == pytest.approx(figures.steps * 64 / 2700)
    accumulated = forecast(corpus, CONFIG, train_config.replace(gradient_accumulation_steps=3))
    assert step < accumulated.seconds_per_step <= 3 * step + 1e-9


def test_a_gpu_that_is_not_at_hand_is_planned_from_its_speed(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--gpu h100 --gpu-share 0.5 --n-layer 2 --d-model 32 --block-size 16 --steps 10"
    assert run(["plan", str(text_file), *flags.split(), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    expected = figures["tokens_per_step"] * figures["operations_per_token"] / (0.5 * 989e12)
    assert figures["seconds_per_step"] == pytest.approx(expected)
    assert [row["devices"] for row in figures["devices"]] == [2**i for i in range(11)]
    flags = "--gpu t4 --preset gpt2 --batch-size 2048"
    assert run(["plan", str(text_file), *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert "T4, fp16" in printed
    assert "more than the 16 GB of this GPU: give a lower --batch-size" in printed


def test_without_a_preset_the_plan_is_for_what_train_would_choose(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--gpu a100 --gpu-share 0.1 --minutes 2"
    assert run(["plan", str(text_file), *flags.split(), "--json"]) == 0
    printed = capsys.readouterr()
    choice = choose(TextSize(2700, 22), Rates(31.2e12, 31.2e12), {"minutes": 2.0})
    assert json.loads(printed.out)["n_params"] == parameters_of(choice.model_config)
    assert [f"auto {line}" for line in choice.reasons] == printed.err.splitlines()


def test_this_machine_is_measured(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--n-layer 2 --n-head 2 --d-model 32 --block-size 16 --batch-size 4 --steps 10"
    assert run(["plan", str(text_file), *flags.split(), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    for name in ("device", "model", "memory", "operations", "speed", "budget", "time"):
        assert any(line.startswith(name) for line in printed.splitlines())
    assert "10 steps, 640 characters" in printed
    assert "1,024" in printed
