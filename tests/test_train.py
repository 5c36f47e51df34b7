"""What a run leaves, and what it does when something around it fails."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL

from chargpt import train as run_module
from chargpt.base.errors import TrainingError, UserError
from chargpt.config import DataConfig
from chargpt.model import GPT2
from chargpt.runs.report import Reporter, read_metrics
from chargpt.train import TrainResult, train
from chargpt.training.summary import verdict
from chargpt.training.trainer import TrainState


def test_a_run_leaves_what_the_documents_promise(result: TrainResult) -> None:
    names = {path.name for path in result.run.iterdir()}
    assert names == {
        *("config.json", "tokenizer.json", "best", "last", "best.previous", "last.previous"),
        ".lock",
        *("metrics.jsonl", "summary.json", "samples.txt", "loss.png"),
    }
    assert json.loads((result.run / "summary.json").read_text()) == asdict(result.summary)
    config = json.loads((result.run / "config.json").read_text())
    assert config["text"]["n_characters"] == 3000
    assert len(config["text"]["sha256"]) == 64
    assert config["environment"]["torch"] == torch.__version__
    rows = read_metrics(result.run)
    train_row = next(row for row in rows if row["split"] == "train")
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens"} <= train_row.keys()
    samples = (result.run / "samples.txt").read_text()
    assert samples.count("--- step") == 3


def test_the_learned_part_is_the_first_and_the_rest_validates(text_file: Path) -> None:
    data = DataConfig(validation_fraction=0.25)
    plan = run_module.make_plan(
        [str(text_file)],
        model_config=SMALL,
        train_config=QUICK,
        data_config=data,
        out=Path("unused"),
        resuming=False,
    )
    text = text_file.read_text()
    assert plan.corpus.tokenizer.decode(plan.corpus.train) == text[:2250]
    assert plan.corpus.tokenizer.decode(plan.corpus.validation) == text[2250:]


def test_running_out_of_memory_names_the_knobs_and_leaves_nothing(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr(GPT2, "forward", forward)
    with pytest.raises(TrainingError) as caught:
        train(
            str(text_file), model_config=SMALL, train_config=QUICK, out=tmp_path / "run", quiet=True
        )
    assert str(caught.value).startswith("out of memory on cpu")
    assert (
        "--batch-size 2 --gradient-accumulation-steps 2, which learns the same, or a lower"
        in str(caught.value)
    )
    for knob in ("--block-size (16)", "--n-layer (2)", "--d-model (16)"):
        assert knob in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_compile_is_trained_without(
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def no_compiler(model: Any) -> Any:
        def forward(ids: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nlong story")

        return forward

    monkeypatch.setattr(torch, "compile", no_compiler)
    config = QUICK.replace(compile="on")
    compiled = train(str(text_file), model_config=SMALL, train_config=config, out=tmp_path / "a")
    said = capsys.readouterr().err
    assert said.count("continuing without") == 1
    assert "failed, continuing without (RuntimeError: InvalidCxxCompiler: No working C++" in said
    assert "long story" not in said
    assert compiled.summary.compile_seconds > 0
    eager = train(
        str(text_file), model_config=SMALL, train_config=QUICK, out=tmp_path / "b", quiet=True
    )
    assert compiled.summary.val_loss == eager.summary.val_loss


def train_with(text_file: Path, out: Path, dropout: float = 0.1, **setting: Any) -> TrainResult:
    model, training = SMALL.replace(dropout=dropout), QUICK.replace(**setting)
    return train(str(text_file), model_config=model, train_config=training, out=out, quiet=True)


@pytest.mark.slow
def test_a_compiled_run_learns_what_an_eager_run_learns(text_file: Path, tmp_path: Path) -> None:
    on = train_with(text_file, tmp_path / "on", dropout=0.0, compile="on").summary
    off = train_with(text_file, tmp_path / "off", dropout=0.0, compile="off").summary
    assert on.val_loss == pytest.approx(off.val_loss, abs=1e-4)
    assert on.compile_seconds > 0
    assert off.compile_seconds < on.compile_seconds


def test_bf16_learns_about_what_fp32_learns(text_file: Path, tmp_path: Path) -> None:
    bf16 = train_with(text_file, tmp_path / "bf16", precision="bf16")
    fp32 = train_with(text_file, tmp_path / "fp32", precision="fp32")
    assert (bf16.summary.precision, fp32.summary.precision) == ("bf16", "fp32")
    assert bf16.summary.val_loss == pytest.approx(fp32.summary.val_loss, abs=0.02)
    assert bf16.summary.val_loss != fp32.summary.val_loss
    assert bf16.model.final_norm.weight.dtype == torch.float32


def test_training_several_files_makes_documents(tmp_path: Path, text_file: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a king\n" * 400)
    out = tmp_path / "run"
    result = train(
        [str(text_file), str(other)], model_config=SMALL, train_config=QUICK, out=out, quiet=True
    )
    assert result.tokenizer.end_of_text_id == len(result.tokenizer.characters)
    assert result.model.config.vocab_size == result.tokenizer.vocab_size


# --- the verdict


def state(best: float, last: float, step: int = 100, best_step: int = 100) -> TrainState:
    return TrainState(
        step=step, evaluated_step=step, best_step=best_step, best_val_loss=best, val_loss=last
    )


@pytest.mark.parametrize(
    ("run_state", "reason", "expected"),
    [
        (state(1.467, 1.467), "budget", "still improving when the budget ended: a longer one"),
        (state(1.467, 1.7, 300, 175), "budget", "overfitting since step 175: best kept; more text"),
        (state(1.467, 1.47, 300, 175), "patience", "no longer improving"),
        (state(1.467, 1.47, 300, 275), "budget", "no longer improving"),
        (state(1.467, 1.467), "interrupted", "interrupted at step 100: best and last are kept"),
        (state(3.3, 3.3), "budget", "no better than guessing by letter frequency: train longer"),
    ],
)
def test_the_verdict_says_how_good_and_what_next(
    run_state: TrainState, reason: Any, expected: str
) -> None:
    said = verdict(run_state, 3.3473, reason)
    assert expected in said
    assert "\n" not in said
    if run_state.best_val_loss == 1.467:
        assert said.startswith("val 1.467 nats/char = 2.12 bits/char; like choosing among 4.3 ")


# --- trackers


def test_tensorboard_gets_every_metric(text_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = QUICK.replace(track="tensorboard")
    result = train(
        str(text_file), model_config=SMALL, train_config=config, out=tmp_path / "r", quiet=True
    )
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("validation/val_loss")] == [5, 10, 12]
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))


def test_wandb_gets_every_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    finished: list[bool] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((values, step))

        def finish(self) -> None:
            finished.append(True)

    wandb = ModuleType("wandb")
    wandb.init = lambda **_: Run()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = QUICK.replace(track="wandb")
    train(str(text_file), model_config=SMALL, train_config=config, out=tmp_path / "r", quiet=True)
    assert [s for v, s in logged if "validation/val_loss" in v] == [5, 10, 12]
    assert finished == [True]


def test_a_tracker_that_is_not_installed_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"track is 'wandb', which is not installed: pip install"):
        train(
            str(text_file),
            model_config=SMALL,
            train_config=QUICK.replace(track="wandb"),
            out=tmp_path / "run",
            quiet=True,
        )
    assert not (tmp_path / "run").exists()


# --- metrics.jsonl


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    row = {"split": "train", "step": 1, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"split": "tr')
    assert read_metrics(tmp_path) == [row]


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"split": "train", "step": step, "loss": 2.5}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with Reporter(tmp_path, quiet=True, resumed_step=3, evaluated_step=3):
        pass
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
