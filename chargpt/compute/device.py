"""What this machine offers. Each automatic choice is made once and gives its reason in one line."""

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

BF16_MIN_GAIN = 1.5  # bf16 rounds more, so it must be clearly faster
UNSUPPORTED = {
    ("fp16", "cpu"): "is many times slower than fp32 on a CPU: give --precision auto, fp32 or bf16",
    ("fp16", "mps"): "needs loss scaling, available on CUDA only: give --precision fp32",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceChoice(NamedTuple):
    """Where to compute."""

    device: torch.device
    reason: str


class PrecisionChoice(NamedTuple):
    """The precision of matrix products; the weights stay fp32."""

    name: Literal["fp32", "bf16", "fp16"]
    reason: str

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context for a forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(device.type, dtype=DTYPES[self.name])


class CompileChoice(NamedTuple):
    """Whether to compile the model."""

    on: bool
    reason: str


def choose_device(requested: Device) -> DeviceChoice:
    """Return the device to use.

    Raises:
        UserError: PyTorch does not find the requested device.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    available = [*(name for name in found if found[name]), "cpu"]
    if requested == "auto":
        return DeviceChoice(torch.device(available[0]), "the fastest one here")
    if requested not in available:
        raise UserError(
            f"device is {requested!r}, which PyTorch does not find here: "
            f"give --device auto, or one of {', '.join(available)}"
        )
    return DeviceChoice(torch.device(requested), "asked for")


def choose_precision(
    requested: Precision, device: torch.device, bf16_gain: float | None = None
) -> PrecisionChoice:
    """Return the precision to train in.

    `bf16_gain` is how many times as fast as fp32 a CPU computes in bf16; None: measure PyTorch.

    Raises:
        UserError: fp16 on a CPU or an Apple GPU, or bf16 on a GPU without it.
    """
    if requested == "auto":
        return _auto_precision(device, bf16_gain)
    problem = UNSUPPORTED.get((requested, device.type))
    if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        problem = "this GPU does not support: give --precision fp16 or fp32"
    if problem:
        raise UserError(f"precision is {requested!r}, which {problem}")
    return PrecisionChoice(requested, "asked for")


def choose_compile(requested: OnOffAuto, device: torch.device) -> CompileChoice:
    """Return whether to try to compile the model; the first step shows whether it works."""
    if requested != "auto":
        return CompileChoice(requested == "on", "asked for")
    if device.type == "cuda":
        if shutil.which("cc") or shutil.which("gcc") or shutil.which("clang"):
            return CompileChoice(True, "the default on a GPU")
        return CompileChoice(False, "no C compiler found")
    return CompileChoice(False, "takes longer than it saves here; --compile on forces it")


def _auto_precision(device: torch.device, gain: float | None) -> PrecisionChoice:
    if device.type == "mps":
        return PrecisionChoice("fp32", "the safe choice on Apple GPUs")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return PrecisionChoice("bf16", "this GPU has bf16 tensor cores")
        return PrecisionChoice("fp16", "this GPU has no fast bf16; the loss is scaled")
    if gain is None:
        size, seconds = (1024, 512, 512), 0.1
        bf16 = matmul_flops(torch.bfloat16, device, size, seconds)
        gain = bf16 / matmul_flops(torch.float32, device, size, seconds)
    if gain >= BF16_MIN_GAIN:
        return PrecisionChoice("bf16", f"bf16 is {gain:.1f} times as fast as fp32 here")
    if gain == 0:
        return PrecisionChoice("fp32", "the kernels do not multiply bf16 on this processor")
    reason = f"fp32 is faster here: bf16 runs at {max(gain, 0.01):.0%} of its speed"
    if gain >= 1:
        reason = f"bf16 is only {gain:.1f} times as fast here, and less exact"
    return PrecisionChoice("fp32", reason)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def matmul_flops(
    dtype: torch.dtype, device: torch.device, size: tuple[int, int, int], seconds: float
) -> float:
    """Return the highest FLOP/s of a matrix product; torch's default generators stay as they are.

    Args:
        dtype: type of both factors.
        device: where to multiply.
        size: (m, k, n) for the product of (m, k) and (k, n).
        seconds: how long to measure; at least three products are timed.
    """
    m, k, n = size
    # Random factors, because a GPU multiplies constant ones faster.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(m, k, device=device, generator=generator).to(dtype)
    b = torch.randn(k, n, device=device, generator=generator).to(dtype)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 4 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        _ = a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * m * k * n / min(times[1:])


def describe_device(device: torch.device) -> str:
    """Return the device in words, such as "cpu, 2 threads" or a GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"cpu, {threads} thread{'s' if threads > 1 else ''}"
    return device.type


def cpu_name() -> str:
    """Return the processor's name, or its architecture if the system does not give a name."""
    names = cpu_info("model name")
    return names[0] if names else platform.processor() or platform.machine()


def cpu_info(field: str) -> list[str]:
    """Return the distinct values of a field of Linux's /proc/cpuinfo; elsewhere an empty list."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    fields = (line.partition(":") for line in lines)
    values = (value.strip() for name, _, value in fields if name.strip() == field)
    return [value for value in dict.fromkeys(values) if value]


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """If enabled, let PyTorch use only algorithms whose results are bit-reproducible.

    Raises:
        UserError: an operation has no such algorithm here.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it on first use
    before = torch.are_deterministic_algorithms_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # our kernels read no uninitialised memory
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
