"""What protects a run: the lock, failed saves, NaN and infinity, checks of its files."""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import QUICK, SMALL
from safetensors.torch import load_file

import chargpt.train
import chargpt.train as training
from chargpt.base.errors import ChargptWarning, TrainingError, UserError
from chargpt.cli import main as cli
from chargpt.compute.device import deterministic_algorithms
from chargpt.config import DataConfig, TrainConfig
from chargpt.measure.inspect import inspect_run
from chargpt.runs import report as reporting
from chargpt.runs.checkpoint import read_state, recover, save_checkpoint
from chargpt.runs.folder import load, locked
from chargpt.runs.report import Reporter, read_metrics
from chargpt.train import NonFiniteError, TrainResult, train, train_step
from chargpt.training import saving
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chargpt.train, "plot_loss", lambda _: None)
        yield


@pytest.fixture
def run(tmp_path: Path, result: TrainResult) -> Path:
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(result.run, tmp_path / "run"))


def train_into(
    out: Path, text_file: Path, config: TrainConfig = QUICK, *, resume: Any = False
) -> TrainResult:
    return train(
        str(text_file), model_config=SMALL, train_config=config, out=out, resume=resume, quiet=True
    )


def trainer_for(text_file: Path, out: Path, **changes: Any) -> Trainer:
    out.mkdir()
    plan = make_plan(
        [str(text_file)],
        model_config=SMALL,
        train_config=QUICK.replace(**changes),
        data_config=DataConfig(),
        out=out,
        resuming=False,
    )
    return plan.trainer


# --- one process per folder


def test_a_second_trainer_is_refused_and_nothing_changes(text_file: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    longer = QUICK.replace(steps=20)
    message = "another process is training into .*run: wait"
    with locked(run), pytest.raises(UserError, match=message):
        train_into(run, text_file, longer, resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    result = train_into(run, text_file, longer, resume=True)
    assert result.summary.steps == 20


HOLD = """
import sys
from pathlib import Path
from chargpt.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process"), locked(tmp_path):
            pass
        child.kill()
    with locked(tmp_path):
        pass


def test_a_run_that_lost_its_last_state_is_not_started_again(text_file: Path, run: Path) -> None:
    """It would overwrite the best one."""
    for name in ("last", "last.previous"):
        shutil.rmtree(run / name)
    before = (run / "best" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="has a best checkpoint but no last one"):
        train_into(run, text_file, resume=True)
    assert (run / "best" / "model.safetensors").read_bytes() == before
    assert load(run)


def test_a_user_error_leaves_no_folder(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "run"
    with pytest.raises(UserError):
        train("no such text", out=out, quiet=True)
    with pytest.raises(UserError, match="vocab_size"):
        train(str(text_file), model_config=SMALL.replace(vocab_size=3), out=out, quiet=True)
    assert list(tmp_path.iterdir()) == []


# --- saves


def fail_before(patch: pytest.MonkeyPatch, n: int, error: BaseException) -> None:
    """Let saves succeed, but raise an error instead of the n-th."""
    saves, write = iter(range(1, 100)), saving.save_checkpoint

    def save(*arguments: Any) -> None:
        if next(saves) == n:
            raise error
        write(*arguments)

    patch.setattr(saving, "save_checkpoint", save)


def test_a_save_that_fails_ends_the_run_with_the_reason(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_before(monkeypatch, 4, OSError(28, "No space left on device"))
    with pytest.raises(
        TrainingError, match=r"could not be saved after step 10 \(No space .* needs .*B\).*--resume"
    ):
        train_into(tmp_path / "run", text_file)
    assert read_state(tmp_path / "run" / "last")["step"] == 5
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_vanished_run_folder_ends_the_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not made again: a checkpoint without config.json is not a run."""
    run = tmp_path / "run"
    step = training.train_step

    def vanish(trainer: Trainer) -> Any:
        if trainer.state.step == 7:
            shutil.rmtree(run)
        return step(trainer)

    monkeypatch.setattr(training, "train_step", vanish)
    with pytest.raises(TrainingError, match=r"run has vanished, with all that was saved"):
        train_into(run, text_file)
    assert not run.exists()


def test_another_file_that_cannot_be_written_ends_the_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    error = OSError(5, "Input/output error", "summary.json")
    monkeypatch.setattr(chargpt.train, "write_json", Mock(side_effect=error))
    arguments = ["train", str(text_file), "--out", str(tmp_path / "run"), "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--n-layer", "1", "--d-model", "16", "--device", "cpu"])
    assert stop.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("chargpt: summary.json: Input/output error; the checkpoints in")


def test_the_last_state_is_saved_at_its_interval(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Mock(wraps=saving.save_checkpoint)
    monkeypatch.setattr(saving, "save_checkpoint", save)
    train_into(tmp_path / "run", text_file, QUICK.replace(save_interval=4, eval_interval=6))
    saved = [call.args[3]["step"] for call in save.mock_calls if call.args[1] == "last"]
    assert saved == [4, 6, 8, 12, 12]


def test_log_lines_of_lost_steps_are_removed(text_file: Path, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 13, "loss": 9}\n{"split": "tr')
    with (run / "samples.txt").open("a") as file:
        file.write("--- step 13, validation loss 9.0000\nlost\n--- not a header\n")
    kept = (run / "samples.txt").read_text().partition("--- step 13")[0]
    train_into(run, text_file, resume=True)
    assert max(row["step"] for row in read_metrics(run)) == 12
    assert (run / "samples.txt").read_text() == kept


def test_an_evaluation_is_logged_before_it_is_saved(text_file: Path, tmp_path: Path) -> None:
    """A run that ends between the two then has one line for it after it resumes."""

    def losses(run: Path) -> list[Any]:
        return [(row["step"], row.get("val_loss")) for row in read_metrics(run)]

    def run_in(name: str, resume: Any = False) -> Path:
        out = tmp_path / name
        train_into(out, text_file, resume=resume)
        return out

    whole = run_in("whole")
    for n in range(1, 6):  # end before the n-th save: best, last, best, last, …
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fail_before(patch, n, KeyboardInterrupt())
            run_in(f"run-{n}")
        assert losses(run_in(f"run-{n}", resume="auto")) == losses(whole)


def test_a_run_that_ended_by_patience_does_not_continue(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: next(worse))
    config = QUICK.replace(steps=100, patience=2)
    for resume in (False, True, "auto"):
        summary = train_into(tmp_path / "run", text_file, config, resume=resume).summary
        assert (summary.steps, summary.stop_reason) == (15, "patience")


def test_a_better_best_checkpoint_is_never_replaced(text_file: Path, run: Path) -> None:
    """It may come from steps that were lost, with evaluations at other steps."""
    weights = {"model.safetensors": load_file(run / "best" / "model.safetensors")}
    save_checkpoint(run, "best", weights, {"step": 14, "val_loss": 0.25})
    longer = QUICK.replace(steps=20)
    result = train_into(run, text_file, longer, resume=True)
    assert (result.summary.best_step, result.summary.val_loss) == (14, 0.25)
    assert read_state(run / "best") == {"step": 14, "val_loss": 0.25}


def test_a_damaged_checkpoint_does_not_outlive_the_whole_one_before(run: Path) -> None:
    shutil.copytree(run / "last", run / "last.previous", dirs_exist_ok=True)
    whole = (run / "last.previous" / "model.safetensors").read_bytes()
    (run / "last" / "model.safetensors").write_bytes(whole[:-1] + b"?")
    with pytest.warns(ChargptWarning, match=r"last is damaged .* the one before"):
        recover(run, "last")
    assert (run / "last" / "model.safetensors").read_bytes() == whole
    assert not (run / "last.previous").exists()


def test_links_are_allowed_only_in_a_trackers_folder(text_file: Path, run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to(run)
    assert train_into(run, text_file, resume=True)
    (run / "samples.txt").unlink()
    (run / "samples.txt").symlink_to(text_file)
    with pytest.raises(UserError, match=r"samples.txt is a link"):
        train_into(run, text_file, resume=True)


def test_a_failing_tracker_does_not_end_the_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    failing = Mock(log=Mock(side_effect=ConnectionError("no route")))
    monkeypatch.setattr(reporting, "make_tracker", lambda *_: failing)
    result = train(str(text_file), model_config=SMALL, train_config=QUICK, out=tmp_path / "run")
    assert result.summary.steps == 12
    assert capsys.readouterr().err.count("failed, continuing without it") == 1

    monkeypatch.undo()
    monkeypatch.setattr(reporting, "_WandB", Mock(side_effect=RuntimeError("no account")))
    with pytest.raises(UserError, match="track is 'wandb', which does not start .*no account"):
        reporting.make_tracker("wandb", tmp_path)


def test_a_model_too_large_for_memory_is_a_user_error(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")
    monkeypatch.setattr(chargpt.train, "make_plan", Mock(side_effect=error))
    with pytest.raises(UserError, match="does not fit into memory: give a lower --d-model .16."):
        train_into(tmp_path / "run", text_file)
    assert list(tmp_path.iterdir()) == []


# --- NaN and infinity


def test_infinite_weights_are_not_saved(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "run", training.train_step

    def spoil(trainer: Trainer) -> Any:
        if trainer.state.step == 7:
            with torch.no_grad():
                trainer.model.final_norm.weight[3] = torch.inf
        return step(trainer)

    monkeypatch.setattr(training, "train_step", spoil)
    for resume in (False, True, True):
        with pytest.raises(TrainingError, match=r"final_norm.weight is not finite after step 7"):
            train_into(run, text_file, resume=resume)
        assert read_state(run / "last")["step"] == 5
    monkeypatch.setattr(training, "train_step", step)
    again = train_into(run, text_file, resume=True)
    assert again.summary.steps == 12


def test_a_step_that_fails_repeatedly_keeps_the_checkpoints_before_it(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loss = tmp_path / "run", Trainer.loss

    def poison(trainer: Trainer, *batch: Any) -> Any:
        return loss(trainer, *batch) * (torch.nan if trainer.state.step == 7 else 1)

    monkeypatch.setattr(Trainer, "loss", poison)
    for resume in (False, True, True):
        with pytest.raises(TrainingError, match=r"step 8 stopped before its update"):
            train_into(run, text_file, resume=resume)
    assert read_state(run / "last")["step"] == 7
    assert read_state(run / "last.previous")["step"] == 5


def test_the_first_gradient_that_is_not_finite_is_named(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run")
    name, parameter = list(trainer.model.named_parameters())[5]
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match=f"the gradient of {name} is not finite"):
        train_step(trainer)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_an_unusually_large_gradient_is_reported(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", grad_clip=0.0)
    monkeypatch.setattr(training, "SPIKE_SETTLING", 5)
    lines: list[str] = []
    reporter = Reporter(trainer.out, quiet=True)
    monkeypatch.setattr(reporter, "note", lines.append)
    with reporter:
        for step in range(12):
            scale = 50.0 if step in (2, 8) else 1.0
            hook = trainer.model.final_norm.weight.register_hook(lambda g, s=scale: g * s * s)
            training._step(trainer, reporter)
            hook.remove()
    assert len(lines) == 1  # step 3 comes before the usual norm is known
    assert lines[0].startswith("step 9: the gradient's norm is ")
    assert trainer.state.usual_grad_norm is not None


def test_determinism_is_temporary_and_its_errors_are_user_errors() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    with (
        pytest.raises(UserError, match="--deterministic does not work here .foo does not have a"),
        deterministic_algorithms(True),
    ):
        raise RuntimeError("foo does not have a deterministic implementation. More words.")
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_deterministic_run_is_the_same_run(text_file: Path, tmp_path: Path) -> None:
    for name, deterministic in (("a", True), ("b", False)):
        config = QUICK.replace(deterministic=deterministic)
        train_into(tmp_path / name, text_file, config)
    a, b = (load(tmp_path / name, which="last").model for name in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- checks


def test_check_names_every_damaged_file(run: Path, capsys: Any) -> None:
    def check() -> tuple[int, list[str]]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main(["check", str(run)])
        return int(stop.value.code or 0), capsys.readouterr().out.splitlines()

    code, lines = check()
    assert code == 0
    assert [line[:3] for line in lines] == ["ok "] * 8
    (run / "best" / "model.safetensors").write_bytes(b"")
    (run / "tokenizer.json").write_text("{}")
    (run / "metrics.jsonl").write_text("no\n")
    code, lines = check()
    assert code == 1
    bad = [line for line in lines if line.startswith("BAD")]
    expected = ("tokenizer.json", "best  .*model.safetensors has 0 bytes", "line 1 is not JSON")
    assert all(re.search(*pair) for pair in zip(expected, bad, strict=True))


def test_an_unfinished_checkpoint_is_not_damage(run: Path) -> None:
    shutil.copytree(run / "last", run / ".last.new")
    (run / ".last.new" / "manifest.json").unlink()
    assert all(finding.good for finding in inspect_run(run))
    load(run, which="last")  # without a warning
