"""`chargpt bench`: what it reports and whether its figures agree; never how fast something is."""

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK, SMALL

import chargpt.train
from chargpt.base.errors import UserError
from chargpt.cli import main as cli
from chargpt.compute.counts import count_parameters
from chargpt.config import DataConfig
from chargpt.measure import bench as module
from chargpt.measure import timing
from chargpt.measure.bench import BenchConfig, bench, seconds_to_loss, synthetic_trainer, table
from chargpt.measure.contenders import (
    Contender,
    NanoGPT,
    hugging_face_trainers,
    parse_peers,
    ratio,
    summary,
    take_turns,
)
from chargpt.measure.timing import median_seconds, step_parts
from chargpt.train import PARTS, train_step

SHAPE = "--n-layer 1 --n-head 2 --d-model 16 --block-size 16 --batch-size 4 --device cpu".split()
QUICKLY = ["--rounds", "1", "--seconds", "0.001"]
FLAGS = {
    "device": "cpu",
    "compile": "False",
    "eval_iters": "1",
    "log_interval": "1",
    "always_save_checkpoint": "False",
    "gradient_accumulation_steps": "1",
    "batch_size": "4",
    "block_size": "16",
    "n_layer": "2",
    "n_head": "2",
    "n_embd": "16",
    "dropout": "0.1",
}
FAKE = f"""
import pathlib, pickle, sys
flags = dict(word[2:].split("=") for word in sys.argv[2:])
assert sys.argv[1] == "config/train_shakespeare_char.py" and pathlib.Path(sys.argv[1]).exists()
for name, value in {FLAGS!r}.items():
    assert flags[name] == value, name
assert int(flags["eval_interval"]) > int(flags["max_iters"])
assert pickle.load(open("data/shakespeare_char/meta.pkl", "rb"))["vocab_size"] == 65
assert pathlib.Path("data/shakespeare_char/train.bin").stat().st_size == 2 * 180_000
pathlib.Path("trace").write_text("written where it runs")
print("step 0: train loss 4.2, val loss 4.2")
for i in range(int(flags["max_iters"]) + 1):
    slow = 900 if i < 5 else 0
    print(f"iter {{i}}: loss 4.1743, time {{slow + 1 + i % 3:.2f}}ms, mfu -100.00%")
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chargpt.train, "plot_loss", lambda _: None)
        patch.setattr(timing, "CEILING_SECONDS", 0.0)
        yield


def clone_in(folder: Path, script: str = FAKE) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text(script)
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone_in(tmp_path_factory.mktemp("peer") / "nanoGPT")


@pytest.fixture(scope="module")
def report(clone: Path) -> dict[str, Any]:
    config = BenchConfig(rounds=1, seconds=0.01, peers=(f"nanogpt={clone}",))
    return bench(model_config=SMALL, train_config=QUICK, config=config)


# --- the report


def test_the_report_is_json_with_all_its_keys(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {
        *("machine", "choices", "ceilings_gflops", "train", "model"),
        *("parts_milliseconds", "huggingface", "nanogpt", "loss"),
    }
    assert set(report["ceilings_gflops"]) == {"fp32", "bf16"}
    assert set(report["parts_milliseconds"]) == set(PARTS)
    machine, train = report["machine"], report["train"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["cpu"]
    assert machine["precision"] == "fp32"
    assert report["choices"]["compile"].startswith("off (")
    assert train["characters_per_step"] == 4 * 16
    assert isinstance(train["peak_memory_bytes"], int)
    assert 10e6 < train["peak_memory_bytes"] < 1e12  # torch alone takes more than 10 MB
    assert report["loss"] is None
    numbers = [*report["ceilings_gflops"].values(), *report["parts_milliseconds"].values()]
    for speed in (train, report["huggingface"], report["nanogpt"]):
        numbers += [value for name, value in speed.items() if name.startswith("characters_per_s")]
        numbers.append(speed["milliseconds_per_step"])
    assert all(number > 0 for number in numbers)


def test_speeds_and_ratios_agree(report: dict[str, Any]) -> None:
    train = report["train"]
    for speed in (train, report["huggingface"], report["nanogpt"]):
        seconds = speed["milliseconds_per_step"] / 1000
        assert speed["characters_per_second"] * seconds == pytest.approx(64)
    for peer in ("huggingface", "nanogpt"):
        times = train["characters_per_second"] / report[peer]["characters_per_second"]
        assert train[f"vs_{peer}"] == pytest.approx(times)
    # The median of 1, 2 and 3 ms; the first five took 900 ms.
    assert report["nanogpt"]["milliseconds_per_step"] == 2.0


def test_the_share_of_the_ceiling_follows_palm(report: dict[str, Any]) -> None:
    """PaLM, appendix B: 6 N + 12 L H Q T FLOP per token; N counts the matrices' weights."""
    model = synthetic_trainer(SMALL, QUICK).model
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]  # tied: once
    products = sum(matrix.numel() for matrix in matrices) - model.position_embedding.weight.numel()
    per_token = 6 * products + 12 * 2 * 2 * 8 * 16
    ceiling = 1e9 * report["ceilings_gflops"]["fp32"]
    share = report["train"]["characters_per_second"] * per_token / ceiling
    assert report["train"]["ceiling_share"] == pytest.approx(share)


def test_contenders_take_turns_and_medians_sum_up_the_rounds() -> None:
    def fake(name: str, *rates: float) -> Contender:
        left = iter(rates)

        def measure() -> float:
            order.append(name)
            return next(left)

        return Contender(name, measure)

    order: list[str] = []
    contenders = [fake("chargpt", 12.0, 6.0, 3.0), fake("other", 4.0, 3.0, 3.0)]
    rates = take_turns(contenders, 3, lambda line: None)
    assert order == ["chargpt", "other"] * 3
    assert ratio(rates, "other") == 2.0  # median of 3, 2 and 1
    assert ratio(rates, "missing") is None
    assert summary(rates["chargpt"]) == {
        "characters_per_second": 6.0,
        "characters_per_second_min": 3.0,
        "characters_per_second_max": 12.0,
    }


def test_the_table_names_everything(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    starts = ("device", "precision", "compile  ", "ceiling bf16", "training", "a step", "memory")
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    assert [line.split()[0] for line in lines[-3:]] == ["chargpt", "Hugging", "nanoGPT"]
    assert all("chargpt is" in line for line in lines[-2:])


# --- the parts of a step


def test_timing_the_parts_of_a_step_leaves_the_update_unchanged() -> None:
    training = QUICK.replace(gradient_accumulation_steps=2, grad_clip=0.1)
    timed, plain = (synthetic_trainer(SMALL, training) for _ in range(2))
    assert set(step_parts(timed)) == set(PARTS)
    plain.model.train()
    for step in range(timing.PART_STEPS):
        plain.state.step = step
        train_step(plain)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, timed.model.state_dict()[name]), name


# --- peers


def test_hugging_faces_model_has_the_same_parameters() -> None:
    pytest.importorskip("transformers")
    trainer = synthetic_trainer(SMALL.replace(d_ff=40), QUICK.replace(precision="bf16"))
    peers = hugging_face_trainers(trainer, compiled=False)
    names = [f"Hugging Face GPT-2, {precision}" for precision in ("fp32", "bf16")]
    assert [peer.name for peer in peers] == names
    for peer in peers:
        assert count_parameters(peer.model) == count_parameters(trainer.model)
        assert peer.model.config.attn_pdrop == SMALL.dropout
        before = peer.model.transformer.wte.weight.clone()
        assert median_seconds(peer.step, 0, trainer.device) > 0
        assert not torch.equal(before, peer.model.transformer.wte.weight)


def test_without_transformers_there_is_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *SHAPE, *QUICKLY, "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (stop.value.code, captured.out.count("\n")) == (0, 1)
    assert "round 1 of 1: chargpt: " in captured.err
    assert report["train"]["vs_huggingface"] is None
    assert report["huggingface"]["characters_per_second"] is None
    assert report["nanogpt"] is report["train"]["vs_nanogpt"] is None
    assert report["model"]["n_layer"] == 1
    assert table(report).endswith("not installed: pip install transformers")


def test_a_clone_is_run_in_a_copy(clone: Path, tmp_path: Path) -> None:
    before = sorted(clone.rglob("*"))
    trainer = synthetic_trainer(SMALL, QUICK)
    peer = NanoGPT(clone, trainer, tmp_path, guess=0.1)
    assert peer.step_seconds(1) == 0.002
    assert sorted(clone.rglob("*")) == before
    assert (tmp_path / "trace").exists()
    data = tmp_path / "data" / "shakespeare_char"
    assert np.array_equal(np.fromfile(data / "train.bin", np.uint16), trainer.windows.tokens)
    assert pickle.loads((data / "meta.pkl").read_bytes()) == {"vocab_size": 65}


def test_a_clone_that_fails_is_named_with_its_last_line(tmp_path: Path) -> None:
    clone = clone_in(tmp_path / "broken", "raise RuntimeError('no such luck')")
    (tmp_path / "work").mkdir()
    peer = NanoGPT(clone, synthetic_trainer(SMALL, QUICK), tmp_path / "work", guess=1.0)
    with pytest.raises(UserError, match=r"train\.py failed \(RuntimeError: no such luck\)"):
        peer.step_seconds(0.1)


def test_a_tilde_stands_for_the_home_folder(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clone.parent))
    assert parse_peers(["nanogpt=~/nanoGPT"]) == {"nanogpt": clone}


# --- seconds to a loss


def test_seconds_to_a_loss(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reach(loss: float) -> dict[str, Any]:
        return seconds_to_loss(
            loss, [str(text_file)], model_config=SMALL, train_config=QUICK, data_config=DataConfig()
        )

    reached, missed = reach(100.0), reach(0.001)
    assert reached["step"] == 5  # the first evaluation
    assert 0 < reached["seconds"] < reached["train_seconds"]
    assert (missed["step"], missed["seconds"]) == (None, None)
    assert missed["best"] == pytest.approx(reached["best"])
    assert module._reached(reached).startswith("after ")
    assert f"the best was {missed['best']:.4f}" in module._reached(missed)
    assert capsys.readouterr().out == ""


def test_the_loss_is_part_of_the_report(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as stop:
        steps = ["--steps", "3", "--loss", "100"]
        cli.main(["bench", str(text_file), *SHAPE, *QUICKLY, *steps])
    assert stop.value.code == 0
    assert "loss 100       after 0." in capsys.readouterr().out


# --- the command line

MISTAKES = [
    (["--peer", "nanogp=x"], "--peer nanogp=x: unknown setting 'nanogp': did you mean nanogpt?"),
    (["--peer", "nanogpt"], "--peer nanogpt names no folder: give --peer nanogpt=FOLDER"),
    (["--peer", "nanogpt=."], "--peer nanogpt=. has no train.py: give the folder of a clone of"),
    (["--rounds", "0"], "rounds is 0: give a whole number of at least 1 (--rounds)"),
    (["--seconds", "0"], "seconds is 0.0: give a positive number (--seconds)"),
    (["--seconds", "nan"], "seconds is nan: give a positive number"),
    (["--loss", "-1"], "loss is -1.0: give a positive number, in nats per character (--loss)"),
    (["text.txt"], "text.txt is only read to reach a loss: give --loss, too"),
    (["text.txt", "--loss", "2"], "text.txt: no such file"),
    (["--n-head", "3"], "n_head is 3, which does not divide d_model 128"),
    (["--vocab-size", "7"], "vocab_size is 7, but the text has 65 distinct tokens"),
    (["--round", "1"], "did you mean --rounds?"),
    (["--device", "cuda"], "device is 'cuda', which this PyTorch does not find"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err


def test_a_preset_and_a_file_set_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def record(*texts: Any, **settings: Any) -> dict[str, Any]:
        given.update(settings)
        return {}

    monkeypatch.setattr(module, "bench", record)
    file = tmp_path / "my.toml"
    file.write_text('preset = "baby"\nn_layer = 2\nbatch_size = 8')
    with pytest.raises(SystemExit):
        cli.main(["bench", "--config", str(file), "--batch-size", "3", "--json"])
    assert (given["model_config"].d_model, given["model_config"].n_layer) == (384, 2)
    assert given["train_config"].batch_size == 3
    assert given["config"] == BenchConfig()


def test_the_synthetic_text_depends_on_the_seed() -> None:
    one, same, other = (
        synthetic_trainer(SMALL, QUICK.replace(seed=seed)).windows.tokens for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.unique().numel() == 65
