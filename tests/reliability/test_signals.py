"""SIGINT and SIGTERM to a run of the preset `tiny`, at every stage; then a second signal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import words

from chargpt.runs.checkpoint import find_problem
from chargpt.runs.report import read_metrics

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(os.name == "nt", reason="signals of POSIX"),
]

ARGUMENTS = [
    *("train", "text.txt", "--out", "run", "--resume", "auto", "--preset", "tiny"),
    *("--steps", "100000"),
    *("--device", "cpu", "--eval-interval", "20", "--save-interval", "1", "--log-interval", "1"),
]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
# Prints when it evaluates; with "forever", a save never ends after the first signal.
CHILD = """
import signal, sys, threading, time
import chargpt.train as training
from chargpt.runs import checkpoint
from chargpt.cli import main as cli

def print_first(module, name, text):
    plain = getattr(module, name)
    def printing(*args, **kwargs):
        print(text, flush=True)
        return plain(*args, **kwargs)
    setattr(module, name, printing)

print_first(training, "evaluate", "evaluating")
def save_forever(*_):
    print("saving", flush=True)
    while signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        time.sleep(0.01)
    print("first signal", flush=True)
    threading.Event().wait()

if sys.argv[1] == "forever":
    checkpoint.write_file = save_forever
sys.exit(cli.main(sys.argv[2:]))
"""


def start(folder: Path, saves: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, saves, *ARGUMENTS],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps(run: Path) -> int:
    return max((row["step"] for row in read_metrics(run)), default=0)


def wait_until(condition: Callable[[], bool], child: subprocess.Popen[str]) -> None:
    while not condition():
        assert child.poll() is None, child.communicate()


def wait_for(text: str, child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    assert any(text in line for line in child.stdout)


@pytest.mark.parametrize("stage", ["a step", "a save", "an evaluation"])
@pytest.mark.parametrize("sent", CODES)
def test_a_signal_saves_and_ends(tmp_path: Path, sent: int, stage: str) -> None:
    (tmp_path / "text.txt").write_text(words(300_000))
    run = tmp_path / "run"
    child = start(tmp_path)
    if stage == "an evaluation":
        wait_for("evaluating", child)
    else:
        wait_until(lambda: steps(run) >= 3, child)
    if stage == "a save":
        wait_until((run / ".last.new").exists, child)
    before = time.perf_counter()
    child.send_signal(sent)
    _, said = child.communicate(timeout=60)
    seconds = time.perf_counter() - before
    assert child.returncode == CODES[signal.Signals(sent)]
    assert "resume with --out run --resume" in said
    assert "Traceback" not in said
    assert find_problem(run / "last") is None
    state = json.loads((run / "last" / "state.json").read_text())
    assert state["step"] == steps(run)  # no step is lost
    if stage == "an evaluation":
        assert (state["step"], state["evaluated_step"]) == (20, None)
    print(f"{signal.Signals(sent).name} in {stage}: ended after {seconds:.1f} s")


@pytest.mark.parametrize("sent", CODES)
def test_a_second_signal_ends_at_once(tmp_path: Path, sent: int) -> None:
    """Inside a save that never ends; the checkpoint before stays."""
    (tmp_path / "text.txt").write_text(words(300_000))
    run = tmp_path / "run"
    child = start(tmp_path)
    wait_until(lambda: steps(run) >= 3, child)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    saved = (run / "last" / "state.json").read_bytes()

    child = start(tmp_path, "forever")
    wait_for("saving", child)
    child.send_signal(sent)
    wait_for("first signal", child)
    child.send_signal(sent)
    before = time.perf_counter()
    _, said = child.communicate(timeout=60)
    seconds = time.perf_counter() - before
    # SIGTERM ends it directly; Ctrl-C ends it through Python, with an exit code.
    assert child.returncode == (-signal.SIGTERM if sent == signal.SIGTERM else 130)
    assert "Traceback" not in said
    assert find_problem(run / "last") is None
    assert (run / "last" / "state.json").read_bytes() == saved
    print(f"a second {signal.Signals(sent).name}: ended after {seconds:.1f} s")
