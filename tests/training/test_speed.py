"""Kernels, attention backend, compilation: each choice, its reason, and its fallback."""

import sys
from collections.abc import Callable
from functools import partial
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
from chargpt.compute.fast_layers import FAST, FastCausalSelfAttention
from chargpt.compute.library import KernelsError, get_library
from chargpt.compute.parallel import ParallelChoice
from chargpt.compute.step import FastAdamW
from chargpt.config import DataConfig, OnOffAuto
from chargpt.model import GPT2, CausalSelfAttention
from chargpt.train import train_step
from chargpt.training import speed
from chargpt.training.plan import make_plan
from chargpt.training.speed import (
    SpeedChoices,
    accelerate,
    bf16_gain,
    choose_attention,
    choose_kernels,
    keep_memory,
)
from chargpt.training.trainer import Trainer

needs_compiler = pytest.mark.skipif(not COMPILERS, reason="no C++ compiler here")
NOT_PREBUILT = "none are prebuilt in this installation; --kernels on compiles them"
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def fake_kernels(patch: pytest.MonkeyPatch, *, problem: str = "", platform: str = "linux") -> None:
    """Fake kernels for fp32, or kernels that do not compile because of `problem`."""

    def load() -> Any:
        if problem:
            raise KernelsError(problem)
        return SimpleNamespace(dtypes={torch.float32})

    library = SimpleNamespace(how="faked", name="fake-0", variant=SimpleNamespace(name="avx2"))
    for module in (speed, native):
        patch.setattr(module, "load_kernels", load)
    patch.setattr(speed, "get_library", lambda: library)
    patch.setattr(sys, "platform", platform)


# --- kernels


def choose(setting: OnOffAuto, device: torch.device, compiling: bool, **changes: Any) -> Any:
    dtype = changes.pop("dtype", torch.float32)
    config = SMALL.replace(**changes)
    return choose_kernels(setting, config, dtype, device, compiling=compiling)


def test_kernels_are_used_if_they_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_kernels(monkeypatch)
    assert choose("auto", CPU, False).on
    assert choose("on", CPU, False).on


@pytest.mark.parametrize(
    ("device", "compiling", "problem", "platform", "reason"),
    [
        (MPS, False, "", "darwin", "they are for CPUs, and this is mps"),
        (CUDA, True, "", "linux", "they are for CPUs, and this is cuda"),
        (CPU, True, "", "linux", "torch.compile makes its own"),
        (CPU, False, "no c++", "linux", "they do not work here: no c++"),
        *((CPU, False, "", system, NOT_PREBUILT) for system in ("darwin", "win32")),
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
    assert choose("auto", device, compiling) == (False, reason)
    assert choose("off", device, compiling) == (False, "asked for")
    if "--kernels on" in reason:
        assert choose("on", device, compiling).on
    else:
        with pytest.raises(UserError) as caught:
            choose("on", device, compiling)
        assert str(caught.value) == f"kernels is 'on', but {reason}: give --kernels auto"


def test_kernels_that_are_off_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "load_kernels", lambda: pytest.fail("compiled"))
    assert not choose("off", CPU, False).on
    assert not choose("auto", CUDA, False).on
    assert not choose("auto", CPU, True).on


@pytest.mark.parametrize(
    ("changes", "reason", "on_works"),
    [
        ({"dtype": torch.bfloat16}, "the avx2 kernels have no bfloat16", False),
        ({"d_model": 40}, "d_model is 40, and they take multiples of 16", False),
        ({"d_ff": 100}, "d_ff is 100, and they take multiples of 16", False),
        ({"d_model": 768}, "PyTorch's layers are faster in fp32 for a d_model above 448", True),
    ],
)
def test_kernels_that_would_not_be_used_or_lose_are_off(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], reason: str, on_works: bool
) -> None:
    fake_kernels(monkeypatch)
    assert choose("auto", CPU, False, **changes) == (False, reason)
    if on_works:
        assert choose("on", CPU, False, **changes).on
    else:
        with pytest.raises(UserError, match=f"kernels is 'on', but {reason}: give --kernels auto"):
            choose("on", CPU, False, **changes)


@needs_compiler
@pytest.mark.parametrize("changes", [{"kernels": "off"}, {"compile": "on"}])
def test_the_gain_of_bf16_is_the_kernels_only_where_they_are_used(changes: dict[str, Any]) -> None:
    gain = bf16_gain(QUICK, SMALL, CPU)
    assert gain is not None and gain >= 0
    assert (gain > 0) == (torch.bfloat16 in native.load_kernels().dtypes)
    assert bf16_gain(QUICK.replace(**changes), SMALL, CPU) is None
    assert bf16_gain(QUICK, SMALL, CUDA) is None
    assert bf16_gain(QUICK, SMALL.replace(d_model=40), CPU) is None


# --- attention


@pytest.mark.parametrize(
    ("device", "kernels", "changes", "backend"),
    [
        (CUDA, False, {}, "sdpa"),
        (MPS, False, {"dropout": 0.1}, "sdpa"),
        (CPU, True, {}, "native"),
        (CPU, True, {"dropout": 0.1, "block_size": 4096}, "native"),
        (CPU, True, {"n_head": 8}, "matmul"),  # heads of 8 do not fill vectors of 16
        (CPU, True, {"n_head": 8, "block_size": 1024}, "sdpa"),
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
    model_config = SMALL.replace(**{"d_model": 64, "n_head": 2, "dropout": 0.0} | changes)
    choose = partial(choose_attention, model_config=model_config, device=device, kernels=kernels)
    assert choose("auto").backend == backend
    for requested in ("matmul", "sdpa", *(["native"] if backend == "native" else [])):
        assert choose(requested) == (requested, "asked for")
    if backend != "native":
        why = f"do not take heads of {64 // model_config.n_head}" if kernels else "are off"
        with pytest.raises(UserError, match=f"and the kernels {why}: give --attention auto$"):
            choose("native")


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


Make = Callable[..., tuple[Trainer, list[str]]]


@pytest.fixture
def make(text_file: Path, tmp_path: Path) -> Make:
    """Make a trainer that is not accelerated yet, and a list for the lines of `accelerate`.

    The arguments are fields of TrainConfig.
    """

    def trainer_with(**changes: Any) -> tuple[Trainer, list[str]]:
        configs = {"train_config": QUICK.replace(**changes), "data_config": DataConfig()}
        configs["model_config"] = SMALL.replace(dropout=0.0, d_model=32)
        plain = SpeedChoices(kernels="off", attention="matmul", compiled=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chargpt.training.plan, "accelerate", lambda trainer, report: plain)
            plan = make_plan([str(text_file)], **configs, out=tmp_path, resuming=False)
        return plan.trainer, []

    return trainer_with


def fake_compile(patch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> None:
    """Fake torch.compile: the compiled model calls `forward` with the model and the ids."""
    patch.setattr(torch, "compile", lambda model: partial(forward, model))


def is_fast(model: GPT2) -> bool:
    kinds = {type(module) for module in model.modules()}
    assert kinds.isdisjoint(FAST) or kinds.isdisjoint(FAST.values())
    return kinds.isdisjoint(FAST)


@pytest.mark.parametrize("kernels", ["off", pytest.param("auto", marks=needs_compiler)])
def test_accelerate_reports_three_choices(
    make: Make, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    trainer, lines = make(kernels=kernels)
    on = kernels == "auto"
    choices = accelerate(trainer, lines.append)
    assert [line[:11] for line in lines] == ["kernels    ", "attention  ", "compile    "]
    how = f"on ({get_library().how})" if on else "off (asked for)"
    assert lines[0] == f"kernels    {how}"
    assert choices.kernels == (get_library().name if on else "off")
    assert lines[1].startswith(f"attention  {'native' if on else 'matmul'} (the fastest")
    assert lines[2].startswith("compile    off (takes longer")
    assert is_fast(trainer.model) == on
    assert isinstance(trainer.optimizer, FastAdamW) == on
    layers = {type(m) for m in trainer.model.modules() if isinstance(m, CausalSelfAttention)}
    assert layers == {FastCausalSelfAttention if on else CausalSelfAttention}
    assert trainer.forward is trainer.model


def test_the_seconds_of_preparation_count_as_training(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run adds them to the seconds so far."""
    trainer, lines = make(kernels="off")
    trainer.state.train_seconds, trainer.state.compile_seconds = 100.0, 7.0
    times = iter([50.0, 53.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    accelerate(trainer, lines.append)
    assert trainer.state.compile_seconds == 10.5
    assert trainer.state.train_seconds == 103.5


def test_a_model_trains_without_kernels_if_they_do_not_compile(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = make()
    plain, _ = make(kernels="off")
    fake_kernels(monkeypatch, problem="no c++")
    accelerate(trainer, lines.append)
    accelerate(plain, lines.append)
    assert lines[0] == "kernels    off (they do not work here: no c++)"
    assert lines[1].startswith("attention  matmul")
    assert not is_fast(trainer.model)
    assert train_step(trainer) == train_step(plain)


def test_requested_kernels_that_fail_are_an_error(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, lines = make(kernels="on")
    fake_kernels(monkeypatch, problem="no c++")
    with pytest.raises(UserError, match="kernels is 'on', but they do not work here: no c"):
        accelerate(trainer, lines.append)
    assert lines == []


def test_a_compiled_model_replaces_forward(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trial step, which changes nothing, on plain layers, which torch.compile fuses itself."""
    calls: list[torch.Tensor] = []

    def forward(model: GPT2, ids: torch.Tensor) -> torch.Tensor:
        calls.append(ids)
        return model(ids)

    trainer, lines = make(compile="on")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    fake_compile(monkeypatch, forward)
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
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(model: GPT2, ids: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

    trainer, lines = make(compile="on")
    fake_compile(monkeypatch, forward)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(trainer, lines.append)


def test_several_gpus_are_not_compiled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, lines = make(compile="on", kernels="off")
    trainer.parallel = ParallelChoice("dp", "two GPUs", 2)
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("compiled"))
    monkeypatch.setattr(torch.nn, "DataParallel", lambda module, device_ids: module)
    accelerate(trainer, lines.append)
    assert lines[2] == "compile    off (not over several GPUs in one process)"
