"""What this machine offers: each automatic choice is made once, and says why in one line."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from chargpt.base.errors import UserError
from chargpt.config import Device, OnOffAuto, Precision

BF16_MIN_GAIN = 1.5  # bf16 rounds more: it must be clearly faster
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceChoice(NamedTuple):
    """Where to compute."""

    device: torch.device
    reason: str


class PrecisionChoice(NamedTuple):
    """What matrix products are computed in; the weights stay fp32."""

    name: Literal["fp32", "bf16", "fp16"]
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context for a forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=_DTYPES[self.name])


class CompileChoice(NamedTuple):
    """Whether to compile the model."""

    on: bool
    reason: str


def choose_device(wish: Device) -> DeviceChoice:
    """Return the device to use.

    Raises:
        UserError: the device asked for is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wish == "auto":
        name = next(name for name, there in available.items() if there)
        return DeviceChoice(torch.device(name), "the fastest one here")
    if not available[wish]:
        there = ", ".join(name for name, there in available.items() if there)
        raise UserError(
            f"device is {wish!r}, which this PyTorch does not find: give --device auto, or one of "
            f"{there}"
        )
    return DeviceChoice(torch.device(wish), "asked for")


def choose_precision(wish: Precision, device: torch.device) -> PrecisionChoice:
    """Return the precision to train in.

    Raises:
        UserError: fp16 on a CPU, or a precision that the GPU lacks.
    """
    if wish == "auto":
        return _AUTO[device.type](device)
    if wish == "fp16" and device.type == "cpu":
        raise UserError(
            "precision is 'fp16', which CPUs multiply many times slower than fp32: "
            "give --precision auto, fp32 or bf16"
        )
    if wish == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("precision is 'bf16', which this GPU lacks: give --precision fp16 or fp32")
    if wish == "fp16" and device.type == "mps":
        raise UserError(
            "precision is 'fp16', which needs loss scaling, and that is for CUDA only: "
            "give --precision fp32"
        )
    return PrecisionChoice(wish, "asked for")


def choose_compile(wish: OnOffAuto, device: torch.device) -> CompileChoice:
    """Return whether to compile the model; whether it works shows at the first step."""
    if wish != "auto":
        return CompileChoice(wish == "on", "asked for")
    if device.type == "cuda":
        if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
            return CompileChoice(True, "the default on a GPU")
        return CompileChoice(False, "no C compiler here")
    return CompileChoice(False, "takes longer than it saves here; --compile on forces it")


def matmul_rate(dtype: torch.dtype, seconds: float = 0.1) -> float:
    """Measure matrix products of (1024, 512) by (512, 512) on the CPU, in FLOP/s, at best.

    Args:
        dtype: of both factors.
        seconds: how long to measure; at least three products are timed.
    """
    a, b = (torch.ones(n, 512, dtype=dtype) for n in (1024, 512))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        start = time.perf_counter()
        _ = a @ b
        times.append(time.perf_counter() - start)
    return 2 * 1024 * 512 * 512 / min(times[1:])


def _auto_cpu(device: torch.device) -> PrecisionChoice:
    gain = matmul_rate(torch.bfloat16) / matmul_rate(torch.float32)
    how = f"this CPU multiplies bf16 {gain:.1f}× as fast as fp32, measured"
    return PrecisionChoice("bf16" if gain >= BF16_MIN_GAIN else "fp32", how)


def _auto_cuda(device: torch.device) -> PrecisionChoice:
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return PrecisionChoice("bf16", "this GPU has bf16 tensor cores")
    return PrecisionChoice("fp16", "this GPU has no fast bf16; the loss is scaled")


def _auto_mps(device: torch.device) -> PrecisionChoice:
    return PrecisionChoice("fp32", "the safe choice on Apple GPUs")


_AUTO = {"cpu": _auto_cpu, "cuda": _auto_cuda, "mps": _auto_mps}


def describe_device(device: torch.device) -> str:
    """Return the device in words, such as "cpu, 2 threads" or a GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    return device.type


def cpu_name() -> str:
    """Return what the processor calls itself, or else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


# --- determinism


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let PyTorch use only algorithms that give the same bits every time, for a while.

    Args:
        wanted: False does nothing.

    Raises:
        UserError: an operation has no such algorithm here.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when first used
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # no kernel of ours reads what it has not written
    torch.backends.cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        what = str(error).partition(".")[0]
        raise UserError(f"--deterministic does not work here ({what}): leave it out") from error
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
