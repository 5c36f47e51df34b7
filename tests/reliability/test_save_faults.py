"""Every file operation of a run fails once, with an error or with the end of the process.

Afterwards the run folder must hold a whole checkpoint (or none, before the first save), the run
must have reported the failure, and the same command must resume it.
"""

import builtins
import errno
import io
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import words

import chargpt.train
from chargpt.base.errors import TrainingError, UserError
from chargpt.config import GPT2Config, TrainConfig
from chargpt.runs.checkpoint import (
    checkpoint_folders,
    find_checkpoint,
    find_problem,
    has_checkpoint,
    save_checkpoint,
)
from chargpt.runs.folder import load
from chargpt.train import TrainResult, train
from chargpt.training import saving

pytestmark = [
    pytest.mark.reliability,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

MODEL = GPT2Config(block_size=8, n_layer=1, n_head=1, d_model=16, dropout=0.0)
TRAINING = TrainConfig(
    steps=6, batch_size=1, eval_interval=3, save_interval=2, log_interval=1, sample_length=5,
    device="cpu", precision="fp32", kernels="off",
)  # fmt: skip
WATCHED = (
    (os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir"),
    (io, "open"),
)  # fmt: skip
DIED = 77


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chargpt.train, "plot_loss", lambda _: None)


class Faults:
    """Counts the file operations below a folder; the n-th one fails."""

    def __init__(self, folder: Path, n: int, fail: Callable[[], None]) -> None:
        self.folder, self.n, self.fail = str(folder), n, fail
        self.count = 0

    def next(self) -> bool:
        """Count an operation; return whether it is the one to fail."""
        self.count += 1
        return self.count == self.n

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            reads = name == "open" and "r" in (
                args[1] if len(args) > 1 else kwargs.get("mode", "r")
            )
            of_open_file = Path(f"/proc/self/fd/{args[0]}")
            target = str(of_open_file.readlink() if name == "fsync" else args[0])
            if not reads and target.startswith(self.folder):
                if self.next():
                    self.fail()
                if name == "open":
                    return WatchedFile(function(*args, **kwargs), self)
            return function(*args, **kwargs)

        return watched


class WatchedFile:
    """A file whose writes are counted; a failing one writes half of its data."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self.file, self.faults = file, faults

    def write(self, data: Any) -> Any:
        if self.faults.next():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            self.faults.fail()
        return self.file.write(data)

    def __enter__(self) -> "WatchedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def train_on(text: Path, out: Path) -> TrainResult:
    return train(
        str(text), model_config=MODEL, train_config=TRAINING, out=out, resume="auto", quiet=True
    )


def run_with_faults(text: Path, out: Path, n: int, fail: Callable[[], None]) -> bool:
    """Train with a failing n-th file operation; return whether it was reached."""
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(out, n, fail)
        for module, name in WATCHED:
            patch.setattr(module, name, faults.wrap(getattr(module, name), name))
        patch.setattr(builtins, "open", io.open)
        try:
            train_on(text, out)
        finally:
            reached = faults.count >= n
    return reached


def resumes(text: Path, out: Path) -> bool:
    """Return whether the same command resumes the run and completes it."""
    return (
        train_on(text, out).summary.steps == TRAINING.steps and find_problem(out / "last") is None
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(words(600))
    return file


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_an_error_in_every_file_operation(text: Path, tmp_path: Path, number: int) -> None:
    reported = 0
    for n in range(1, 1000):
        out = tmp_path / f"run-{n}"

        def fail() -> None:
            raise OSError(number, os.strerror(number), "somewhere")

        try:
            if not run_with_faults(text, out, n, fail):
                break
        except (TrainingError, UserError) as error:
            reported += 1
            assert "\n" not in str(error)
        else:  # an operation of the clean-up, which may fail
            assert find_problem(out / "last") is None
            assert load(out)
        if has_checkpoint(out, "last"):
            assert find_problem(find_checkpoint(out, "last")) is None
        assert resumes(text, out), n
    assert n > 50, "the faults were not reached"
    assert reported > n / 2
    print(f"{os.strerror(number)}: {n - 1} operations failed in turn, {reported} ended the run")


def test_the_end_of_the_process_in_every_file_operation(text: Path, tmp_path: Path) -> None:
    for n in range(1, 1000):
        out = tmp_path / f"run-{n}"
        child = os.fork()
        if child == 0:  # ends without clean-up, like a kill or a power cut
            try:
                run_with_faults(text, out, n, lambda: os._exit(DIED))
                os._exit(0)
            except BaseException:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, DIED), (n, code)
        if has_checkpoint(out, "last"):
            assert find_problem(find_checkpoint(out, "last")) is None
        assert resumes(text, out), n
        if code == 0:
            break
    assert n > 50, "the faults were not reached"
    print(f"the process ended in each of {n - 1} operations")


def test_two_whole_checkpoints_exist_at_every_file_operation(text: Path, tmp_path: Path) -> None:
    """From the third save on, counted before each operation."""
    out = tmp_path / "run"
    saves = 0
    standing: list[int] = []

    class Count(Faults):
        def next(self) -> bool:
            if saves >= 3:
                folders = checkpoint_folders(out, "last")
                standing.append(sum(find_problem(folder) is None for folder in folders))
            return False

    def counted(*args: Any) -> None:
        nonlocal saves
        saves += args[1] == "last"
        save_checkpoint(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "save_checkpoint", counted)
        patch.setattr(sys.modules[__name__], "Faults", Count)
        run_with_faults(text, out, 0, lambda: None)
    assert saves == 5
    assert len(standing) > 40
    assert min(standing) == 2
    assert max(standing) == 3
    print(f"{len(standing)} operations, two whole checkpoints or three at each")


CROWDED = """
import resource, sys
from chargpt.cli import main as cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
cli.main(sys.argv[2:])
"""


def test_a_full_disk_ends_the_run_and_loses_no_checkpoint(text: Path, tmp_path: Path) -> None:
    arguments = [
        *("train", str(text), "--preset", "tiny"),  # AdamW's state is larger than the limit
        *"--out run --resume auto --n-layer 1 --n-head 1 --d-model 16 --block-size 8".split(),
        *"--batch-size 1 --eval-interval 3 --sample-length 0 --device cpu".split(),
        *"--precision fp32 --steps".split(),
    ]

    def chargpt_with(limit: int, steps: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CROWDED, str(limit), *arguments, str(steps)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    infinity = resource.RLIM_INFINITY
    assert chargpt_with(infinity, 6).returncode == 0
    before = (tmp_path / "run" / "last" / "model.safetensors").read_bytes()
    crowded = chargpt_with(20_000, 12)
    assert crowded.returncode == 1
    last_line = crowded.stderr.strip().splitlines()[-1]
    assert re.search("could not be saved.* it needs.* --resume", last_line)
    assert "Traceback" not in crowded.stderr
    assert (tmp_path / "run" / "last" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / ".last.new").exists()  # its space is free again
    assert chargpt_with(infinity, 12).returncode == 0


def test_the_order_of_system_calls_of_a_save(text: Path, tmp_path: Path) -> None:
    """Files are flushed before their folder is renamed; then the folder of the names is flushed."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("no strace here")
    script = (
        "import torch; from pathlib import Path\n"
        "from chargpt.runs.checkpoint import save_checkpoint\n"
        "Path('run').mkdir()\n"
        "for i in range(3): save_checkpoint(Path('run'), 'last', "
        "{'model.safetensors': {'x': torch.zeros(3)}}, {'step': i})"
    )
    log = tmp_path / "calls"
    calls = "trace=fsync,rename,renameat,renameat2,openat,unlink,unlinkat,rmdir"
    command = [strace, "-f", "-y", "-o", str(log), "-e", calls, sys.executable, "-c", script]
    traced = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    if traced.returncode:
        pytest.skip(f"strace does not work here: {traced.stderr[-200:]}")
    lines = [line for line in log.read_text().splitlines() if "run" in line]
    starts = [
        i for i, line in enumerate(lines) if "model.safetensors" in line and "O_CREAT" in line
    ]
    done = []
    for line in lines[starts[-1] :]:
        if "fsync(" in line:
            done.append("fsync " + line.split("<")[1].split(">")[0].rpartition("/")[2])
        elif "rename" in line and "ENOENT" not in line:
            done.append("rename " + " ".join(p.rpartition("/")[2] for p in line.split('"')[1::2]))
    assert done == [
        *("fsync model.safetensors", "fsync state.json", "fsync manifest.json", "fsync .last.new"),
        *("rename last last.previous", "rename .last.new last", "fsync run"),
    ]
