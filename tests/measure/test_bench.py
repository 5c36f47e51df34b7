"""`chargpt bench`: what it reports and how that hangs together; never how fast something is."""

import json
import pickle
import subprocess
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
from chargpt.measure.peers import NanoGPT, hugging_face, parse_peers
from chargpt.measure.timing import PARTS, timed_step
from chargpt.train import train_step

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


def test_the_report_survives_json_and_has_what_it_promises(report: dict[str, Any]) -> None:
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
    assert 10e6 < train["peak_memory_bytes"] < 1e12  # torch alone is more than 10 MB
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
        ratio = train["characters_per_second"] / report[peer]["characters_per_second"]
        assert train[f"vs_{peer}"] == pytest.approx(ratio)  # of one round
    assert report["nanogpt"]["milliseconds_per_step"] == 2.0  # of 1, 2, 3; the first five were 900


def test_the_share_of_the_ceiling_by_the_papers_formula(report: dict[str, Any]) -> None:
    """6 N + 12 L H Q T FLOP a token, PaLM's appendix B: N counts what multiplies a token."""
    model = synthetic_trainer(SMALL, QUICK).model
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]  # tied: once
    products = sum(matrix.numel() for matrix in matrices) - model.position_embedding.weight.numel()
    per_token = 6 * products + 12 * 2 * 2 * 8 * 16
    ceiling = 1e9 * report["ceilings_gflops"]["fp32"]
    share = report["train"]["characters_per_second"] * per_token / ceiling
    assert report["train"]["ceiling_share"] == pytest.approx(share)


def test_several_rounds_are_summed_up_by_medians() -> None:
    class Fake:
        def __init__(self, name: str, *seconds: float) -> None:
            self.name, self.seconds = name, iter(seconds)

        def measure(self, seconds: float) -> float:
            order.append(self.name)
            return next(self.seconds)

    order: list[str] = []
    turns = [Fake("own", 1.0, 2.0, 4.0), Fake("other", 3.0, 4.0, 4.0)]
    seconds = module._take_turns(turns, BenchConfig(), 12, lambda line: None)
    assert order == ["own", "other"] * 3
    assert module._ratio(seconds, "own", "other") == 2.0  # of 3, 2 and 1
    assert module._ratio(seconds, "own", None) is None
    assert module._speed(seconds["own"], 12) == {
        "characters_per_second": 6.0,
        "characters_per_second_min": 3.0,
        "characters_per_second_max": 12.0,
        "milliseconds_per_step": 2000.0,
    }


def test_the_table_names_everything(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    for start in (
        "device",
        "precision",
        "compile  ",
        "ceiling bf16",
        "training",
        "a step",
        "memory",
    ):
        assert any(line.startswith(start) for line in lines), start
    assert [line.split()[0] for line in lines[-3:]] == ["chargpt", "Hugging", "nanoGPT"]
    assert all("chargpt is" in line for line in lines[-2:])


# --- the parts of a step


def test_the_step_in_parts_is_the_step_of_training() -> None:
    """A step that is timed in parts but does something else would time something else."""
    training = QUICK.replace(gradient_accumulation_steps=2, grad_clip=0.1)
    whole, parts = (synthetic_trainer(SMALL, training) for _ in range(2))
    for trainer in (whole, parts):
        trainer.model.train()
    for step in range(3):
        whole.state.step = parts.state.step = step
        train_step(whole)
        for ours, theirs in zip(
            parts.optimizer.param_groups, whole.optimizer.param_groups, strict=True
        ):
            ours["lr"] = theirs["lr"]
        assert set(timed_step(parts)) == set(PARTS)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, parts.model.state_dict()[name]), name


# --- peers


def test_hugging_faces_model_has_the_same_parameters() -> None:
    pytest.importorskip("transformers")
    trainer = synthetic_trainer(SMALL.replace(d_ff=40), QUICK.replace(precision="bf16"))
    runners: Any = hugging_face(trainer, compiled=False)
    names = [f"Hugging Face GPT-2, {precision}" for precision in ("fp32", "bf16")]
    assert [runner.name for runner in runners] == names
    for runner in runners:
        assert count_parameters(runner.model) == count_parameters(trainer.model)
        assert runner.model.config.attn_pdrop == SMALL.dropout
        before = runner.model.transformer.wte.weight.clone()
        assert runner.measure(0) > 0
        assert not torch.equal(before, runner.model.transformer.wte.weight)


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
    assert peer.measure(1) == 0.002
    assert sorted(clone.rglob("*")) == before
    assert (tmp_path / "trace").exists()
    data = tmp_path / "data" / "shakespeare_char"
    assert np.array_equal(np.fromfile(data / "train.bin", np.uint16), trainer.windows.tokens)
    assert pickle.loads((data / "meta.pkl").read_bytes()) == {"vocab_size": 65}


def test_a_clone_that_fails_is_named_with_its_last_word(tmp_path: Path) -> None:
    clone = clone_in(tmp_path / "broken", "raise RuntimeError('no such luck')")
    (tmp_path / "work").mkdir()
    peer = NanoGPT(clone, synthetic_trainer(SMALL, QUICK), tmp_path / "work", guess=1.0)
    with pytest.raises(UserError, match=r"train\.py failed \(RuntimeError: no such luck\)"):
        peer.measure(0.1)


def test_a_home_folder_may_be_written_short(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    (["--loss", "-1"], "loss is -1.0: give a positive number, nats a character (--loss)"),
    (["text.txt"], "text.txt is read only for --loss: give --loss, too"),
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
        pytest.skip("no mistake here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err


def test_a_preset_and_a_file_set_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def record(*texts: Any, **settings: Any) -> dict[str, Any]:
        asked.update(settings)
        return {}

    monkeypatch.setattr(module, "bench", record)
    file = tmp_path / "my.toml"
    file.write_text('preset = "baby"\nn_layer = 2\nbatch_size = 8')
    with pytest.raises(SystemExit):
        cli.main(["bench", "--config", str(file), "--batch-size", "3", "--json"])
    assert (asked["model_config"].d_model, asked["model_config"].n_layer) == (384, 2)
    assert asked["train_config"].batch_size == 3
    assert asked["config"] == BenchConfig()


def test_help_needs_no_torch_and_shows_the_preset() -> None:
    code = (
        "import sys; sys.argv = ['chargpt', 'bench', '--preset', 'baby', '--help']\n"
        "import chargpt.cli.main as c\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--peer nanogpt=FOLDER" in done.stdout
    assert "Transformer blocks. (6)" in done.stdout


def test_the_synthetic_text_is_a_function_of_the_seed() -> None:
    one, same, other = (
        synthetic_trainer(SMALL, QUICK.replace(seed=seed)).windows.tokens for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.unique().numel() == 65
