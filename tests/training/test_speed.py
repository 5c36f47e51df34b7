"""Which kernels, which attention, compiled or not: each choice, its reason, its way back."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import platformdirs
import pytest
import torch
from conftest import QUICK, SMALL

import chargpt.training.plan
from chargpt.base.errors import UserError
from chargpt.compute import native
from chargpt.compute.fast_layers import FAST, FastCausalSelfAttention, set_attention
from chargpt.compute.native import Kernels, KernelsError, library_path
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

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler here"
)
CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
# What `Kernels` needs at the least: a library that is compiled in a moment.
TINY_SOURCE = 'extern "C" __attribute__((visibility("default"))) int chargpt_lanes() { return 12; }'


def offer(
    patch: pytest.MonkeyPatch, *, lanes: int = 16, problem: str = "", platform: str = "linux"
) -> None:
    """Pretend that the kernels compile with vectors of `lanes`, or do not because of `problem`."""

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
    offer(monkeypatch)
    for wish in ("auto", "on"):
        choice = choose_kernels(wish, CPU, compiling=False)
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
def test_where_there_are_no_kernels_the_reason_is_said(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    compiling: bool,
    problem: str,
    platform: str,
    reason: str,
) -> None:
    offer(monkeypatch, problem=problem, platform=platform)
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
        raise AssertionError("compiled in vain")

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
        (CPU, True, {"n_head": 8}, "matmul"),  # heads of 8 are no whole vectors of 16
        (CPU, True, {"n_head": 8, "block_size": 1024}, "sdpa"),
        (CPU, False, {}, "matmul"),
        (CPU, False, {"block_size": 1023}, "matmul"),
        (CPU, False, {"block_size": 1024}, "sdpa"),
        (CPU, False, {"block_size": 1024, "dropout": 0.1}, "matmul"),  # sdpa cannot drop on a CPU
    ],
)
def test_attention_is_what_was_measured_fastest(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    kernels: bool,
    changes: dict[str, Any],
    backend: str,
) -> None:
    offer(monkeypatch)
    choice = choose_attention("auto", shape(**changes), device, kernels=kernels)
    assert choice.backend == backend
    assert "fused" in choice.reason if device != CPU else "fastest" in choice.reason
    for wish in ("matmul", "sdpa"):
        forced = choose_attention(wish, shape(**changes), device, kernels=kernels)
        assert forced == (wish, "asked for")
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


def test_heads_are_measured_by_the_vectors_of_this_processor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for lanes, backend in ((16, "matmul"), (8, "native"), (4, "native")):
        offer(monkeypatch, lanes=lanes)
        choice = choose_attention("auto", shape(d_model=48, n_head=2), CPU, kernels=True)
        assert choice.backend == backend


def test_every_layer_gets_the_backend() -> None:
    model = GPT2(SMALL.replace(vocab_size=11))
    set_attention(model, "sdpa")
    layers = [m for m in model.modules() if isinstance(m, CausalSelfAttention)]
    assert [layer.backend for layer in layers] == ["sdpa"] * SMALL.n_layer


# --- memory


def test_memory_is_kept_where_the_c_library_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *arguments: told.append(arguments))
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(sys, "platform", "linux")
    keep_memory()
    assert dict(told) == {-3: 1 << 30, -1: (1 << 31) - 1}  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: SimpleNamespace())  # musl has no mallopt
    keep_memory()
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(speed.ctypes, "CDLL", lambda _: told.clear())
    keep_memory()
    assert told


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
def test_three_lines_say_how_a_model_computes(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    wide = SMALL.replace(d_model=32)
    trainer, said = trainer_for(text_file, tmp_path, wide, kernels=kernels)
    on = kernels == "auto"
    accelerate(trainer, said.append)
    assert [line[:11] for line in said] == ["kernels    ", "attention  ", "compile    "]
    assert said[0].startswith("kernels    on (compiled" if on else "kernels    off (asked for)")
    assert said[1].startswith(f"attention  {'native' if on else 'matmul'} (the fastest")
    assert said[2].startswith("compile    off (takes longer")
    assert is_fast(trainer.model) == on
    layers = {type(m) for m in trainer.model.modules() if isinstance(m, CausalSelfAttention)}
    assert layers == {FastCausalSelfAttention if on else CausalSelfAttention}
    assert trainer.forward is trainer.model


def test_the_seconds_of_preparation_are_a_part_of_training(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when a run is resumed: they come on top of what was spent before."""
    trainer, said = trainer_for(text_file, tmp_path, kernels="off")
    trainer.state.train_seconds, trainer.state.compile_seconds = 100.0, 7.0
    times = iter([50.0, 53.5])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(times))
    accelerate(trainer, said.append)
    assert trainer.state.compile_seconds == 10.5
    assert trainer.state.train_seconds == 103.5


def test_kernels_that_fail_leave_a_model_that_learns(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, said = trainer_for(text_file, tmp_path / "a")
    twin, _ = trainer_for(text_file, tmp_path / "b", kernels="off")
    offer(monkeypatch, problem="no c++")
    accelerate(trainer, said.append)
    accelerate(twin, said.append)
    assert said[0] == "kernels    off (they cannot be compiled here: no c++)"
    assert said[1].startswith("attention  matmul")
    assert not is_fast(trainer.model)
    assert train_step(trainer) == train_step(twin)


def test_kernels_that_were_asked_for_and_fail_are_an_error(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, said = trainer_for(text_file, tmp_path, kernels="on")
    offer(monkeypatch, problem="no c++")
    with pytest.raises(UserError, match="kernels is 'on', but they cannot be compiled here: no c"):
        accelerate(trainer, said.append)
    trainer, said = trainer_for(text_file, tmp_path, kernels="on", compile="on")
    with pytest.raises(UserError, match=r"kernels is 'on', but torch\.compile makes its own"):
        accelerate(trainer, said.append)
    assert said == []


def test_a_model_that_compiles_is_called_compiled(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried once, with nothing changed by the trial; on plain layers, which it fuses itself."""
    calls: list[torch.Tensor] = []

    def compiled(model: GPT2) -> Any:
        def forward(ids: torch.Tensor) -> torch.Tensor:
            calls.append(ids)
            return model(ids)

        return forward

    trainer, said = trainer_for(text_file, tmp_path, compile="on")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    monkeypatch.setattr(torch, "compile", compiled)
    accelerate(trainer, said.append)
    assert said[0] == "kernels    off (torch.compile makes its own)"
    assert said[2] == "compile    on (asked for)"
    assert len(calls) == 1
    assert not is_fast(trainer.model)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None
    assert trainer.state.step == 0
    train_step(trainer)
    assert len(calls) == 2


def test_a_trial_that_runs_out_of_memory_is_no_failure_of_the_compiler(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(model: GPT2) -> Any:
        def forward(ids: torch.Tensor) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")

        return forward

    trainer, said = trainer_for(text_file, tmp_path, compile="on")
    monkeypatch.setattr(torch, "compile", compiled)
    with pytest.raises(torch.OutOfMemoryError):
        accelerate(trainer, said.append)


def test_several_gpus_are_not_compiled(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, said = trainer_for(text_file, tmp_path, compile="on", kernels="off")
    trainer.parallel = ParallelChoice([0, 1], "two GPUs")
    monkeypatch.setattr(torch, "compile", lambda _: pytest.fail("compiled"))
    accelerate(trainer, said.append)
    assert said[2] == "compile    off (not over several GPUs in one process)"


# --- the library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a small source to be compiled into it."""
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(tmp_path / "cache" / name))
    source = tmp_path / "kernels.cpp"
    source.write_text(TINY_SOURCE)
    monkeypatch.setattr(native, "SOURCES", (source,))
    return tmp_path / "cache"


load_afresh = native.load_kernels.__wrapped__  # what is cached for the process stays as it is


def test_a_library_is_for_one_source_compiler_call_and_processor(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [library_path()]
    assert library_path() == paths[0]
    assert paths[0].is_relative_to(cache / "chargpt" / "kernels")
    assert paths[0].suffix == ".so"
    native.SOURCES[0].write_text(TINY_SOURCE + "\n// changed")
    paths.append(library_path())
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    paths.append(library_path())
    monkeypatch.setattr(native, "_processor", lambda: "another")
    paths.append(library_path())
    assert len(set(paths)) == 4
    assert not cache.exists()  # asking makes nothing


def test_a_processor_is_told_by_what_it_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def cpuinfo(text: str) -> str:
        monkeypatch.setattr(Path, "read_text", lambda _: text)
        return native._processor()

    one = "processor : 0\nmodel name : A\ncpu MHz : 2000\nflags : avx2 fma\n"
    two = "processor : 1\nmodel name : A\ncpu MHz : 1900\nflags : avx2 fma\n"
    assert cpuinfo(one) == cpuinfo(one + two) == cpuinfo(two)  # not by its clock of the moment
    assert cpuinfo(one) != cpuinfo(one.replace("fma", "fma avx512f"))
    assert cpuinfo(one) != cpuinfo(one.replace(": A", ": B"))

    def nothing(_: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", nothing)
    assert native._processor() == native.platform.processor()


@needs_compiler
def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_afresh().lanes == 12
    made = library_path().stat()
    monkeypatch.setattr(native, "_compile", lambda _: pytest.fail("compiled again"))
    assert load_afresh().lanes == 12
    assert library_path().stat().st_mtime_ns == made.st_mtime_ns


@needs_compiler
@pytest.mark.parametrize(("source", "path"), [("this is not C++", ""), (TINY_SOURCE, "/nowhere")])
def test_what_does_not_compile_is_one_error_of_one_line(
    cache: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: str
) -> None:
    """A source that is wrong, and a machine without compilers."""
    native.SOURCES[0].write_text(source)
    if path:
        monkeypatch.setenv("PATH", path)
        monkeypatch.delenv("CXX", raising=False)
    for _ in range(2):  # the second time too: what is left of the first is not taken for a library
        with pytest.raises(KernelsError) as caught:
            load_afresh()
        assert 0 < len(str(caught.value)) <= 200
        assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_writable_is_such_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(KernelsError):
        load_afresh()


@needs_compiler
def test_a_library_cut_short_is_made_again(cache: Path) -> None:
    """An empty one here; one with a header and no more ends the process with SIGBUS."""
    library_path().parent.mkdir(parents=True)
    library_path().touch()
    assert load_afresh().lanes == 12


CHILD = """
import sys
from pathlib import Path
import platformdirs
from chargpt.compute import native
platformdirs.user_cache_dir = lambda name: sys.argv[1]
native.SOURCES = (Path(sys.argv[2]),)
print("ready", flush=True)
sys.stdin.readline()
print(native.load_kernels().lanes)
"""


@needs_compiler
def test_two_processes_may_compile_at_once(cache: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(cache), str(native.SOURCES[0])]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:  # both are imported: from here on they race
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    try:
        assert [child.communicate(timeout=120)[0] for child in children] == ["12\n"] * 2
    finally:
        for child in children:
            child.kill()
    assert not list(cache.rglob("lock"))
