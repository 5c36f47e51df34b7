"""What `--deterministic` costs: the time of a step with it, as a ratio to the time without.

    python benchmarks/deterministic.py [--presets tiny baby] [--rounds 5]

Both take turns in one process; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

from chargpt.compute.device import deterministic_algorithms
from chargpt.config import PRESETS, Preset
from chargpt.measure.bench import synthetic_trainer
from chargpt.measure.timing import synchronize
from chargpt.train import train_step
from chargpt.training.trainer import Trainer


def main() -> None:
    """Measure and print a line for each preset, with the kernels and without."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["tiny"], choices=PRESETS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    given = parser.parse_args()
    for name in given.presets:
        for kernels in ("auto", "off"):
            preset = PRESETS[name]()
            preset = replace(preset, train=preset.train_config.replace(kernels=kernels))
            ratios = measure(preset, given.rounds, given.seconds)
            print(
                f"{name:6} kernels {kernels:4}  {statistics.median(ratios):.3f} times a step "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )


def measure(preset: Preset, rounds: int, seconds: float) -> list[float]:
    """Return for each round how much longer a deterministic step takes."""
    trainer = synthetic_trainer(preset.model_config, preset.train_config)
    trainer.model.train()
    turn(trainer, seconds, wanted=False)  # to warm up
    return [
        turn(trainer, seconds, wanted=True) / turn(trainer, seconds, wanted=False)
        for _ in range(rounds)
    ]


def turn(trainer: Trainer, seconds: float, *, wanted: bool) -> float:
    """Return the seconds of a step, the mean over a turn of at least two."""
    n_steps, start = 0, time.perf_counter()
    with deterministic_algorithms(wanted):
        while n_steps < 2 or time.perf_counter() - start < seconds:
            train_step(trainer)
            n_steps += 1
        synchronize(trainer.device)
    return (time.perf_counter() - start) / n_steps


if __name__ == "__main__":
    main()
