"""What a save costs: seconds and bytes of a checkpoint, and its share of the training around it.

    python benchmarks/saving.py [--presets tiny baby] [--repeats 5] [--out FOLDER]

A save writes weights, optimizer state and manifest, flushes them to disk and moves them into place.
The share is what saving at every evaluation takes of the training between two of them, at the speed
that a few steps were measured to have.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from chargpt.base.units import human_count
from chargpt.config import PRESETS
from chargpt.measure.bench import synthetic_trainer
from chargpt.train import train_step
from chargpt.training.saving import save_last

STEPS = 3


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--presets", nargs="+", default=["tiny", "baby"], choices=PRESETS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, help="in place of the preset's")
    parser.add_argument("--out", type=Path, help="where to save (a temporary folder)")
    given = parser.parse_args()
    print("preset     bytes     save, s (median, slowest)   step, s   share of training")
    for name in given.presets:
        with tempfile.TemporaryDirectory(dir=given.out) as folder:
            print(measure(name, Path(folder), given.repeats, given.batch_size), flush=True)


def measure(name: str, folder: Path, repeats: int, batch_size: int | None) -> str:
    """Return a line of the table."""
    preset = PRESETS[name]()
    training = preset.train_config.replace(gradient_accumulation_steps=1)
    if batch_size:
        training = training.replace(batch_size=batch_size)
    trainer = synthetic_trainer(preset.model_config, training)
    trainer.out = folder
    trainer.model.train()
    steps = [timed(lambda: train_step(trainer)) for _ in range(STEPS)]
    saves = [timed(lambda: save_last(trainer)) for _ in range(repeats)]
    n_bytes = sum(file.stat().st_size for file in (folder / "last").iterdir())
    step, save = min(steps), statistics.median(saves)
    share = save / (save + step * trainer.eval_interval)
    return (
        f"{name:8}{human_count(n_bytes):>7}B{save:15.3f}, {max(saves):.3f}{step:18.3f}{share:14.2%}"
        f" (every {trainer.eval_interval} steps)"
    )


def timed(job: object) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    job()  # type: ignore[operator]
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
