"""How training grows, measured; and how well ``chargpt plan`` predicts it.

Prints tables in Markdown for docs/scaling.md:

    python benchmarks/scaling.py predictions      three shapes, kernels on and off, 1 and 2 threads
    python benchmarks/scaling.py curves           one setting at a time
    python benchmarks/scaling.py processes        torchrun with one and two processes

Each measurement is a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"preset": "tiny"},
    "best": {"preset": "best"},
    "baby, batch 16": {"preset": "baby", "batch_size": 16},
}
BASE = {"n_layer": 4, "d_model": 128, "block_size": 128, "batch_size": 16}
CURVES = {
    "n_layer": (1, 2, 4, 8, 16),
    "d_model": (64, 128, 256, 512),
    "block_size": (32, 64, 128, 256, 512),
    "batch_size": (1, 4, 16, 64, 256),
    "vocab_size": (65, 256, 2000, 8000),
}


def measure(settings: dict[str, Any]) -> None:
    """Train for some seconds in this process, and print its speed and memory as JSON."""
    import resource

    from chargpt.config import PRESETS
    from chargpt.measure.bench import synthetic_trainer
    from chargpt.measure.timing import median_seconds, own_step

    preset = PRESETS[settings.pop("preset", "tiny")]()
    train = {k: settings.pop(k) for k in ("batch_size", "kernels", "precision") if k in settings}
    model_config = preset.model_config.replace(**settings)
    trainer = synthetic_trainer(model_config, preset.train_config.replace(**train))
    seconds = median_seconds(own_step(trainer), 2.0, trainer.device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"speed": trainer.tokens_per_step / seconds, "memory": peak}))


def in_process(threads: int, *arguments: str) -> Any:
    """Run Python with arguments, and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, *arguments],
        # As the command line sets it.
        env=os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "1000"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return json.loads(done.stdout)


def measured(threads: int, **settings: Any) -> Any:
    """Return the speed and memory of training in a process of its own."""
    return in_process(threads, __file__, "measure", json.dumps(settings))


def predictions() -> None:
    """Compare what ``chargpt plan`` prints with what training does."""
    names = ("shape", "kernels", "threads", "characters/s planned", "measured")
    print(f"| {' | '.join((*names, 'memory planned', 'measured'))} |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        for kernels in ("on", "off"):
            for threads in (1, 2):
                settings = shape | {"kernels": kernels, "precision": "fp32"}
                flags = [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]
                plan = in_process(threads, "-m", "chargpt", "plan", *flags, "--json")
                real = measured(threads, **settings)
                speed, memory = plan["tokens_per_second"], plan["memory"]["total"]
                memory += plan["program_bytes"]
                off = (speed / real["speed"] - 1, memory / real["memory"] - 1)
                print(
                    f"| {name} | {kernels} | {threads} | {speed:,.0f} | {real['speed']:,.0f} "
                    f"({off[0]:+.0%}) | {memory / 1e6:,.0f} MB | {real['memory'] / 1e6:,.0f} MB "
                    f"({off[1]:+.0%}) |",
                    flush=True,
                )


def curves() -> None:
    """Change one setting at a time."""
    for setting, values in CURVES.items():
        print(f"| {setting} | characters/s | memory |\n|---|---|---|")
        for value in values:
            real = measured(2, **BASE | {setting: value})
            memory = real["memory"] / 1e6
            print(f"| {value:,} | {real['speed']:,.0f} | {memory:,.0f} MB |", flush=True)
        print()


def processes() -> None:
    """Train the same steps with threads and with processes."""
    print("| preset | processes × threads | characters/s |\n|---|---|---|")
    for preset in ("tiny", "best"):
        for n, threads in ((1, 1), (1, 2), (2, 1)):
            speeds = [_trained(preset, n, threads) for _ in range(3)]
            print(f"| {preset} | {n} × {threads} | {sorted(speeds)[1]:,.0f} |", flush=True)


def _trained(preset: str, n: int, threads: int) -> float:
    steps = {"tiny": 300, "best": 12}[preset]
    torchrun = f"-m torch.distributed.run --standalone --nproc-per-node {n}"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        words = f"-m chargpt train --preset {preset} --steps {steps} --sample-length 0 --out {out}"
        subprocess.run(
            [sys.executable, *(torchrun if n > 1 else "").split(), *words.split()],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=True,
            capture_output=True,
        )
        speed: float = json.loads((out / "summary.json").read_text())["tokens_per_second"]
        return speed


def main() -> None:
    """Print one of the tables."""
    jobs = {"predictions": predictions, "curves": curves, "processes": processes}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=[*jobs, "measure"])
    parser.add_argument("settings", nargs="?", default="{}")
    options = parser.parse_args()
    if options.what == "measure":
        measure(json.loads(options.settings))
        return
    start = time.time()
    jobs[options.what]()
    print(f"\n{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
