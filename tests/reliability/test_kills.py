"""A run that is killed repeatedly, at random and inside saves, equals one that was never killed."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import words
from safetensors.torch import load_file

KILLS = int(os.environ.get("CHARGPT_KILLS", "200"))
STEPS, SAVE_INTERVAL = 600, 5
pytestmark = pytest.mark.reliability

COMMAND = [
    *(sys.executable, "-m", "chargpt", "train", "text.txt", "--resume", "auto"),
    *("--steps", str(STEPS)),
    *("--save-interval", str(SAVE_INTERVAL), "--eval-interval", "100", "--log-interval", "1"),
    *("--n-layer", "1", "--n-head", "2", "--d-model", "32", "--block-size", "16"),
    *("--batch-size", "2", "--optimizer", "muon", "--sample-length", "0", "--patience", "0"),
    *("--device", "cpu", "--precision", "fp32", "--out"),
]


def last_step(run: Path) -> int:
    """Return the step of the newest checkpoint, read without the package."""
    steps = [0]
    for manifest in run.glob("*last*/manifest.json"):  # the last file that a save writes
        with suppress(FileNotFoundError, ValueError):  # just moved, or half written
            json.loads(manifest.read_text())
            steps.append(json.loads((manifest.parent / "state.json").read_text())["step"])
    return max(steps)


def start(folder: Path, run: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    return subprocess.Popen(
        [*COMMAND, run], cwd=folder, env=env, stdout=null, stderr=pipe, text=True
    )


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str]) -> bool:
    """Wait for a condition; return False if the child ends first."""
    while child.poll() is None:
        if condition():
            return True
    return False


def kill_through(run: Path, kills: int, rng: random.Random) -> tuple[int, int]:
    """Start a run until it ends, killing it at most `kills` times.

    Returns the number of kills, and how many of them came inside a save.
    """
    n_inside = 0
    for killed in range(kills + 1):
        before = last_step(run)
        child = start(run.parent, run.name)
        if killed == kills or not wait_until(lambda: last_step(run) > before, child):  # noqa: B023
            _, said = child.communicate()
            assert child.returncode == 0, said
            return killed, n_inside
        # It has resumed and saved. Every other kill comes inside the next save.
        inside = wait_until((run / ".last.new").exists, child) if killed % 2 else False
        for _ in range(0 if inside else rng.randrange(20_000)):
            child.poll()
        child.send_signal(signal.SIGKILL)
        child.communicate()
        n_inside += any(run.glob(".*.new"))
        step = max((step for step, _ in losses(run)), default=0)
        assert last_step(run) >= max(before, step - SAVE_INTERVAL), "more than one interval lost"
    raise AssertionError("unreachable")


def test_killed_at_random_and_inside_saves(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(words(3000))
    undisturbed = tmp_path / "undisturbed"
    assert kill_through(undisturbed, 0, random.Random()) == (0, 0)
    rng = random.Random(0)
    kills = runs = inside = 0
    while kills < KILLS:
        run = tmp_path / f"killed-{runs}"
        counts = kill_through(run, KILLS - kills, rng)
        kills, inside = kills + counts[0], inside + counts[1]
        runs += 1
        assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
        for part in ("best", "last"):
            ours, theirs = (load_file(r / part / "model.safetensors") for r in (run, undisturbed))
            assert all((ours[name] == theirs[name]).all() for name in theirs)
        assert losses(run) == losses(undisturbed)
    print(f"{kills} kills, {inside} of them inside a save, in {runs} runs, all bit-equal")


def losses(run: Path) -> list[tuple[int, float]]:
    """Return step and loss of each line of the metrics file, up to a line cut short."""
    rows = []
    if (run / "metrics.jsonl").exists():
        for line in (run / "metrics.jsonl").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
    return [(row["step"], row.get("loss", row.get("val_loss"))) for row in rows]
