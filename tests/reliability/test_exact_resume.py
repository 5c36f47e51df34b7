"""A run that is cut after any step and resumed is bit-equal to the run that was never cut.

For each cut the trainer gets wrong weights, moments and state, then restores the checkpoint of that
step. It must end like the uninterrupted run: every logged loss, all weights and moments, the state,
and the best checkpoint, to the bit.
"""

import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import chargpt.train as training
from chargpt.config import DataConfig, TrainConfig
from chargpt.runs.report import Reporter, read_metrics
from chargpt.runs.weights import model_tensors, optimizer_tensors
from chargpt.train import fit
from chargpt.training.plan import make_plan
from chargpt.training.saving import restore_last, save_last
from chargpt.training.trainer import Trainer, TrainState

STEPS = 50
CLOCKS = ("train_seconds", "compile_seconds", "eval_seconds")
pytestmark = pytest.mark.reliability

SETTINGS = [
    pytest.param(optimizer, precision, compiling, id=f"{optimizer}-{precision}-{name}")
    for optimizer in ("adamw", "muon")
    for precision in ("fp32", "bf16")
    for compiling, name in (("off", "eager"), ("on", "compiled"))
] + [pytest.param("adamw", "scaled", "off", id="adamw-scaled-eager")]


def train_on(trainer: Trainer) -> None:
    state = trainer.state
    known = {"resumed_step": state.step, "evaluated_step": state.evaluated_step}
    with Reporter(trainer.out, quiet=True, **known) as reporter:
        fit(trainer, reporter)


def make_trainer(text_file: Path, out: Path, optimizer: Any, precision: Any, on: Any) -> Trainer:
    out.mkdir()
    config = TrainConfig(
        steps=STEPS, batch_size=4, gradient_accumulation_steps=2, optimizer=optimizer,
        precision="fp32" if precision == "scaled" else precision, compile=on, eval_interval=7,
        log_interval=1, sample_length=0, patience=0, device="cpu",
    )  # fmt: skip
    plan = make_plan(
        [str(text_file)],
        model_config=SMALL.replace(d_model=32, dropout=0.2),  # heads of 16, which the kernels take
        train_config=config,
        data_config=DataConfig(),
        out=out,
        resuming=False,
    )
    assert plan.speed.compiled == (on == "on")
    if precision == "scaled":
        scale_and_overflow(plan.trainer)
    return plan.trainer


def scale_and_overflow(trainer: Trainer) -> None:
    """Scale gradients as fp16 does on a GPU; every ninth step overflows and is skipped."""
    trainer.scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    plain = trainer.forward

    def forward(ids: torch.Tensor) -> torch.Tensor:
        logits = plain(ids)
        return logits * torch.inf if trainer.state.step % 9 == 8 else logits

    trainer.forward = forward


def outcome(trainer: Trainer) -> dict[str, Any]:
    """Return everything that a run leaves, except times."""
    rows = [
        {k: v for k, v in row.items() if k not in ("tokens_per_second", *CLOCKS)}
        for row in read_metrics(trainer.out)
    ]
    state = {k: v for k, v in asdict(trainer.state).items() if k not in CLOCKS}
    tensors = model_tensors(trainer.model) | optimizer_tensors(trainer.optimizer, trainer.model)
    return {
        "rows": rows,
        "state": state,
        "tensors": {name: tensor.clone() for name, tensor in tensors.items()},
        "best": load_file(trainer.out / "best" / "model.safetensors"),
    }


def spoil(trainer: Trainer) -> None:
    """Change everything that a checkpoint must restore."""
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1.0)
    for tensor in optimizer_tensors(trainer.optimizer, trainer.model).values():
        tensor.add_(1.0)
    if trainer.scaler.is_enabled():
        trainer.scaler.update(3.0)
    trainer.state = TrainState(step=999, best_val_loss=0.0, evaluations_since_best=99)
    torch.manual_seed(7)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    found = [name for name in ("rows", "state") if a[name] != b[name]]
    for part in ("tensors", "best"):
        assert a[part].keys() == b[part].keys()
        found += [f"{part} {n}" for n, t in a[part].items() if not torch.equal(t, b[part][n])]
    return found


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[Path]]:
    """Keep a copy of the run folder after every step."""
    copies: list[Path] = []
    step = training._step

    def step_and_keep(trainer: Trainer, reporter: Reporter) -> None:
        step(trainer, reporter)
        save_last(trainer)
        copies.append(tmp_path / f"after-{trainer.state.step}")
        shutil.copytree(trainer.out, copies[-1])

    monkeypatch.setattr(training, "_step", step_and_keep)
    yield copies


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of PyTorch's compiler, about itself
@pytest.mark.parametrize(("optimizer", "precision", "compiling"), SETTINGS)
def test_cut_after_every_step(
    text_file: Path,
    tmp_path: Path,
    kept: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    precision: str,
    compiling: str,
) -> None:
    if compiling == "on" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here, which torch.compile needs")
    trainer = make_trainer(text_file, tmp_path / "run", optimizer, precision, compiling)
    train_on(trainer)
    expected = outcome(trainer)
    assert len(expected["rows"]) == STEPS + 8
    assert expected["state"]["best_step"] is not None
    assert expected["state"]["skipped_steps"] == (5 if precision == "scaled" else 0)
    monkeypatch.undo()
    for cut, copy in enumerate(kept, start=1):
        spoil(trainer)
        trainer.out = copy
        restore_last(trainer)
        assert trainer.state.step == cut
        train_on(trainer)
        assert differences(outcome(trainer), expected) == [], f"cut after step {cut}"
        shutil.rmtree(copy)
    assert len(kept) == STEPS
    n = len(expected["tensors"])
    print(f"{STEPS} cuts, each time {n} tensors and {STEPS + 8} lines compared: no difference")
