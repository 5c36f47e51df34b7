"""Characters per second of a run's model in chargpt and, exported, in ONNX Runtime.

    python benchmarks/onnx_speed.py RUN [--characters 500] [--rounds 7]

Each writes one text at temperature 0.8 on one thread, past block_size as chargpt does: it re-reads
the last half. They take turns in each round; a speed is the median over the rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from chargpt.compute.device import cpu_name
from chargpt.config import SampleConfig
from chargpt.export.onnx import forward, open_session
from chargpt.export.onnx_graph import to_onnx
from chargpt.generate import complete
from chargpt.measure.bench_writing import TEMPERATURE
from chargpt.measure.contenders import OWN, PYTORCH, compare
from chargpt.measure.timing import seconds_of
from chargpt.runs.folder import Loaded, load

CPU = torch.device("cpu")
Write = Callable[[int], object]
"""Writes so many characters."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--characters", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    writers = make_writers(load(given.run))
    for write in writers.values():
        write(3)  # warm up
    jobs = {
        name: lambda write=write: seconds_of(lambda: write(given.characters), CPU)
        for name, write in writers.items()
    }
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # noqa: E731
    figures = compare(jobs, given.characters, given.rounds, report)
    print(f"{cpu_name()}, one thread, one text of {given.characters:,} characters")
    print(f"{'characters/s':<24}{'median':>10}{'slowest':>10}{'fastest':>10}{'chargpt is':>12}")
    for name, (speed, times) in figures.items():
        ends = (speed[f"characters_per_second{end}"] for end in ("", "_min", "_max"))
        print(f"{name:<24}" + "".join(f"{rate:>10,.0f}" for rate in ends) + f"{times:>11.2f}×")


def make_writers(loaded: Loaded) -> dict[str, Write]:
    """Return the contenders by name."""

    def own(kernels: str) -> Write:
        def write(n: int) -> object:
            config = SampleConfig(temperature=TEMPERATURE, max_new_tokens=n)
            return complete(*loaded, ["\n"], config, kernels=kernels)  # type: ignore[arg-type]

        return write

    return {
        OWN: own("auto"),
        PYTORCH: own("off"),
        "ONNX Runtime": onnx_writer(loaded, int8=False),
        "ONNX Runtime, int8": onnx_writer(loaded, int8=True),
    }


def onnx_writer(loaded: Loaded, *, int8: bool) -> Callable[[int], list[int]]:
    """Return a function that writes with the exported model and NumPy; it returns the ids."""
    session = open_session(to_onnx(*loaded, int8=int8), n_threads=1)
    block_size = loaded.model.config.block_size
    rng = np.random.default_rng(0)

    def write(n: int) -> list[int]:
        ids = loaded.tokenizer.encode_prompt("\n")
        unread, past = ids, []
        for _ in range(n):
            if past and past[0].shape[2] + len(unread) > block_size:
                unread, past = ids[-(block_size // 2) :], []
            logits, past = forward(session, np.array([unread]), past)
            scaled = logits[0, -1].astype(float) / TEMPERATURE
            p = np.exp(scaled - scaled.max())
            ids.append(int(rng.choice(len(p), p=p / p.sum())))
            unread = ids[-1:]
        return ids

    return write


if __name__ == "__main__":
    main()
