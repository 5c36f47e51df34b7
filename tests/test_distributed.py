"""Several processes train as one does: the same batches, gradients, losses and files."""

import json
import re
import shutil
import signal
from itertools import product
from pathlib import Path

import pytest
import torch
import torchrun
from conftest import words
from distributed_worker import first_gradients, measure, trainer_for

from chargpt.compute.world import ALONE, World
from chargpt.runs.report import read_metrics

WORKER = str(Path(__file__).parent / "distributed_worker.py")
SETTINGS = [
    {"parallel": kind, "optimizer": optimizer, "gradient_accumulation_steps": n}
    for kind, optimizer, n in product(("ddp", "fsdp"), ("adamw", "muon"), (1, 2))
]
TRAIN = """--preset tiny --n-layer 2 --n-head 2 --d-model 32 --block-size 32 --batch-size 8
--learning-rate 1e-3 --precision fp32 --device cpu --steps 30 --eval-interval 10
--save-interval 5 --log-interval 1 --sample-length 5""".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(words(20_000), encoding="utf-8")
    return str(path)


def losses_of(run: Path, kind: str = "loss") -> list[float]:
    return [row[kind] for row in read_metrics(run) if kind in row]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("n", "n_steps"), [(2, 10), (4, 10), pytest.param(2, 100, marks=pytest.mark.slow)]
)
def test_the_gradients_losses_and_batches_are_those_of_one_process(
    text: str, tmp_path: Path, n: int, n_steps: int
) -> None:
    out = tmp_path / "measured.pt"
    settings = SETTINGS if n == 2 else SETTINGS[::3]
    code, printed = torchrun.run(
        WORKER, "parity", text, str(out), json.dumps(settings), str(n_steps), n=n
    )
    assert code == 0, printed
    for changes, measured in zip(settings, torch.load(out), strict=True):
        expected = measure(text, ALONE, n_steps, **changes | {"parallel": "auto"})
        assert measured["batches"] == expected.batches
        # Gradients, because AdamW hides their scale.
        for name, gradient in expected.gradients.items():
            assert relative(measured["gradients"][name], gradient) < 1e-6, (changes, name)
        torch.testing.assert_close(measured["losses"], expected.losses, rtol=0, atol=1e-4)


def test_each_rank_drops_values_of_its_own_by_the_documented_rule(
    text: str, tmp_path: Path
) -> None:
    changes = {"dropout": 0.2, "batch_size": 8, "kernels": "off"}
    out = tmp_path / "measured.pt"
    code, printed = torchrun.run(WORKER, "parity", text, str(out), json.dumps([changes]), "0")
    assert code == 0, printed
    shares = []
    for rank in range(2):
        trainer = trainer_for(text, ALONE, **changes)
        trainer.world = World(rank=rank, size=2)
        shares.append(first_gradients(trainer))
    for name, gradient in torch.load(out)[0]["gradients"].items():
        torch.testing.assert_close(
            gradient, (shares[0][name] + shares[1][name]) / 2, rtol=1e-4, atol=1e-7
        )
    assert any(relative(shares[0][name], shares[1][name]) > 0.1 for name in shares[0])


def test_a_run_saved_by_two_processes_resumes_with_one_and_with_four(
    text: str, tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    command = ["-m", "chargpt", "train", text, *TRAIN, "--dropout", "0", "--out"]
    assert torchrun.run(*command, str(alone), n=1)[0] == 0
    with torchrun.job(*command, str(run)) as job:
        assert job.stdout is not None
        next(line for line in job.stdout if "step 10: validation" in line)
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=torchrun.LIMIT)
    stopped = json.loads((run / "summary.json").read_text())
    assert stopped["stop_reason"] == "terminated"
    assert 10 <= stopped["steps"] < 30
    for n in (1, 4):
        resumed = tmp_path / f"resumed by {n}"
        shutil.copytree(run, resumed)
        code, printed = torchrun.run(*command, str(resumed), "--resume", n=n)
        assert code == 0, printed
        assert f"devices was 2, is {n}: losses may differ by rounding" in printed
        for kind in ("loss", "val_loss"):
            torch.testing.assert_close(
                losses_of(resumed, kind), losses_of(alone, kind), rtol=0, atol=1e-4
            )


@pytest.mark.reliability
@pytest.mark.parametrize(("kind", "n"), [("ddp", 2), ("ddp", 3), ("fsdp", 3)])
def test_killed_ranks_are_replaced_and_the_run_ends_with_the_same_bits(
    text: str, tmp_path: Path, kind: str, n: int
) -> None:
    arguments = [text, *TRAIN, "--parallel", kind, "--optimizer", "muon"]
    for name, faults in (("whole", ""), ("killed", "kill:1:7:0 kill:0:12:1 kill:1:23:2")):
        out = ["--out", str(tmp_path / name)]
        options = ("--max-restarts", "3")
        command = (WORKER, "train", faults, *arguments, *out)
        code, printed = torchrun.run(*command, n=n, options=options)
        assert code == 0, printed
        assert printed.count("resuming   after step") == len(faults.split())
    for file in ("last/model", "last/optimizer", "best/model"):
        whole, killed = (
            (tmp_path / name / f"{file}.safetensors").read_bytes() for name in ("whole", "killed")
        )
        assert whole == killed
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "killed")


def test_a_failing_rank_ends_the_job_and_its_error_is_shown_once(text: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    code, printed = torchrun.run(WORKER, "train", "raise:1:3", text, *TRAIN, *out, n=3)
    assert code != 0
    assert printed.count("KeyError: 'a bug on one rank'") == 1
    assert len(re.findall(r"^\[rank\d\]: Traceback", printed, re.MULTILINE)) == 1
    assert "another process" not in printed


def test_a_mistake_of_the_user_is_shown_once_and_leaves_no_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, printed = torchrun.run("-m", "chargpt", "train", "nowhere.txt", "--out", str(out))
    assert code != 0
    assert printed.count("there is no file nowhere.txt") == 1
    assert "exitcode  : 2" in printed
    assert not out.exists()
