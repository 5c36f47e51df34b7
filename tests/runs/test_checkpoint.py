"""Checkpoints: saved, found, and restored."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import SMALL
from safetensors.torch import load_file, save_file

import chargpt
from chargpt.base.errors import ChargptWarning, UserError
from chargpt.compute.optimizers import make_optimizer
from chargpt.runs import checkpoint
from chargpt.runs.checkpoint import find_checkpoint, save_checkpoint
from chargpt.runs.folder import load
from chargpt.runs.weights import (
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    to_bytes,
)
from chargpt.train import TrainResult


@pytest.fixture
def run(tmp_path: Path, result: TrainResult) -> Path:
    """A copy of a finished run, to damage."""
    return Path(shutil.copytree(result.run, tmp_path / "run"))


def test_a_run_folder_alone_restores_the_model(run: Path, result: TrainResult) -> None:
    before = torch.get_rng_state()
    model, tokenizer = load(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert tokenizer == result.tokenizer
    assert model.config == result.model.config
    assert not model.training
    for (name, loaded), (_, trained) in zip(
        model.named_parameters(), result.model.named_parameters(), strict=True
    ):
        assert torch.equal(loaded, trained), name
    assert model.head.weight is model.token_embedding.weight


def test_weights_are_safetensors_with_plain_names(run: Path) -> None:
    names = load_file(run / "best" / "model.safetensors").keys()
    assert "blocks.1.feed_forward.sublayer.expand.weight" in names
    assert "head.weight" not in names  # tied
    assert not any("_orig_mod" in name or "module." in name for name in names)
    assert not list(run.rglob("*.pt")) + list(run.rglob("*.pkl"))


def test_best_and_last_hold_their_states(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert checkpoint.read_state(run / "best")["val_loss"] == summary["val_loss"]
    assert checkpoint.read_state(run / "last")["step"] == summary["steps"] == 12


def test_a_run_without_an_evaluation_loads_its_last_state_as_best(run: Path) -> None:
    for name in ("best", "best.previous"):
        shutil.rmtree(run / name)
    last = load_file(run / "last" / "model.safetensors")
    assert torch.equal(load(run).model.final_norm.weight, last["final_norm.weight"])


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_changed_byte_is_found_and_the_checkpoint_before_is_used(run: Path, name: str) -> None:
    damage(run / "best" / name)
    with pytest.warns(ChargptWarning, match=rf"best is damaged \({name}.*using .*best.previous"):
        assert find_checkpoint(run, "best") == run / "best.previous"
    damage(run / "best.previous" / name)
    with pytest.raises(UserError, match=rf"best is damaged .*previous is damaged \({name}.*again"):
        find_checkpoint(run, "best")


def save(run: Path, value: float) -> None:
    save_checkpoint(run, "last", {"model.safetensors": {"x": torch.tensor([value])}}, value)


def stored(run: Path) -> float:
    return load_file(find_checkpoint(run, "last") / "model.safetensors")["x"].item()


class Crash(BaseException):
    """The machine stops here."""


def test_a_crash_at_any_moment_of_a_save_leaves_the_old_or_the_new_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop at the first file operation, then at the second, and so on until the save completes."""
    operations = limit = 0

    def counted(function):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal operations
            operations += 1
            if operations > limit:
                raise Crash
            return function(*args, **kwargs)

        return wrapper

    save(tmp_path, 0.0)
    saving = [(checkpoint, "write_file"), (checkpoint, "sync_folder")]
    for place, name in [*saving, (shutil, "rmtree"), (Path, "replace"), (Path, "mkdir")]:
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
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
    assert len(outcomes) == 9


def test_a_save_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        save(tmp_path, value)
        assert stored(tmp_path) == value
    assert {path.name for path in tmp_path.iterdir()} == {"last", "last.previous"}
    assert load_file(tmp_path / "last.previous" / "model.safetensors")["x"].item() == 2.0


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


# --- memory that runs out

MEMORY = """
import resource, sys
from pathlib import Path
import torch
from chargpt.config import GPT2Config
from chargpt.runs.weights import check_model_file, read_tensors, to_bytes

what, path, spare = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
tensor = torch.zeros(2**26)  # 256 MiB
do = {
    "save": lambda: to_bytes({"x": tensor}),
    "read": lambda: read_tensors(path),
    "check": lambda: check_model_file(path, GPT2Config(vocab_size=5)),
}[what]
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + spare * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    do()
except MemoryError as error:
    print("MemoryError:", error)
"""


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.safetensors"
    save_file({"x": torch.zeros(2**26)}, path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("spare", [100, 400])  # MiB: less than one copy, less than two
@pytest.mark.parametrize("what", ["save", "read", "check"])
def test_missing_memory_is_a_memory_error(what: str, spare: int, large_file: Path) -> None:
    """And neither a damaged file, nor a panic of the library, nor the end of the process."""
    command = [sys.executable, "-c", MEMORY, what, str(large_file), str(spare)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert "not fit into memory" in done.stdout
    assert "panicked" not in done.stderr


def test_a_panic_while_saving_is_a_memory_error(monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})
    monkeypatch.setattr("chargpt.runs.weights.save", Mock(side_effect=panic("pointer is null")))
    with pytest.raises(MemoryError, match="do not fit into memory"):
        to_bytes({"x": torch.zeros(3)})
