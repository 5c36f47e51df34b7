"""Jobs of several processes for tests, started by torchrun on the CPU."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 300  # seconds for a job


def command(n: int, *arguments: str, options: tuple[str, ...] = ()) -> list[str]:
    """Return the command line of a job of `n` processes; `arguments` begin with a script or -m."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(n), *options, *arguments]


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


@contextmanager
def job(*arguments: str, n: int = 2, **more: str) -> Iterator["subprocess.Popen[str]"]:
    """Start a job; at the end of the block it is killed, if it still runs."""
    process = subprocess.Popen(
        command(n, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run(*arguments: str, n: int = 2, options: tuple[str, ...] = (), **more: str) -> tuple[int, str]:
    """Run a job to its end; return its exit code and what it printed."""
    done = subprocess.run(
        command(n, *arguments, options=options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(**more),
        timeout=LIMIT,
        check=False,
    )
    return done.returncode, done.stdout
