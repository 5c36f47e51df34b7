import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file

import chargpt
from chargpt.base import files as durable
from chargpt.base.errors import RunWarning, UserError
from chargpt.compute.optimizers import make_optimizer
from chargpt.runs import checkpoint
from chargpt.runs.checkpoint import find_checkpoint, save_checkpoint
from chargpt.runs.folder import load
from chargpt.runs.weights import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
)
from chargpt.train import TrainResult


@pytest.fixture
def run(tmp_path: Path, result: TrainResult) -> Path:
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(result.run, tmp_path / "run"))


def test_a_run_folder_alone_gives_the_model_back(run: Path, result: TrainResult) -> None:
    model, tokenizer = load(run)
    assert tokenizer == result.tokenizer
    assert model.config == result.model.config
    assert not model.training
    for (name, loaded), (_, trained) in zip(
        model.named_parameters(), result.model.named_parameters(), strict=True
    ):
        assert torch.equal(loaded, trained), name
    assert model.head.weight is model.token_embedding.weight


def test_loading_leaves_torchs_random_state_alone(run: Path) -> None:
    before = torch.get_rng_state()
    load(run)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_plain_safetensors_with_telling_names(run: Path) -> None:
    names = load_file(run / "best" / "model.safetensors").keys()
    assert "blocks.1.feed_forward.sublayer.expand.weight" in names
    assert "head.weight" not in names  # tied
    assert not any("_orig_mod" in name or "module." in name for name in names)
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl"))


def test_best_and_last_are_what_they_say(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert checkpoint.read_state(run / "best")["val_loss"] == summary["val_loss"]
    assert checkpoint.read_state(run / "last")["step"] == summary["steps"] == 12


def test_a_run_stopped_before_its_first_evaluation_has_its_last_state_for_best(run: Path) -> None:
    for name in ("best", "best.previous"):
        shutil.rmtree(run / name)
    last = load_file(run / "last" / "model.safetensors")
    assert torch.equal(load(run).model.final_norm.weight, last["final_norm.weight"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_changed_byte_is_noticed_and_the_one_before_is_used(run: Path, name: str) -> None:
    damage(run / "best" / name)
    with pytest.warns(RunWarning, match=rf"best is damaged \({name}.*using .*best.previous"):
        assert find_checkpoint(run, "best") == run / "best.previous"
    damage(run / "best.previous" / name)
    with pytest.raises(UserError, match=rf"best is damaged .*previous is damaged \({name}.*again"):
        find_checkpoint(run, "best")


def test_a_missing_file_is_noticed(run: Path) -> None:
    (run / "last" / "optimizer.safetensors").unlink()
    with pytest.warns(RunWarning, match="last is damaged .optimizer.safetensors cannot be read"):
        load(run, which="last")
    shutil.rmtree(run / "last.previous")
    with pytest.raises(UserError, match="last is damaged .optimizer.safetensors cannot be read"):
        load(run, which="last")


def save(run: Path, value: float) -> None:
    save_checkpoint(run, "last", {"model.safetensors": {"x": torch.tensor([value])}}, value)


def stored(run: Path) -> float:
    return load_file(find_checkpoint(run, "last") / "model.safetensors")["x"].item()


class Crash(BaseException):
    """The machine stops here."""


def test_a_crash_at_any_moment_of_a_save_leaves_the_old_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop the save at its first file operation, at its second, … until it gets through."""
    operations = 0
    limit = 0

    def counted(function):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal operations
            operations += 1
            if operations > limit:
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    save(tmp_path, 0.0)
    monkeypatch.setattr(checkpoint, "write_file", counted(durable.write_file))
    monkeypatch.setattr(checkpoint, "sync_folder", counted(durable.sync_folder))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", counted(shutil.rmtree))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(Path, "mkdir", counted(Path.mkdir))
    outcomes: list[float] = []
    for limit in range(100):  # wrapper reads it
        operations = 0
        value = limit + 1.0
        before = stored(tmp_path)
        try:
            save(tmp_path, value)
        except Crash:
            outcomes.append(stored(tmp_path))
            assert outcomes[-1] in (before, value)
        else:
            break
    assert stored(tmp_path) == value
    assert len(outcomes) == 9, "every file operation of a save was hit"


def test_saving_replaces_and_keeps_the_one_before(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save(tmp_path, value)
        assert stored(tmp_path) == value
    assert {path.name for path in tmp_path.iterdir()} == {"last", "last.previous"}
    assert load_file(tmp_path / "last.previous" / "model.safetensors")["x"].item() == 2.0


def test_write_text_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    durable.write_text(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(durable, "write_file", fail)
    with pytest.raises(OSError, match="disk full"):
        durable.write_text(path, "new")
    assert path.read_text() == "old"


@pytest.mark.parametrize(("name", "entry"), [("adamw", "exp_avg"), ("muon", "momentum_buffer")])
def test_optimizer_state_survives_the_round_trip(name: Any, entry: str) -> None:
    config = chargpt.TrainConfig(optimizer=name)

    def step(model: chargpt.GPT2, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(5)
        model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    def fresh() -> tuple[chargpt.GPT2, torch.optim.Optimizer]:
        torch.manual_seed(1)
        model = chargpt.GPT2(SMALL.replace(vocab_size=5, dropout=0.0))
        return model, make_optimizer(model, config)

    model, optimizer = fresh()
    step(model, optimizer)
    weights = {k: v.clone() for k, v in model_tensors(model).items()}
    moments = {k: v.clone() for k, v in optimizer_tensors(optimizer, model).items()}
    assert f"blocks.0.attention.sublayer.qkv.weight/{entry}" in moments
    assert "token_embedding.weight/step" in moments
    step(model, optimizer)
    again, optimizer_again = fresh()
    load_model_tensors(again, weights)
    load_optimizer_tensors(optimizer_again, again, moments)
    step(again, optimizer_again)
    for (parameter, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), parameter


def test_errors_say_what_is_wrong_with_a_folder(tmp_path: Path, run: Path) -> None:
    with pytest.raises(
        UserError, match="nowhere does not exist, so it is not a run: give the folder"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json, so it is not a run"):
        load(tmp_path)
    whole = (run / "config.json").read_text()
    config = json.loads(whole)
    (run / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, this chargpt reads 2: upgrade chargpt"):
        load(run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON .* the run is damaged"):
        load(run)
    config["model_config"]["d_model"] = 32
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json has changed since it was written"):
        load(run)
    (run / "config.json").write_text(json.dumps(durable.seal(config)))
    with pytest.raises(UserError, match="the weights do not fit config.json at token_embedding"):
        load(run)
    (run / "config.json").write_text(whole)
    for name in ("best", "best.previous", "last", "last.previous"):
        shutil.rmtree(run / name)
    with pytest.raises(UserError, match="has no checkpoint 'last': train it"):
        load(run)
