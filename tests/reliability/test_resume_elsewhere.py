"""A run resumed with another number of threads and another variant of the kernels.

On the kernels it stays the same to the bit. On PyTorch's layers it is nearly the same, and the
change is reported. `tests/test_same_bits.py` compares the files of shorter runs.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import words
from variants import COMPILERS, VARIANTS

from chargpt.compute.library import CHOICE

pytestmark = pytest.mark.reliability

COMMAND = [
    *(
        sys.executable,
        "-m",
        "chargpt",
        "train",
        "text.txt",
        "--resume",
        "auto",
        "--preset",
        "tiny",
        "--dropout",
        "0",
    ),
    *("--n-layer", "2", "--n-head", "2", "--d-model", "32", "--block-size", "32"),
    *("--batch-size", "16", "--eval-interval", "100", "--log-interval", "1", "--patience", "0"),
    *("--sample-length", "0", "--device", "cpu", "--precision", "fp32"),
    *("--learning-rate", "1e-3", "--cooldown-fraction", "0", "--warmup-fraction", "0"),
]


def chargpt_train(
    folder: Path, out: str, *, kernels: str, steps: int, threads: int, variant: str = ""
) -> str:
    command = [*COMMAND, "--kernels", kernels, "--steps", str(steps), "--out", out]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), CHOICE: variant}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return done.stderr


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["split"] == "train"}


@pytest.mark.parametrize("kernels", ["on", "off"])
def test_elsewhere(tmp_path: Path, kernels: str) -> None:
    if (os.cpu_count() or 1) < 2 or (kernels == "on" and not COMPILERS):
        pytest.skip("one core, or no compiler")
    (tmp_path / "text.txt").write_text(words(5000))
    chargpt_train(tmp_path, "one", kernels=kernels, steps=50, threads=1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    same = chargpt_train(tmp_path, "one", kernels=kernels, steps=150, threads=1)
    assert "may differ" not in same
    variant = next(iter(VARIANTS)) if kernels == "on" else ""
    other = chargpt_train(tmp_path, "two", kernels=kernels, steps=150, threads=2, variant=variant)
    said = "resuming   threads was 1, is 2: losses may differ by rounding" in other
    assert said == ("may differ" in other) == (kernels == "off")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    first, hundredth = abs(one[51] - two[51]), abs(one[150] - two[150])
    print(f"kernels {kernels}: first loss differs by {first:.1e}, the hundredth by {hundredth:.1e}")
    if kernels == "on":
        assert one == two
    else:
        assert first <= 1e-6
        assert hundredth <= 1e-3
