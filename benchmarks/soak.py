"""Memory and open files of a long run that often saves, evaluates and writes samples.

    python benchmarks/soak.py [--minutes 60] [--text TEXT] [--out FILE.json]

Trains the preset `tiny` in its own process and reads that process's memory every few seconds
(Linux). The slope is that of the least-squares line through the resident memory after the first
tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from chargpt.base.files import write_json
from chargpt.runs.report import read_metrics

LOOK_SECONDS = 5.0
INTERVALS = ("--eval-interval", "100", "--save-interval", "25", "--sample-length", "200")


def main() -> None:
    """Run the test and print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--text", default="tiny-shakespeare")
    parser.add_argument("--out", type=Path, help="JSON file for all readings")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        looks = soak(run, given.text, given.minutes)
        rows = read_metrics(run)
        saves = max(row["step"] for row in rows) // int(INTERVALS[3])
        evaluations = sum(row["split"] == "validation" for row in rows)
    if given.out:
        write_json(given.out, {"looks": looks})
    seconds = looks[-1]["seconds"]
    warm = [look for look in looks if look["seconds"] > seconds / 10]
    print(f"{seconds / 60:.1f} minutes: {saves} saves, {evaluations} evaluations and samples")
    print(describe(warm))


def soak(run: Path, text: str, minutes: float) -> list[dict[str, float]]:
    """Train in another process; return its readings over time."""
    command = [
        *(sys.executable, "-m", "chargpt", "train", text, "--preset", "tiny", *INTERVALS),
        *("--minutes", str(minutes), "--patience", "0", "--device", "cpu", "--out", str(run)),
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    looks: list[dict[str, float]] = []
    # The run does not count evaluations in its minutes; this clock does.
    while process.poll() is None and time.monotonic() - start < 60 * minutes:
        time.sleep(LOOK_SECONDS)
        if (run / "last").exists():  # the run has begun
            looks.append({"seconds": time.monotonic() - start, **look_at(process.pid)})
    process.terminate()
    if process.wait() not in (0, 143):
        raise SystemExit(f"the run ended with {process.returncode}")
    return looks


def look_at(pid: int) -> dict[str, float]:
    """Return a process's resident memory in MiB and its number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    rss = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return {
        "rss_mib": int(rss.split()[1]) / 1024,
        "open_files": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def describe(looks: list[dict[str, Any]]) -> str:
    """Return slope and range as JSON."""
    minutes = [look["seconds"] / 60 for look in looks]
    memory = [look["rss_mib"] for look in looks]
    files = [look["open_files"] for look in looks]
    slope = statistics.linear_regression(minutes, memory).slope
    return json.dumps(
        {
            "looks": len(looks),
            "rss_mib_first": round(memory[0], 1),
            "rss_mib_last": round(memory[-1], 1),
            "rss_mib_max": round(max(memory), 1),
            "rss_mib_per_minute": round(slope, 4),
            "open_files_min": min(files),
            "open_files_median": statistics.median(files),
            "open_files_max": max(files),
        },
        indent=2,
    )


if __name__ == "__main__":
    main()
