"""Speed beside other busy programs, as a share of the speed on a quiet machine.

    python benchmarks/busy_neighbour.py [--preset tiny] [--nanogpt CLONE] [--generate]

Trains a preset, or with ``--generate`` writes one text and 32 at a time, beside no, one and three
endless Python loops, on one thread and on all. nanoGPT does the same if ``--nanogpt`` gives a
clone. All take turns in each round. A speed is the median over the rounds; a share is the median of
the rounds' shares. Speeds are means over a turn, because a scheduler's pauses are longer than a
step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from chargpt.base.errors import UserError
from chargpt.compute.device import describe_device
from chargpt.config import PRESETS, Preset
from chargpt.measure.bench import synthetic_trainer
from chargpt.measure.bench_writing import BATCHES, Write, nanogpt_writer, own_writer
from chargpt.measure.contenders import NANOGPT, NANOGPT_SETTLING, OWN, NanoGPT, find_clone
from chargpt.measure.timing import own_step
from chargpt.model import GPT2
from chargpt.training.probe import SYMBOLS
from chargpt.training.trainer import Trainer

NEIGHBOURS = (0, 1, 3)
MIN_STEPS = 3
NANOGPT_MIN_STEPS = 10
CPU = torch.device("cpu")
# It looks for the process that started it, so that it ends even if that one is killed.
BUSY_LOOP = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""

Job = Callable[[], float]
"""Works for one turn; returns characters per second."""


class Row(NamedTuple):
    """The speeds of one job in each round, by number of neighbours."""

    name: str
    threads: int
    rates: dict[int, list[float]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="tiny", choices=PRESETS)
    parser.add_argument("--nanogpt", type=Path, help="folder of a clone; left out without it")
    parser.add_argument("--generate", action="store_true", help="write instead of training")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per turn, at least (3)")
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.seconds <= 0:
        parser.error(f"--rounds {given.rounds}, --seconds {given.seconds}: give positive numbers")
    threads = sorted({1, torch.get_num_threads()})
    print(f"{describe_device(CPU)} of {os.cpu_count()}, preset {given.preset}", flush=True)
    try:
        clone = find_clone([f"nanogpt={given.nanogpt}"] if given.nanogpt else [])
        preset, make = PRESETS[given.preset](), writing_jobs if given.generate else training_jobs
        rows = measure(make(preset, clone, given.seconds), threads, given.rounds)
    except UserError as error:
        parser.error(str(error))
    print(table(rows))


@contextmanager
def neighbours(n: int) -> Iterator[list[int]]:
    """Keep `n` processors busy with endless loops; yield their process ids."""
    command = [sys.executable, "-c", BUSY_LOOP, str(os.getpid())]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(n):
            processes.append(subprocess.Popen(command))
        yield [process.pid for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure(jobs: Mapping[str, Job], threads: Sequence[int], rounds: int) -> list[Row]:
    """Let all jobs take turns, `rounds` times, for each number of threads and neighbours."""
    rows = [Row(name, t, {n: [] for n in NEIGHBOURS}) for name in jobs for t in threads]
    before = torch.get_num_threads()
    try:
        for number in range(1, rounds + 1):
            for n in NEIGHBOURS:
                print(f"round {number} of {rounds}: {n} neighbours", file=sys.stderr)
                with neighbours(n):
                    for row in rows:
                        torch.set_num_threads(row.threads)
                        row.rates[n].append(jobs[row.name]())
    finally:
        torch.set_num_threads(before)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return each job's speed, and its share of the quiet speed, by number of neighbours."""
    quiet, *busy = NEIGHBOURS
    heads = "".join(f"{f'beside {n} loops' if n > 1 else 'beside 1 loop':>22}" for n in busy)
    lines = [f"{'characters/s':<24}{'threads':>8}{'quiet':>12}{heads}"]
    for name, threads, rates in rows:
        line = f"{name:<24}{threads:>8}{statistics.median(rates[quiet]):>12,.0f}"
        for n in busy:
            shares = [b / q for b, q in zip(rates[n], rates[quiet], strict=True)]
            cell = f"{statistics.median(rates[n]):,.0f} ({statistics.median(shares):.0%})"
            line += f"{cell:>22}"
        lines.append(line)
    return "\n".join(lines)


# --- training


def training_jobs(preset: Preset, clone: Path | None, seconds: float) -> dict[str, Job]:
    """Return a turn of training for each contender."""
    training = preset.train_config.replace(device="cpu")
    trainer = synthetic_trainer(preset.model_config, training)
    jobs = {OWN: own_training(trainer, seconds)}
    if clone:
        jobs[NANOGPT] = nanogpt_training(clone, trainer, seconds)
    return jobs


def own_training(trainer: Trainer, seconds: float) -> Job:
    """Return training for `seconds`, and at least `MIN_STEPS`, after a step to warm up."""
    step = own_step(trainer)

    def job() -> float:
        step()
        n_steps, start = 0, time.perf_counter()
        while n_steps < MIN_STEPS or time.perf_counter() - start < seconds:
            step()
            n_steps += 1
        return n_steps * trainer.tokens_per_step / (time.perf_counter() - start)

    return job


def nanogpt_training(clone: Path, trainer: Trainer, seconds: float) -> Job:
    """Return training for as many steps as take `seconds` now, after some to settle."""
    peer = NanoGPT(clone, trainer, 1.0)

    def step_seconds(n_steps: int) -> float:
        _, times = peer.train(NANOGPT_SETTLING + n_steps)
        return statistics.fmean(times[NANOGPT_SETTLING:] or times)

    n_steps = max(NANOGPT_MIN_STEPS, round(seconds / step_seconds(NANOGPT_MIN_STEPS)))
    return lambda: trainer.tokens_per_step / step_seconds(n_steps)


# --- writing


def writing_jobs(preset: Preset, clone: Path | None, seconds: float) -> dict[str, Job]:
    """Return a turn of writing for each contender and number of texts, with random weights."""
    shape = preset.model_config.replace(vocab_size=len(SYMBOLS))
    n_new = shape.block_size - 1 or 1
    turns = {OWN: (own_writer(GPT2(shape).eval(), "auto"), seconds)}
    if clone:  # once per turn: each time it starts a process
        turns[NANOGPT] = (nanogpt_writer(clone, shape, CPU), 0.0)
    return {
        f"{name}, {'one text' if n == 1 else f'{n} texts'}": writing(write, n, n_new, at_least)
        for name, (write, at_least) in turns.items()
        for n in BATCHES
    }


def writing(write: Write, n_texts: int, n_new: int, at_least: float) -> Job:
    """Return writing `n_texts` of `n_new` characters, repeated until it took `at_least` seconds."""

    def job() -> float:
        times = [write(n_texts, n_new)]
        while sum(times) < at_least:
            times.append(write(n_texts, n_new))
        return len(times) * n_texts * n_new / sum(times)

    return job


if __name__ == "__main__":
    main()
