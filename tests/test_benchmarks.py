"""The scripts in benchmarks/: what they compute, never their speed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import QUICK, SMALL, words

import chargpt.train
from chargpt import GPT2
from chargpt.config import Preset
from chargpt.engine.evaluation import evaluate
from chargpt.runs.folder import load
from chargpt.train import TrainResult

FOLDER = Path(__file__).parents[1] / "benchmarks"
if not FOLDER.is_dir():
    pytest.skip("benchmarks/ is only in the repository", allow_module_level=True)
sys.path.insert(0, str(FOLDER))

import busy_neighbour  # noqa: E402
import curves  # noqa: E402
import onnx_speed  # noqa: E402
import protocols  # noqa: E402
import seeds  # noqa: E402

T = SMALL.block_size
TINY = "n_layer=1 d_model=16 n_head=1 block_size=16 batch_size=4 steps=4 eval_interval=2".split()
TINY += "device=cpu precision=fp32 kernels=off".split()


def loss_of(model: GPT2, windows: torch.Tensor) -> torch.Tensor:
    """The loss at each position by hand: windows (N, T + 1) to (N, T)."""
    with torch.no_grad():
        log_p = F.log_softmax(model(windows[:, :-1]), dim=-1)
    return -log_p.gather(-1, windows[:, 1:, None])[..., 0]


# --- protocols


def some_tokens(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, n).astype(np.uint8)


def test_nanogpt_loss_approaches_the_mean_over_every_window(model: GPT2) -> None:
    tokens = some_tokens(40)
    ids = torch.from_numpy(tokens.astype(np.int64))
    expected = loss_of(model, ids.unfold(0, T + 1, 1)).mean().item()
    estimate = protocols.nanogpt_loss(model, tokens, T, n_batches=100)
    assert estimate.loss == pytest.approx(expected, abs=5 * estimate.standard_error)
    assert estimate.standard_error < 0.02 * expected


def test_nanogpt_loss_of_a_text_with_one_window_has_no_error(model: GPT2) -> None:
    tokens = some_tokens(T + 1)
    estimate = protocols.nanogpt_loss(model, tokens, T, n_batches=3, batch_size=2)
    assert estimate.loss == pytest.approx(evaluate(model, tokens, T), rel=1e-5)
    assert estimate.standard_error == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="16 tokens to validate on are too few"):
        protocols.nanogpt_loss(model, tokens[:-1], T)


def test_whole_and_halves_count_each_character_once(model: GPT2) -> None:
    tokens = some_tokens(4 * T + 2)
    ids = torch.from_numpy(tokens.astype(np.int64))

    def by_hand(part: torch.Tensor) -> float:
        starts = range(0, len(part) - 1, T)
        nats = [loss_of(model, part[None, start : start + T + 1])[0] for start in starts]
        return torch.cat(nats).mean().item()

    middle = 2 * T + 1
    assert protocols.whole_loss(model, tokens, T) == pytest.approx(by_hand(ids), rel=1e-5)
    halves = protocols.half_losses(model, tokens, T)
    assert halves.first == pytest.approx(by_hand(ids[:middle]), rel=1e-5)
    assert halves.last == pytest.approx(by_hand(ids[middle:]), rel=1e-5)


def test_the_learning_curve_is_that_of_metrics_jsonl(result: TrainResult) -> None:
    curve = protocols.learning_curve(result.run)
    assert [point.step for point in curve] == [5, 10, 12]
    assert min(point.val_loss for point in curve) == result.summary.val_loss
    assert 0 < curve[0].seconds < curve[1].seconds < curve[2].seconds
    assert curve[2].seconds == pytest.approx(result.summary.train_seconds, abs=0.002)


# --- seeds


def test_seeds_from_the_text_to_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chargpt.train, "plot_loss", lambda _: None)
    text = tmp_path / "hearts.txt"
    text.write_text(words(2000), encoding="utf-8")
    command = f"--preset tiny --seeds 2 --target 99 --text {text} --out {tmp_path / 'out'} --set"
    seeds.main([*command.split(), *TINY])
    lines = capsys.readouterr().out.splitlines()
    heads, _, first, _, mean, error = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    one, two = results["seeds"]
    assert (one["seed"], two["seed"]) == (1337, 1338)
    assert one["characters"] == 4 * 4 * 16
    assert one["best_val_loss"] != two["best_val_loss"]
    assert one["best_val_loss"] == pytest.approx(one["nanogpt_loss"], abs=0.1)
    halves = (one["first_half_loss"] + one["held_out_loss"]) / 2
    assert halves == pytest.approx(one["final_val_loss"], abs=0.05)
    curve = protocols.learning_curve(tmp_path / "out" / "seed-1337")
    assert one["seconds_to_target"] == curve[0].seconds  # 99 is reached immediately
    held_out = [one["held_out_loss"], two["held_out_loss"]]
    assert results["mean"]["held_out_loss"] == pytest.approx(np.mean(held_out))
    spread = abs(held_out[0] - held_out[1]) / 2  # the formula for two values
    assert results["standard_error"]["held_out_loss"] == pytest.approx(spread)
    assert heads[0] == "seed" and heads[1] == "s to 99"
    assert first[0] == "1337" and "±" in first[heads.index("nanoGPT's protocol")]
    assert mean[0] == "mean" and error[0] == "standard error"

    # The same with an unreachable target: nothing is trained, and the table says so.
    monkeypatch.setattr(seeds, "train", None)
    seeds.main([*command.replace("99", "0.1").split(), *TINY])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 1337 | – |")
    assert lines[4].startswith("| mean | not reached by all |")
    with pytest.raises(SystemExit):
        seeds.main([*command.split(), *TINY, "steps=5"])
    assert "was trained with other settings" in capsys.readouterr().err


def test_an_interrupted_seed_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that Ctrl-C stopped has a summary, too, but is not finished."""
    (tmp_path / "summary.json").write_text('{"stop_reason": "interrupted"}')
    seen: list[dict[str, object]] = []

    def train(texts: object, **how: object) -> TrainResult:
        seen.append(how)
        raise KeyboardInterrupt

    monkeypatch.setattr(seeds, "train", train)
    with pytest.raises(KeyboardInterrupt):
        seeds.train_seed(tmp_path, ["text"], {})
    assert seen[0]["resume"] == "auto"


def test_settings_are_read_as_toml() -> None:
    given = ["steps=4", "learning_rate=1e-3", "bias=false", "optimizer=muon"]
    settings = {"steps": 4, "learning_rate": 1e-3, "bias": False, "optimizer": "muon"}
    assert seeds.parse_settings(given) == settings
    for wrong, complaint in {
        "steps": "give key=value",
        "step=4": "did you mean steps",
        "seed=1": "give --first-seed",
    }.items():
        with pytest.raises(ValueError, match=complaint):
            seeds.parse_settings([wrong])


# --- curves

OUTPUT = """\
number of parameters: 0.80M
step 0: train loss 4.1660, val loss 4.1652
iter 0: loss 4.1743, time 5000.00ms, mfu -100.00%
iter 1: loss 4.0000, time 10.00ms, mfu -100.00%
step 2: train loss 3.0000, val loss 3.1000
saving checkpoint to out-shakespeare-char
iter 2: loss 3.5000, time 7000.00ms, mfu -100.00%
iter 3: loss 3.4000, time 20.00ms, mfu 1.00%
step 4: train loss 2.0000, val loss 2.2500
iter 4: loss 3.0000, time 9000.00ms, mfu 1.00%
iter 5: loss 3.0000, time 40.00ms, mfu 1.00%
"""
FAKE = """
import pathlib, sys
flags = dict(word[2:].split("=") for word in sys.argv[2:])  # the last one wins, as in nanoGPT
n, interval = int(flags["max_iters"]), int(flags["eval_interval"])
val = pathlib.Path("data/shakespeare_char/val.bin").stat().st_size // 2
if interval < n:
    assert n % interval == 0 and flags["lr_decay_iters"] == str(n) and flags["batch_size"] == "4"
    assert (int(flags["eval_iters"]) - 1) * 64 < val <= int(flags["eval_iters"]) * 64
for i in range(n + 1):
    if i % interval == 0:
        print(f"step {i}: train loss 1.0, val loss {4 - i / 100:.4f}")
    print(f"iter {i}: loss 4.0, time 10.00ms, mfu -100.00%")
"""


def test_nanogpt_lines_become_a_curve() -> None:
    """The iterations 0, 2 and 4, with evaluations, count as the median of 10, 20 and 40 ms."""
    points = curves.parse_nanogpt(OUTPUT)
    assert [point.val_loss for point in points] == [4.1652, 3.1, 2.25]
    assert [point.seconds for point in points] == pytest.approx([0, 0.03, 0.07])


@pytest.mark.parametrize(("limit", "last"), [(None, 100), (41, 40)])
def test_a_clone_trains_on_the_real_text(
    tmp_path: Path, text_file: Path, limit: int | None, last: int
) -> None:
    """One second of steps of 10 ms, or a limit of iterations."""
    clone = tmp_path / "clone"
    (clone / "config").mkdir(parents=True)
    (clone / "train.py").write_text(FAKE)
    (clone / "config" / "train_shakespeare_char.py").write_text("")
    trainer = curves.text_trainer(SMALL, QUICK, str(text_file))
    curve = curves.nanogpt_curve("nanoGPT", clone, trainer, 1.0, limit)
    assert curve.points[-1].seconds == pytest.approx(last / 100)
    assert curve.points[-1].val_loss == pytest.approx(4 - last / 100)
    assert len(curve.points) == 21


def test_hugging_face_learns(text_file: Path) -> None:
    pytest.importorskip("transformers")
    trainer = curves.text_trainer(SMALL, QUICK, str(text_file))
    twin = curves.TimedHuggingFace(trainer)
    before = twin._val_loss()
    assert before == pytest.approx(np.log(trainer.model.config.vocab_size), abs=0.2)
    points = twin.curve(0.3)
    assert points[-1].seconds >= 0.3
    assert points[-1].val_loss < before


def test_a_preset_keeps_its_budget_within_a_limit() -> None:
    for budget, seconds, expected in [
        ({"minutes": 2.0}, 60, {"minutes": 1.0}),
        ({"minutes": 2.0}, 180, {"minutes": 2.0}),
        ({"steps": 2}, 600, {"steps": 2, "minutes": 10.0}),
        ({"steps": 2, "minutes": 4.0}, 60, {"steps": 2, "minutes": 1.0}),
        ({"epochs": 2.0, "minutes": 4.0}, 600, {"epochs": 2.0, "minutes": 4.0}),
    ]:
        chosen = Preset(model_config=SMALL, train_config=QUICK.replace(**budget))
        assert curves.within(chosen, seconds) == QUICK.replace(**expected)


def test_redraw_makes_a_picture_of_the_points(tmp_path: Path) -> None:
    points = [[0, 4.2], [1.0, 2.5], [10.0, 1.9]]
    names = ["chargpt, preset tiny", "nanoGPT, shape of tiny", "Hugging Face GPT-2, bf16"]
    report = {"curves": [{"name": name, "points": points} for name in names]}
    (tmp_path / "curves.json").write_text(json.dumps(report))
    curves.main(["--redraw", "--out", str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


# --- busy neighbours


def test_neighbours_run_until_the_end_even_of_a_failure() -> None:
    with pytest.raises(RuntimeError), busy_neighbour.neighbours(3) as pids:
        for pid in pids:
            os.kill(pid, 0)  # raises if there is no such process
        raise RuntimeError
    assert len(set(pids)) == 3
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_neighbour_ends_with_the_program_that_started_it() -> None:
    """It is given the number of a program that is not its parent."""
    command = [sys.executable, "-c", busy_neighbour.BUSY_LOOP, "-1"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_jobs_take_turns_and_shares_are_those_of_each_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A machine that becomes slower changes the speeds, not the shares."""
    order: list[tuple[int, int, str]] = []
    n_busy = 0

    @contextmanager
    def neighbours(n: int) -> Iterator[None]:
        nonlocal n_busy
        n_busy = n
        yield

    def job(name: str) -> float:
        order.append((n_busy, torch.get_num_threads(), name))
        round_speed = 1000.0 / (1 + len(order) // 12)
        return round_speed / (1 + n_busy) * (2 if name == "b" else 1)

    monkeypatch.setattr(busy_neighbour, "neighbours", neighbours)
    before = torch.get_num_threads()
    jobs = {name: partial(job, name) for name in "ab"}
    rows = busy_neighbour.measure(jobs, [1, 2], 3)
    assert torch.get_num_threads() == before
    assert order == 3 * [(n, t, name) for n in (0, 1, 3) for name in "ab" for t in (1, 2)]
    first, *_, last = busy_neighbour.table(rows).splitlines()[1:]
    assert first.split() == ["a", "1", "500", "250", "(50%)", "125", "(25%)"]
    assert last.split()[:2] == ["b", "2"]


@pytest.mark.parametrize(
    ("arguments", "jobs", "speed"),
    [
        ([], ["chargpt", "nanoGPT"], 4 * 16 / 0.01),  # steps of 10 ms
        (
            ["--generate"],
            ["chargpt, one text", "chargpt, 32 texts", "nanoGPT, one text", "nanoGPT, 32 texts"],
            32 * 15 / 0.5,
        ),
    ],
)
def test_the_table_has_every_job(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    jobs: list[str],
    speed: float,
) -> None:
    chosen = Preset(model_config=SMALL, train_config=QUICK)
    monkeypatch.setattr(busy_neighbour, "PRESETS", {"tiny": lambda: chosen})
    monkeypatch.setattr(busy_neighbour, "NEIGHBOURS", (0, 1))
    monkeypatch.setattr(busy_neighbour, "nanogpt_writer", lambda *_: lambda n_texts, n_new: 0.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (tmp_path / "config").mkdir()
    (tmp_path / "train.py").write_text(FAKE)
    (tmp_path / "config" / "train_shakespeare_char.py").write_text("")
    command = f"--rounds 1 --seconds 0.001 --nanogpt {tmp_path}"
    busy_neighbour.main([*command.split(), *arguments])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[:24].strip() for row in rows] == jobs
    assert rows[-1][24:].split() == ["1", f"{speed:,.0f}", f"{speed:,.0f}", "(100%)"]


# --- ONNX Runtime


def test_onnx_runtime_writes_beside_chargpt(
    result: TrainResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    write = onnx_speed.onnx_writer(load(result.run), int8=False)
    assert len(write(3 * SMALL.block_size)) == 1 + 3 * SMALL.block_size
    onnx_speed.main([str(result.run), "--characters", "5", "--rounds", "2"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row[:20].strip() for row in rows] == [
        "chargpt", "PyTorch's layers", "ONNX Runtime", "ONNX Runtime, int8",
    ]  # fmt: skip
    assert all(row.endswith("×") for row in rows)
