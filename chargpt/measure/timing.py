"""Measurements of `chargpt bench`: seconds per step and per part of a step, FLOP/s, bytes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

from chargpt.compute.device import matmul_flops, synchronize
from chargpt.train import PARTS, train_step
from chargpt.training.trainer import Trainer

WARM_UP_STEPS, MIN_STEPS = 2, 3
PART_STEPS = 10
CEILING_SECONDS = 0.3


def seconds_of(job: Callable[[], object], device: torch.device) -> float:
    """Return how long a job takes on a device."""
    synchronize(device)
    start = time.perf_counter()
    job()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(step: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Return the median seconds of a step, after a warm-up.

    The measurement takes about `seconds`, and at least `MIN_STEPS` steps.
    """
    for _ in range(WARM_UP_STEPS):
        step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MIN_STEPS or time.perf_counter() < end:
        times.append(seconds_of(step, device))
    return statistics.median(times)


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Return the best speed of products of square matrices, in FLOP/s.

    They are 1024³ on a CPU, 4096³ and 8192³ elsewhere.
    """
    sizes = (1024,) if device.type == "cpu" else (4096, 8192)
    return max(matmul_flops(dtype, device, (n, n, n), CEILING_SECONDS) for n in sizes)


def forget_peak_memory(device: torch.device) -> None:
    """Reset `peak_memory_bytes`, which is possible on CUDA only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process, in bytes: on the GPU, or else in total.

    Returns:
        None where the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# --- the parts of a step


def step_parts(trainer: Trainer) -> dict[str, float]:
    """Return the median milliseconds of each of `PARTS`, over ten steps."""
    trainer.model.train()
    rows: list[dict[str, float]] = []
    for _ in range(PART_STEPS):
        watch = _Stopwatch(trainer.device)
        train_step(trainer, watch.lap)
        rows.append(watch.milliseconds)
        trainer.state.step += 1
    return {part: statistics.median(row[part] for row in rows) for part in PARTS}


class _Stopwatch:
    def __init__(self, device: torch.device) -> None:
        self.milliseconds = dict.fromkeys(PARTS, 0.0)
        self._device = device
        synchronize(device)
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Add the time since the last call to a part."""
        synchronize(self._device)
        now = time.perf_counter()
        self.milliseconds[part] += 1000 * (now - self._last)
        self._last = now
