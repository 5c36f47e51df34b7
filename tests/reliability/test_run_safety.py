"""What keeps a run: the lock, saves that fail, numbers that are none, files that are checked."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL
from safetensors.torch import load_file

import chargpt.train
import chargpt.train as training
from chargpt.base.errors import RunWarning, TrainingError, UserError
from chargpt.cli import main as cli
from chargpt.compute.counts import parameters_of
from chargpt.compute.device import deterministic_algorithms
from chargpt.config import DataConfig
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


# --- one trainer a folder


def test_a_second_trainer_is_refused_and_nothing_changes(text_file: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    longer = QUICK.replace(steps=20)
    with (
        locked(run),
        pytest.raises(UserError, match="another process is training into .*run: wait"),
    ):
        train(
            str(text_file),
            model_config=SMALL,
            train_config=longer,
            out=run,
            resume=True,
            quiet=True,
        )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    result = train(
        str(text_file), model_config=SMALL, train_config=longer, out=run, resume=True, quiet=True
    )
    assert result.summary.steps == 20


HOLD = """
import sys
from pathlib import Path
from chargpt.runs.folder import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
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


def test_a_run_that_lost_its_last_state_does_not_begin_anew(text_file: Path, run: Path) -> None:
    """It would write over the best one."""
    for name in ("last", "last.previous"):
        shutil.rmtree(run / name)
    before = (run / "best" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="has a best checkpoint but no last one"):
        train(
            str(text_file), model_config=SMALL, train_config=QUICK, out=run, resume=True, quiet=True
        )
    assert (run / "best" / "model.safetensors").read_bytes() == before
    assert load(run)


def test_a_mistake_leaves_no_folder_behind(text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "run"
    with pytest.raises(UserError):
        train("no such text", out=out, quiet=True)
    with pytest.raises(UserError, match="vocab_size"):
        train(str(text_file), model_config=SMALL.replace(vocab_size=3), out=out, quiet=True)
    assert list(tmp_path.iterdir()) == []


# --- saves


def test_a_save_that_fails_ends_the_run_with_the_reason(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    write = saving.save_checkpoint

    def fail_later(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", fail_later)
    with pytest.raises(
        TrainingError, match=r"could not be saved after step 10 \(No space .* needs .*B\).*--resume"
    ):
        train(
            str(text_file), model_config=SMALL, train_config=QUICK, out=tmp_path / "run", quiet=True
        )
    assert read_state(tmp_path / "run" / "last")["step"] == 5
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_run_folder_that_vanishes_ends_the_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not made anew: a checkpoint without config.json would be no run."""
    run = tmp_path / "run"
    step = training.train_step

    def vanish(trainer: Trainer) -> Any:
        if trainer.state.step == 7:
            shutil.rmtree(run)
        return step(trainer)

    monkeypatch.setattr(training, "train_step", vanish)
    with pytest.raises(TrainingError, match=r"run has vanished, with all that was saved"):
        train(str(text_file), model_config=SMALL, train_config=QUICK, out=run, quiet=True)
    assert not run.exists()


def test_other_files_that_cannot_be_written_end_it_too(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error", "summary.json")

    monkeypatch.setattr(chargpt.train, "write_json", fail)
    arguments = ["train", str(text_file), "--out", str(tmp_path / "run"), "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--n-layer", "1", "--d-model", "16", "--device", "cpu"])
    assert stop.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("chargpt: summary.json: Input/output error; the checkpoints in")


def test_the_last_state_is_saved_at_its_interval(text_file: Path, tmp_path: Path) -> None:
    saved: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        write = saving.save_checkpoint

        def note(run: Path, which: Any, parts: Any, state: Any) -> None:
            saved.extend([state["step"]] if which == "last" else [])
            write(run, which, parts, state)

        patch.setattr(saving, "save_checkpoint", note)
        config = QUICK.replace(save_interval=4, eval_interval=6)
        train(
            str(text_file),
            model_config=SMALL,
            train_config=config,
            out=tmp_path / "run",
            quiet=True,
        )
    assert saved == [4, 6, 8, 12, 12]


def test_what_was_written_down_of_lost_steps_is_forgotten(text_file: Path, run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"split": "train", "step": 13, "loss": 9}\n{"split": "tr')
    with (run / "samples.txt").open("a") as file:
        file.write("--- step 13, validation loss 9.0000\nlost\n--- not a header\n")
    kept = (run / "samples.txt").read_text().partition("--- step 13")[0]
    train(str(text_file), model_config=SMALL, train_config=QUICK, out=run, resume=True, quiet=True)
    assert max(row["step"] for row in read_metrics(run)) == 12
    assert (run / "samples.txt").read_text() == kept


def test_an_evaluation_is_written_down_before_it_is_saved(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run that ends between the two has it once, whichever way it goes on."""

    def losses(run: Path) -> list[Any]:
        return [(row["step"], row.get("val_loss")) for row in read_metrics(run)]

    def run_in(name: str, resume: Any = False) -> Path:
        out = tmp_path / name
        train(
            str(text_file),
            model_config=SMALL,
            train_config=QUICK,
            out=out,
            resume=resume,
            quiet=True,
        )
        return out

    whole = run_in("whole")
    save = saving.save_checkpoint
    for n in range(1, 6):  # ends before the n-th save: best, last, best, last, …
        calls = 0

        def end(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == n:  # noqa: B023
                raise KeyboardInterrupt
            save(*arguments)

        monkeypatch.setattr(saving, "save_checkpoint", end)
        with pytest.raises(KeyboardInterrupt):
            run_in(f"run-{n}")
        monkeypatch.undo()
        monkeypatch.setattr(chargpt.train, "plot_loss", lambda _: None)
        assert losses(run_in(f"run-{n}", resume="auto")) == losses(whole)


def test_patience_that_was_over_is_over_when_the_run_is_started_again(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(training, "evaluate", lambda *_, **__: next(worse))
    config = QUICK.replace(steps=100, patience=2)
    for resume in (False, True, "auto"):
        summary = train(
            str(text_file), model_config=SMALL, train_config=config, out=tmp_path / "run", resume=resume,
            quiet=True,
        ).summary  # fmt: skip
        assert (summary.steps, summary.stop_reason) == (15, "patience")


def test_a_better_best_checkpoint_is_never_replaced(text_file: Path, run: Path) -> None:
    """One of a future that was cut off, in which evaluations came at other steps."""
    weights = {"model.safetensors": load_file(run / "best" / "model.safetensors")}
    save_checkpoint(run, "best", weights, {"step": 14, "val_loss": 0.25})
    longer = QUICK.replace(steps=20)
    result = train(
        str(text_file), model_config=SMALL, train_config=longer, out=run, resume=True, quiet=True
    )
    assert (result.summary.best_step, result.summary.val_loss) == (14, 0.25)
    assert read_state(run / "best") == {"step": 14, "val_loss": 0.25}


def test_a_damaged_checkpoint_does_not_outlive_the_whole_one_before(run: Path) -> None:
    shutil.copytree(run / "last", run / "last.previous", dirs_exist_ok=True)
    whole = (run / "last.previous" / "model.safetensors").read_bytes()
    (run / "last" / "model.safetensors").write_bytes(whole[:-1] + b"?")
    with pytest.warns(RunWarning, match=r"last is damaged .* the one before"):
        recover(run, "last")
    assert (run / "last" / "model.safetensors").read_bytes() == whole
    assert not (run / "last.previous").exists()


def test_links_that_a_tracker_keeps_are_its_own(text_file: Path, run: Path) -> None:
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to(run)
    assert train(
        str(text_file), model_config=SMALL, train_config=QUICK, out=run, resume=True, quiet=True
    )
    (run / "samples.txt").unlink()
    (run / "samples.txt").symlink_to(text_file)
    with pytest.raises(UserError, match=r"samples.txt is a link"):
        train(
            str(text_file), model_config=SMALL, train_config=QUICK, out=run, resume=True, quiet=True
        )


def test_a_tracker_that_fails_stops_no_run(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    class Failing:
        def log(self, values: dict[str, float], step: int) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(reporting, "make_tracker", lambda *_: Failing())
    result = train(str(text_file), model_config=SMALL, train_config=QUICK, out=tmp_path / "run")
    assert result.summary.steps == 12
    assert capsys.readouterr().err.count("failed, going on without it") == 1

    def refuse(_: Path) -> None:
        raise RuntimeError("no account")

    monkeypatch.undo()
    monkeypatch.setattr(reporting, "_WandB", refuse)
    with pytest.raises(UserError, match="track is 'wandb', which does not start .*no account"):
        reporting.make_tracker("wandb", tmp_path)


def test_a_model_too_large_for_memory_is_a_mistake(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    monkeypatch.setattr(chargpt.train, "make_plan", fail)
    with pytest.raises(UserError, match="does not fit into memory: give a lower --d-model .16."):
        train(
            str(text_file), model_config=SMALL, train_config=QUICK, out=tmp_path / "run", quiet=True
        )
    assert list(tmp_path.iterdir()) == []


# --- numbers


def test_weights_that_are_no_numbers_are_not_saved(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step = tmp_path / "run", training.train_step

    def spoil(trainer: Trainer) -> Any:
        if trainer.state.step == 7:
            with torch.no_grad():
                trainer.model.final_norm.weight[3] = torch.inf
        return step(trainer)

    monkeypatch.setattr(training, "train_step", spoil)
    for resume in (False, True, True):  # however often it is tried
        with pytest.raises(TrainingError, match=r"final_norm.weight is not finite after step 7"):
            train(
                str(text_file),
                model_config=SMALL,
                train_config=QUICK,
                out=run,
                resume=resume,
                quiet=True,
            )
        assert read_state(run / "last")["step"] == 5
    monkeypatch.setattr(training, "train_step", step)
    again = train(
        str(text_file), model_config=SMALL, train_config=QUICK, out=run, resume=True, quiet=True
    )
    assert again.summary.steps == 12


def test_a_step_that_fails_again_and_again_keeps_what_was_before_it(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, loss = tmp_path / "run", Trainer.loss

    def poison(trainer: Trainer, *batch: Any) -> Any:
        return loss(trainer, *batch) * (torch.nan if trainer.state.step == 7 else 1)

    monkeypatch.setattr(Trainer, "loss", poison)
    for resume in (False, True, True):
        with pytest.raises(TrainingError, match=r"step 8 stopped before its update"):
            train(
                str(text_file),
                model_config=SMALL,
                train_config=QUICK,
                out=run,
                resume=resume,
                quiet=True,
            )
    assert read_state(run / "last")["step"] == 7
    assert read_state(run / "last.previous")["step"] == 5


def test_the_first_tensor_that_is_no_number_is_named(text_file: Path, tmp_path: Path) -> None:
    trainer = trainer_for(text_file, tmp_path / "run")
    name, parameter = list(trainer.model.named_parameters())[5]
    parameter.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(NonFiniteError, match=f"the gradient of {name} is not finite"):
        train_step(trainer)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_a_gradient_much_longer_than_usual_is_told(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(text_file, tmp_path / "run", grad_clip=0.0)
    monkeypatch.setattr(training, "SPIKE_SETTLING", 5)
    told: list[str] = []
    reporter = Reporter(trainer.out, quiet=True)
    monkeypatch.setattr(reporter, "note", told.append)
    with reporter:
        for step in range(12):
            scale = 50.0 if step in (2, 8) else 1.0
            hook = trainer.model.final_norm.weight.register_hook(lambda g, s=scale: g * s * s)
            training._step(trainer, reporter)
            hook.remove()
    assert len(told) == 1  # what is usual was not known at step 3
    assert told[0].startswith("step 9: the gradient's norm is ")
    assert trainer.state.usual_grad_norm is not None


def test_determinism_is_for_a_while_and_says_where_it_ends() -> None:
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
    for name, wish in (("a", True), ("b", False)):
        config = QUICK.replace(deterministic=wish)
        train(
            str(text_file), model_config=SMALL, train_config=config, out=tmp_path / name, quiet=True
        )
    a, b = (load(tmp_path / name, which="last").model for name in ("a", "b"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# --- what is looked at


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_can_be_counted_without_a_model(placement: Any, bias: bool) -> None:
    config = SMALL.replace(vocab_size=11, norm_placement=placement, bias=bias, d_ff=24, n_layer=3)
    model = chargpt.GPT2(config)
    assert parameters_of(config) == sum(p.numel() for p in model.parameters())


def test_check_tells_what_is_whole_and_what_is_not(run: Path, capsys: Any) -> None:
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
    assert len(bad) == 3
    assert "tokenizer.json" in bad[0]
    assert "best  " in bad[1]
    assert "model.safetensors has 0 bytes" in bad[1]
    assert "line 1 is not JSON" in bad[2]


def test_a_checkpoint_in_the_making_is_no_damage(run: Path) -> None:
    shutil.copytree(run / "last", run / ".last.new")
    (run / ".last.new" / "manifest.json").unlink()
    assert all(finding.good for finding in inspect_run(run))
    load(run, which="last")  # without a warning


def test_weights_of_another_model_are_refused_before_one_is_made(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chargpt.runs.folder.check_model_file", _refuse)
    monkeypatch.setattr("chargpt.runs.folder.GPT2", lambda _: pytest.fail("made"))
    with pytest.raises(UserError, match="refused"):
        load(run)


def _refuse(*_: Any) -> None:
    raise UserError("refused")


def test_warnings_of_the_library_are_warnings(run: Path) -> None:
    (run / "best" / "state.json").unlink()
    with pytest.warns(RunWarning, match="best is damaged .state.json cannot be read"):
        load(run)
