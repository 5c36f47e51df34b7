"""Kernels, attention backend, compilation: each choice, its reason, and its fallback."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL
from variants import COMPILERS

import chargpt.training.plan
from chargpt.base.errors import UserError
from chargpt.compute import native
from chargpt.compute.fast_layers import FAST, FastCausalSelfAttention, set_attention
from chargpt.compute.native import Kernels, KernelsError
from chargpt.compute.parallel import ParallelChoice
from chargpt.config import DataConfig, GPT2Config
from chargpt.model import GPT2, CausalSelfAttention
from chargpt.train import train_step
from chargpt.training import speed
from chargpt.training.plan import make_plan
from chargpt.training.speed import (
    SpeedChoices,
    accelerate,
    choose_attention,
    choose_kernels,
    keep_memory,
)
from chargpt.training.trainer import Trainer

needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def fake_kernels(
    patch: pytest.MonkeyPatch, *, lanes: int = 16, problem: str = "", platform: str = "linux"
) -> None:
    """Fake kernels with vectors of `lanes`, or kernels that do not compile because of `problem`."""

    def load() -> Any:
        if problem:
            raise KernelsError(problem)
        return SimpleNamespace(lanes=lanes)

    for module in (speed, native):
        patch.setattr(module, "load_kernels", load)
    patch.setattr(sys, "platform", platform)


# --- kernels


def test_kernels_are_used_where_they_compile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "kernels.so"
    monkeypatch.setattr(speed, "library_path", lambda: library)
    fake_kernels(monkeypatch)
    for requested in ("auto", "on"):
        choice = choose_kernels(requested, CPU, compiling=False)
        assert choice.on
        assert choice.reason.startswith("compiled for this processor in 0.")
    library.touch()
    assert choose_kernels("auto", CPU, compiling=False) == (True, "compiled before")


@pytest.mark.parametrize(
    ("device", "compiling", "problem", "platform", "reason"),
    [
        (CUDA, False, "", "linux", "they are for CPUs, and this is cuda"),
        (MPS, False, "", "darwin", "they are for CPUs, and this is mps"),
        (CUDA, True, "", "linux", "they are for CPUs, and this is cuda"),
        (CPU, True, "", "linux", "torch.compile makes its own"),
        (CPU, False, "no c++", "linux", "they cannot be compiled here: no c++"),
        (CPU, False, "", "darwin", "they were tried on Linux only; --kernels on tries them here"),
        (CPU, False, "", "win32", "they were tried on Linux only; --kernels on tries them here"),
    ],
)
def test_without_kernels_the_choice_gives_a_reason(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    compiling: bool,
    problem: str,
    platform: str,
    reason: str,
) -> None:
    fake_kernels(monkeypatch, problem=problem, platform=platform)
    assert choose_kernels("auto", device, compiling) == (False, reason)
    assert choose_kernels("off", device, compiling) == (False, "asked for")
    if "--kernels on" in reason:
        assert choose_kernels("on", device, compiling).on
    else:
        with pytest.raises(UserError) as caught:
            choose_kernels("on", device, compiling)
        assert str(caught.value) == f"kernels is 'on', but {reason}: give --kernels auto"


def test_kernels_that_are_off_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> Kernels:
        raise AssertionError("compiled")

    monkeypatch.setattr(speed, "load_kernels", load)
    assert not choose_kernels("off", CPU, compiling=False).on
    assert not choose_kernels("auto", CUDA, compiling=False).on
    assert not choose_kernels("auto", CPU, compiling=True).on


# --- attention


def shape(**changes: Any) -> GPT2Config:
    return SMALL.replace(**{"d_model": 64, "n_head": 2, "dropout": 0.0} | changes)


@pytest.mark.parametrize(
    ("device", "kernels", "changes", "backend"),
    [
        (CUDA, False, {}, "sdpa"),
        (MPS, False, {"dropout": 0.1}, "sdpa"),
        (CPU, True, {}, "native"),
        (CPU, True, {"dropout": 0.1, "block_size": 4096}, "native"),
        (CPU, True, {"n_head": 8}, "matmul"),  # heads of 8 do not fill vectors of 16
        (CPU, True, {"n_head": 8, "block_size": 1024}, "sdpa"),
        (CPU, False, {}, "matmul"),
        (CPU, False, {"block_size": 1023}, "matmul"),
        (CPU, False, {"block_size": 1024}, "sdpa"),
        (CPU, False, {"block_size": 1024, "dropout": 0.1}, "matmul"),  # sdpa cannot drop on a CPU
    ],
)
def test_auto_chooses_the_attention_measured_as_fastest(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    kernels: bool,
    changes: dict[str, Any],
    backend: str,
) -> None:
    fake_kernels(monkeypatch)
    choice = choose_attention("auto", shape(**changes), device, kernels=kernels)
    assert choice.backend == backend
    assert "fused" in choice.reason if device != CPU else "fastest" in choice.reason
    for requested in ("matmul", "sdpa"):
        forced = choose_attention(requested, shape(**changes), device, kernels=kernels)
        assert forced == (requested, "asked for")
    if backend == "native":
        forced = choose_attention("native", shape(**changes), device, kernels=kernels)
        assert forced == ("native", "asked for")
        return
    head_size = 64 // changes.get("n_head", 2)
    why = f"do not take heads of {head_size}" if kernels else "are off"
    with pytest.raises(UserError) as caught:
        choose_attention("native", shape(**changes), device, kernels=kernels)
    assert (
        str(caught.value) == f"attention is 'native', and the kernels {why}: give --attention auto"
    )


def test_native_attention_needs_heads_of_whole_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for lanes, backend in ((16, "matmul"), (8, "native"), (4, "native")):
        fake_kernels(monkeypatch, lanes=lanes)
        choice = choose_attention("auto", shape(d_model=48, n_head=2), CPU, kernels=True)
        assert choice.backend == backend


def test_every_layer_gets_the_backend() -> None:
    model = GPT2(SMALL.replace(vocab_size=11))
    set_attention(model, "sdpa")
    layers = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]
    assert [layer.backend for layer in layers] == ["sdpa"] * SMALL.n_layer


# --- memory


def test_glibc_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    keep_memory()
    assert dict(calls) == {-3: 1 << 30, -1: (1 << 31) - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: SimpleNamespace())  # musl has no mallopt
    keep_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: calls.clear())
    keep_memory()
    assert calls


# --- before the first step


def trainer_for(
    text_file: Path, out: Path, model: GPT2Config = SMALL, **setting: Any
) -> tuple[Trainer, list[str]]:
    """Return a trainer that was not accelerated yet, and a list for the lines of `accelerate`."""
    plain = SpeedChoices(kernels="off", attention="matmul", compiled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chargpt.training.plan, "accelerate", lambda trainer, report: plain)
        plan = make_plan(
            [str(text_file)],
            model_config=model.replace(dropout=0.0),
            train_config=QUICK.replace(**setting),
            data_config=DataConfig(),
            out=out,
            resuming=False,
        )
    return plan.trainer, []


def is_fast(model: GPT2) -> bool:
    kinds = {type(module) for module in model.modules()}
    assert kinds.isdisjoint(FAST) or kinds.isdisjoint(FAST.values())
    return kinds.isdisjoint(FAST)


@pytest.mark.parametrize("kernels", ["off", pytest.param("auto", marks=needs_compiler)])
def test_accelerate_reports_three_choices(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    wide = SMALL.replace(d_model=32)
    trainer, lines = trainer_for(text_file, tmp_path, wide, kernels=kernels)
    on = kernels == "auto"
    accelerate(trainer, lines.append)
    assert [line[:11] for line in lines] == ["kernels    ", "attention  ", "compile    "]
    assert lines[0].startswith("kernels    on (compiled" if on else "kernels    off (asked for)")
    assert lines[1].startswith(f"attention  {'native' if on else 'matmul'} (the fastest")
    assert lines[2].startswith("compile    off (takes longer")
    assert is_fast(trainer.model) == on
    layers = {type(m) for m in trainer.model.modules() if isinstance(m, CausalSelfAttention)}
    assert layers == {FastCausalSelfAttention if on else CausalSelfAttention}
    assert trainer.forward is trainer.model


def test_the_seconds_of_preparation_count_as_training(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run adds them to the seconds so far."""
    trainer, lines = trainer_for(text_file, tmp_path, kernels="off")
    trainer.state.train_seconds, trainer.state.compile_seconds = 100.0, 7.0
    times = iter([50.0, 53.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    accelerate(trainer, lines.append)
    assert trainer.state.compile_seconds == 10.5
    assert trainer.state.train_seconds == 103.5


def test_a_model_trains_without_kernels_if_they_do_not_compile(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = trainer_for(text_file, tmp_path / "a")
    plain, _ = trainer_for(text_file, tmp_path / "b", kernels="off")
    fake_kernels(monkeypatch, problem="no c++")
    accelerate(trainer, lines.append)
    accelerate(plain, lines.append)
    assert lines[0] == "kernels    off (they cannot be compiled here: no c++)"
    assert lines[1].startswith("attention  matmul")
    assert not is_fast(trainer.model)
    assert train_step(trainer) == train_step(plain)


def test_requested_kernels_that_fail_are_an_error(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = trainer_for(text_file, tmp_path, kernels="on")
    fake_kernels(monkeypatch, problem="no c++")
    with pytest.raises(UserError, match="kernels is 'on', but they cannot be compiled here: no c"):
        accelerate(trainer, lines.append)
    trainer, lines = trainer_for(text_file, tmp_path, kernels="on", compile="on")
    with pytest.raises(UserError, match=r"kernels is 'on', but torch\.compile makes its own"):
        accelerate(trainer, lines.append)
    assert lines == []


def test_a_compiled_model_replaces_forward(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One trial step, which changes nothing, on plain layers, which torch.compile fuses itself."""
    calls: list[torch.Tensor] = []

    def compiled(model: GPT2) -> Any:
        def forward(ids: torch.Tensor) -> torch.Tensor:
            calls.append(ids)
            return model(ids)

        return forward

    trainer, lines = trainer_for(text_file, tmp_path, compile="on")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(torch, "compile", compiled)
    accelerate(trainer, lines.append)
    assert lines[0] == "kernels    off (torch.compile makes its own)"
    assert lines[2] == "compile    on (asked for)"
    assert len(calls) == 1
    assert not is_fast(trainer.model)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert trainer.state.step == 0
    train_step(trainer)
    assert len(calls) == 2


def test_out_of_memory_in_the_trial_step_is_raised(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(model: GPT2) -> Any:
        def forward(ids: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

        return forward

    trainer, lines = trainer_for(text_file, tmp_path, compile="on")
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(trainer, lines.append)


def test_several_gpus_are_not_compiled(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = trainer_for(text_file, tmp_path, compile="on", kernels="off")
    trainer.parallel = ParallelChoice([0, 1], "two GPUs")
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("compiled"))
    accelerate(trainer, lines.append)
    assert lines[2] == "compile    off (not over several GPUs in one process)"
