"""The files of a run, and failures of its environment."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import QUICK, SMALL

from chargpt.base.errors import TrainingError, UserError
from chargpt.config import DataConfig
from chargpt.model import GPT2
from chargpt.runs.report import Reporter, read_metrics
from chargpt.train import TrainResult, train
from chargpt.training.plan import make_plan
from chargpt.training.summary import summarize, verdict
from chargpt.training.trainer import TrainState


def train_with(text: Path | list[str], out: Path, **changes: Any) -> TrainResult:
    """Train a small model; `changes` are fields of TrainConfig, ``dropout`` or ``quiet``."""
    model_config = SMALL.replace(dropout=changes.pop("dropout", 0.1))
    quiet, source = changes.pop("quiet", True), [str(text)] if isinstance(text, Path) else text
    config = QUICK.replace(**changes)
    return train(source, model_config=model_config, train_config=config, out=out, quiet=quiet)


def test_a_run_leaves_what_the_documents_promise(result: TrainResult) -> None:
    assert {path.name for path in result.run.iterdir()} == {
        *("config.json", "tokenizer.json", "best", "last", "best.previous", "last.previous"),
        *("metrics.jsonl", "summary.json", "samples.txt", "loss.png", ".lock"),
    }
    assert json.loads((result.run / "summary.json").read_text()) == asdict(result.summary)
    config = json.loads((result.run / "config.json").read_text())
    assert config["text"]["n_characters"] == 3000
    assert len(config["text"]["sha256"]) == 64
    assert config["environment"]["torch"] == torch.__version__
    train_row = next(row for row in read_metrics(result.run) if row["split"] == "train")
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens"} <= train_row.keys()
    assert (result.run / "samples.txt").read_text().count("--- step") == 3


def test_the_last_part_of_the_text_validates(text_file: Path) -> None:
    data = DataConfig(validation_fraction=0.25)
    configs = {"model_config": SMALL, "train_config": QUICK, "data_config": data}
    corpus = make_plan([str(text_file)], **configs, out=Path("unused"), resuming=False).corpus
    text = text_file.read_text()
    assert corpus.tokenizer.decode(corpus.train) == text[:2250]
    assert corpus.tokenizer.decode(corpus.validation) == text[2250:]


def test_out_of_memory_names_the_settings_and_leaves_nothing(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr(GPT2, "forward", forward)
    with pytest.raises(TrainingError, match="^out of memory on cpu") as caught:
        train_with(text_file, tmp_path / "run")
    same = "--batch-size 2 --gradient-accumulation-steps 2, which learns the same, or a lower"
    for remedy in (same, "--block-size (16)", "--n-layer (2)", "--d-model (16)"):
        assert remedy in str(caught.value)
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
    compiled = train_with(text_file, tmp_path / "a", compile="on", quiet=False)
    printed = capsys.readouterr().err
    assert printed.count("continuing without") == 1
    assert "failed, continuing without (RuntimeError: InvalidCxxCompiler: No working C++" in printed
    assert "long story" not in printed
    assert compiled.summary.compile_seconds > 0
    eager = train_with(text_file, tmp_path / "b")
    assert compiled.summary.val_loss == eager.summary.val_loss


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_as_an_eager_run(text_file: Path, tmp_path: Path) -> None:
    on = train_with(text_file, tmp_path / "on", dropout=0.0, compile="on").summary
    off = train_with(text_file, tmp_path / "off", dropout=0.0, compile="off").summary
    assert on.val_loss == pytest.approx(off.val_loss, abs=1e-4)
    assert on.compile_seconds > 0
    assert off.compile_seconds < on.compile_seconds


def test_bf16_learns_almost_the_same_as_fp32(
    text_file: Path, tmp_path: Path, result: TrainResult
) -> None:
    bf16, fp32 = train_with(text_file, tmp_path / "bf16", precision="bf16"), result
    assert (bf16.summary.precision, fp32.summary.precision) == ("bf16", "fp32")
    assert bf16.summary.val_loss == pytest.approx(fp32.summary.val_loss, abs=0.02)
    assert bf16.summary.val_loss != fp32.summary.val_loss
    assert bf16.model.final_norm.weight.dtype == torch.float32


def test_training_several_files_makes_documents(tmp_path: Path, text_file: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("a king\n" * 400)
    result = train_with([str(text_file), str(other)], tmp_path / "run")
    assert result.tokenizer.end_of_text_id == len(result.tokenizer.characters)
    assert result.model.config.vocab_size == result.tokenizer.vocab_size


# --- the verdict


@pytest.mark.parametrize(
    ("best", "last", "best_step", "reason", "expected"),
    [
        (1.467, 1.467, 300, "budget", "still improving when the budget ended: a longer one"),
        (1.467, 1.7, 175, "budget", "overfitting since step 175: best kept; more text"),
        (1.467, 1.47, 175, "patience", "no longer improving"),
        (1.467, 1.47, 275, "budget", "no longer improving"),
        (1.467, 1.467, 300, "interrupted", "interrupted at step 300: best and last are kept"),
        (3.3, 3.3, 300, "budget", "no better than guessing by letter frequency: train longer"),
    ],
)
def test_the_verdict_rates_the_model_and_names_the_next_step(
    best: float, last: float, best_step: int, reason: Any, expected: str
) -> None:
    losses = {"best_val_loss": best, "val_loss": last}
    state = TrainState(step=300, evaluated_step=300, best_step=best_step, **losses)
    text = verdict(state, 3.3473, reason)
    assert expected in text
    assert "\n" not in text
    if best == 1.467:
        assert text.startswith("val 1.467 nats/char = 2.12 bits/char; like choosing among 4.3 ")


def test_the_verdict_names_a_limit_that_ended_the_run(text_file: Path, tmp_path: Path) -> None:
    config = QUICK.replace(steps=2000, minutes=4.0)
    plan = make_plan(
        [str(text_file)],
        **{"model_config": SMALL, "train_config": config, "data_config": DataConfig()},
        out=tmp_path,
        resuming=False,
    )
    losses = {"best_val_loss": 0.5, "val_loss": 0.5}
    for step, end in [
        (1234, "the limit of 4 minutes ended the run (step 1,234 of 2,000)"),
        (2000, "the budget ended"),
    ]:
        plan.trainer.state = TrainState(step=step, evaluated_step=step, best_step=step, **losses)
        said = summarize(plan.trainer, plan.corpus, "budget").verdict
        assert f"still improving when {end}: a longer one would help" in said


# --- trackers


def test_tensorboard_gets_every_metric(text_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train_with(text_file, tmp_path / "r", track="tensorboard")
    events = EventAccumulator(str(result.run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("validation/val_loss")] == [5, 10, 12]
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 13))


def test_wandb_gets_every_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    run = Mock()
    monkeypatch.setitem(sys.modules, "wandb", Mock(init=lambda **_: run))
    train_with(text_file, tmp_path / "r", track="wandb")
    logged = [(call.args[0], call.kwargs["step"]) for call in run.log.call_args_list]
    assert [step for values, step in logged if "validation/val_loss" in values] == [5, 10, 12]
    run.finish.assert_called_once_with()


def test_a_tracker_that_is_not_installed_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_file: Path
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"track is 'wandb', which is not installed: pip install"):
        train_with(text_file, tmp_path / "run", track="wandb")
    assert not (tmp_path / "run").exists()


# --- metrics.jsonl


def test_an_incomplete_last_line_is_skipped(tmp_path: Path) -> None:
    row = {"split": "train", "step": 1, "loss": 2.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + '\n{"split": "tr')
    assert read_metrics(tmp_path) == [row]


def test_resuming_removes_the_rows_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"split": "train", "step": step, "loss": 2.5}) for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with Reporter(tmp_path, quiet=True, resumed_step=3, evaluated_step=3):
        pass
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
