"""Two machines, which are network namespaces with a link between them, train one model."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torchrun

from chargpt.runs.report import read_metrics

pytestmark = pytest.mark.reliability

FIRST, SECOND = "10.77.31.1", "10.77.31.2"
SCRIPT = torchrun.ROOT / "deploy" / "two-machines.sh"
FLAGS = """--n-layer 2 --n-head 2 --d-model 32 --block-size 32 --batch-size 8 --precision fp32
--steps 600 --eval-interval 50 --save-interval 10 --log-interval 1 --sample-length 0
--patience 0 --dropout 0""".split()


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """Two namespaces by address, joined by a link whose ends are ``v-NAME``."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need Linux, root and ip")
    names = {FIRST: f"cg-a-{os.getpid()}", SECOND: f"cg-b-{os.getpid()}"}
    ends = ["v-first", "v-second"]
    try:
        for name in names.values():
            ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    try:
        first, second = names.values()
        ip("-n", first, "link", "add", ends[0], "type", "veth", "peer", ends[1], "netns", second)
        for (address, name), end in zip(names.items(), ends, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield names
    finally:
        for name in names.values():
            kill_all(name)
            ip("netns", "del", name)


def kill_all(name: str) -> None:
    """Kill every process of a machine, as a power cut does."""
    for pid in subprocess.check_output(["ip", "netns", "pids", name], text=True).split():
        subprocess.run(["kill", "-9", pid], check=False, capture_output=True)


def start(name: str, address: str, text: str, out: Path) -> "subprocess.Popen[bytes]":
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with (out.parent / f"{address}.log").open("ab") as log:
        return subprocess.Popen(
            ["ip", "netns", "exec", name, str(SCRIPT), FIRST, address, text, *FLAGS, "--out", out],
            env=torchrun.environment(PATH=path, PER_MACHINE="1", JOB=f"test-{os.getpid()}"),
            stdout=log,
            stderr=log,
        )


def wait_until(happened: Callable[[], bool]) -> None:
    end = time.monotonic() + torchrun.LIMIT
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_machine_that_is_cut_off_and_comes_back_joins_the_run(
    machines: dict[str, str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a word, another word; " * 2000, encoding="utf-8")
    out = tmp_path / "run"
    first, second = (start(name, address, str(text), out) for address, name in machines.items())
    wait_until((out / "last" / "state.json").exists)
    ip("-n", machines[SECOND], "link", "set", "v-second", "down")
    kill_all(machines[SECOND])
    assert second.wait() != 0
    ip("-n", machines[SECOND], "link", "set", "v-second", "up")
    second = start(machines[SECOND], SECOND, str(text), out)
    logs = [(tmp_path / f"{address}.log") for address in machines]
    assert [process.wait(timeout=torchrun.LIMIT) for process in (first, second)] == [0, 0], [
        log.read_text() for log in logs
    ]
    printed = "".join(log.read_text() for log in logs)
    assert "resuming   after step" in printed
    assert "2 processes share each batch" in printed
    steps = [row["step"] for row in read_metrics(out) if row["split"] == "train"]
    assert steps == list(range(1, 601))
