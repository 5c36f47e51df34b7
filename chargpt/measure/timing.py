"""Measurements of `chargpt bench`: seconds per step and per part of a step, FLOP/s, bytes."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise

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
    """Return the median of at least `MIN_STEPS` steps in about `seconds`, after a warm-up."""
    for _ in range(WARM_UP_STEPS):
        step()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < MIN_STEPS or time.perf_counter() < end:
        times.append(seconds_of(step, device))
    return statistics.median(times)


def own_step(
    trainer: Trainer, lap: Callable[[str], None] = lambda part: None
) -> Callable[[], None]:
    """Return a function that trains for one step, as `chargpt train` does."""
    trainer.model.train()

    def step() -> None:
        train_step(trainer, lap)
        trainer.state.step += 1

    return step


def ceiling(dtype: torch.dtype, device: torch.device) -> float:
    """Return the best FLOP/s of n × n matrix products: n is 1024 on a CPU, else 4096 or 8192."""
    sizes = (1024,) if device.type == "cpu" else (4096, 8192)
    return max(matmul_flops(dtype, device, (n, n, n), CEILING_SECONDS) for n in sizes)


def peak_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of this process: on the GPU, or else in total; None: not reported."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def step_parts(trainer: Trainer) -> dict[str, float]:
    """Return the median milliseconds of each of `PARTS`, over ten steps."""
    marks: list[tuple[str, float]] = []

    def lap(part: str) -> None:
        synchronize(trainer.device)
        marks.append((part, time.perf_counter()))

    step = own_step(trainer, lap)
    rows: list[dict[str, float]] = []
    for _ in range(PART_STEPS):
        marks.clear()
        lap("start")
        step()
        rows.append(dict.fromkeys(PARTS, 0.0))
        for (_, start), (part, end) in pairwise(marks):
            rows[-1][part] += 1000 * (end - start)
    return {part: statistics.median(row[part] for row in rows) for part in PARTS}
