"""`chargpt bench`: what it reports and whether its figures agree; never how fast something is."""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL
from variants import kernels_of

import chargpt.train
from chargpt.base.errors import TrainingError, UserError
from chargpt.cli import main as cli
from chargpt.compute.counts import count_parameters
from chargpt.compute.fast_layers import FastLayerNorm, FastLinear
from chargpt.compute.muon import muon_update
from chargpt.config import DataConfig
from chargpt.measure import bench as module
from chargpt.measure import bench_writing, timing
from chargpt.measure.bench import (
    BenchConfig,
    bench,
    seconds_to_loss,
    synthetic_plan,
    synthetic_trainer,
    table,
)
from chargpt.measure.bench_writing import bench_generation, compare_writers, generation_table
from chargpt.measure.contenders import compare, find_clone
from chargpt.measure.timing import median_seconds, step_parts
from chargpt.train import PARTS, train_step

SHAPE = "--n-layer 1 --n-head 2 --d-model 16 --block-size 16 --batch-size 4 --device cpu".split()
QUICKLY = ["--rounds", "1", "--seconds", "0.001"]
TRAIN = """
import hashlib, pathlib, pickle, sys
assert sys.argv[1] == "config/train_shakespeare_char.py" and pathlib.Path(sys.argv[1]).exists()
assert set(
    "--device=cpu --compile=False --eval_iters=1 --log_interval=1 --always_save_checkpoint=False "
    "--gradient_accumulation_steps=1 --batch_size=4 --block_size=16 --n_layer=2 --n_head=2 "
    "--n_embd=16 --dropout=0.1".split()
) <= set(sys.argv)
flags = dict(word[2:].split("=") for word in sys.argv[2:])
assert int(flags["eval_interval"]) > int(flags["max_iters"])
data = pathlib.Path("data/shakespeare_char")
assert pickle.loads((data / "meta.pkl").read_bytes()) == {"vocab_size": 65}
assert hashlib.sha256((data / "train.bin").read_bytes()).hexdigest() == "TOKENS"
pathlib.Path("trace").write_text("written where it runs")
print("step 0: train loss 4.2, val loss 4.2")
for i in range(int(flags["max_iters"]) + 1):
    slow = 900 if i < 5 else 0
    print(f"iter {i}: loss 4.1743, time {slow + 1 + i % 3:.2f}ms, mfu -100.00%")
"""
MODEL = """
import torch
class GPTConfig:
    def __init__(self, **its):
        assert its == dict(vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=True)
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
    def generate(self, ids, n, temperature=1.0):
        assert ids.shape[1] == 1 and (n, temperature) in [(2, 1.0), (15, 0.8)], (ids.shape, n)
        return ids
"""
BROKEN = "raise RuntimeError('no such luck')"


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chargpt.train, "plot_loss", lambda _: None)
        patch.setattr(timing, "CEILING_SECONDS", 0.0)
        yield


def clone_in(folder: Path, train: str, model: str) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text(train)
    (folder / "model.py").write_text(model)
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokens = synthetic_trainer(SMALL, QUICK).windows.tokens.astype("uint16")
    script = TRAIN.replace("TOKENS", hashlib.sha256(tokens.tobytes()).hexdigest())
    return clone_in(tmp_path_factory.mktemp("peer") / "nanoGPT", script, MODEL)


@pytest.fixture(scope="module")
def report(clone: Path) -> dict[str, Any]:
    config = BenchConfig(rounds=1, seconds=0.01, peers=(f"nanogpt={clone}",))
    before = sorted(clone.rglob("*"))
    figures = bench(model_config=SMALL, train_config=QUICK, config=config)
    assert sorted(clone.rglob("*")) == before
    return figures


@pytest.fixture(scope="module")
def writing(clone: Path) -> dict[str, Any]:
    config = BenchConfig(rounds=2, peers=(f"nanogpt={clone}",))
    return bench_generation(model_config=SMALL, config=config)


# --- training


def test_the_report_is_json_with_all_its_keys(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {
        *("machine", "choices", "ceilings_gflops", "train", "model"),
        *("parts_milliseconds", "pytorch", "huggingface", "nanogpt", "loss"),
    }
    assert set(report["ceilings_gflops"]) == {"fp32", "bf16"}
    assert set(report["parts_milliseconds"]) == set(PARTS)
    machine, train = report["machine"], report["train"]
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["cpu"] and machine["precision"] == "fp32"
    assert report["choices"]["compile"].startswith("off (")
    assert 10e6 < train["peak_memory_bytes"] < 1e12  # torch alone takes more than 10 MB
    assert report["loss"] is None
    numbers = [*report["ceilings_gflops"].values(), *report["parts_milliseconds"].values()]
    assert all(number > 0 for number in numbers)


def test_speeds_and_ratios_agree(report: dict[str, Any]) -> None:
    train = report["train"]
    peers = [name for name in ("pytorch", "huggingface", "nanogpt") if report[name]]
    for speed in (train, *(report[name] for name in peers)):
        seconds = speed["milliseconds_per_step"] / 1000
        assert speed["characters_per_second"] * seconds == pytest.approx(4 * 16)
    for peer in peers:
        times = train["characters_per_second"] / report[peer]["characters_per_second"]
        assert train[f"vs_{peer}"] == pytest.approx(times)
    # The median of 1, 2 and 3 ms; the first five took 900 ms.
    assert report["nanogpt"]["milliseconds_per_step"] == pytest.approx(2.0)


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
    def fake(name: str, *seconds: float) -> Callable[[], float]:
        left = iter(seconds)
        return lambda: order.append(name) or next(left)

    order: list[str] = []
    jobs = {"chargpt": fake("chargpt", 1.0, 2.0, 4.0), "other": fake("other", 3.0, 4.0, 4.0)}
    figures = compare(jobs, 12, 3, lambda line: None)
    assert order == ["chargpt", "other"] * 3
    assert figures["other"].times == 2.0  # median of 3, 2 and 1
    assert list(figures["chargpt"].speed.values()) == [6.0, 3.0, 12.0]


def test_the_table_names_everything(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    starts = ("device", "precision", "compile  ", "ceiling bf16", "training", "a step", "memory")
    for start in starts:
        assert any(line.startswith(start) for line in lines), start
    plain = ["PyTorch's"] if report["pytorch"] else []
    names = ["chargpt", *plain, "Hugging", "nanoGPT"]
    assert [line.split()[0] for line in lines[-len(names) :]] == names
    assert all("chargpt is" in line for line in lines[-len(names) + 1 :])


def test_timing_the_parts_of_a_step_leaves_the_update_unchanged() -> None:
    training = QUICK.replace(gradient_accumulation_steps=2, grad_clip=0.1)
    timed, plain = (synthetic_trainer(SMALL, training) for _ in range(2))
    step_parts(timed)
    plain.model.train()
    for step in range(timing.PART_STEPS):
        plain.state.step = step
        train_step(plain)
    for name, weight in plain.model.state_dict().items():
        assert torch.equal(weight, timed.model.state_dict()[name]), name


def test_pytorchs_layers_take_part_if_the_kernels_are_on(kernels: Any) -> None:
    config, shape = BenchConfig(rounds=1, seconds=0.001), SMALL.replace(d_model=32)
    training = QUICK.replace(kernels=kernels)
    trained = bench(model_config=shape, train_config=training, config=config)
    written = bench_generation(model_config=shape, kernels=kernels, config=config)
    rows = [trained["pytorch"], trained["train"]["vs_pytorch"]]
    for row in written["generate"].values():
        rows += [row["pytorch"], row["vs_pytorch"]]
    assert [row is not None for row in rows] == [kernels == "on"] * 6


def test_the_trainer_without_kernels_learns_the_same_and_disturbs_nothing() -> None:
    kernels_of("native")
    training = QUICK.replace(kernels="on", optimizer="muon")
    alone, own = (synthetic_plan(SMALL.replace(dropout=0.0), training).trainer for _ in range(2))
    plain = module._without_kernels(own)
    assert {type(layer) for layer in plain.model.modules()} & {FastLinear, FastLayerNorm} == set()
    for _ in range(3):
        losses = []
        for trainer in (alone, own, plain):
            losses.append(train_step(trainer).loss)
            trainer.state.step += 1
        assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert plain.optimizer.muon_update is muon_update  # type: ignore[attr-defined]
    for name, weight in alone.model.state_dict().items():
        assert torch.equal(weight, own.model.state_dict()[name]), name


def test_hugging_faces_model_has_the_same_parameters() -> None:
    pytest.importorskip("transformers")
    trainer = synthetic_trainer(SMALL.replace(d_ff=40), QUICK.replace(precision="bf16"))
    steps = module._hugging_face_steps(trainer)
    assert list(steps) == [f"Hugging Face GPT-2, {name}" for name in ("fp32", "bf16")]
    for step in steps.values():
        model = step.__self__.model  # type: ignore[attr-defined]
        assert count_parameters(model) == count_parameters(trainer.model)
        assert model.config.attn_pdrop == SMALL.dropout
        before = model.transformer.wte.weight.clone()
        assert median_seconds(step, 0, trainer.device) > 0
        assert not torch.equal(before, model.transformer.wte.weight)


def test_without_transformers_there_is_a_remedy(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    loss = ["--steps", "3", "--loss", "100"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", str(text_file), *SHAPE, *QUICKLY, *loss, "--json"])
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert (stop.value.code, captured.out.count("\n")) == (0, 1)
    assert "round 1 of 1: chargpt: " in captured.err
    assert report["train"]["vs_huggingface"] is None
    assert report["huggingface"]["characters_per_second"] is None
    assert report["nanogpt"] is report["train"]["vs_nanogpt"] is None
    assert report["model"]["n_layer"] == 1
    lines = table(report).splitlines()
    assert lines[-1].endswith("not installed: pip install transformers")
    assert any(line.startswith("loss 100       after 0.") for line in lines)


def test_seconds_to_a_loss(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = {"model_config": SMALL, "train_config": QUICK, "data_config": DataConfig()}
    reached, missed = (
        seconds_to_loss(loss, [str(text_file)], **configs) for loss in (100.0, 0.001)
    )
    assert reached["step"] == 5  # the first evaluation
    assert 0 < reached["seconds"] < reached["train_seconds"]
    assert (missed["step"], missed["seconds"]) == (None, None)
    assert missed["best"] == pytest.approx(reached["best"])
    assert f"the best was {missed['best']:.4f}" in module._reached(missed)
    assert capsys.readouterr().out == ""


# --- writing


def test_the_report_of_writing_is_json_with_all_its_keys(writing: dict[str, Any]) -> None:
    assert json.loads(json.dumps(writing)) == writing
    assert set(writing) == {"machine", "model", "parameters", "decoder", "generate"}
    assert set(writing["generate"]) == {"batch_1", "batch_32"}
    table = generation_table(writing)
    for row in writing["generate"].values():
        assert set(row) == {
            *("characters_per_second", "characters_per_second_min", "characters_per_second_max"),
            *("past_block_size", "huggingface", "vs_huggingface", "nanogpt", "vs_nanogpt"),
            *("pytorch", "vs_pytorch"),
        }
        assert all(math.isfinite(value) and value > 0 for value in row.values() if value)
        for name in ("characters_per_second", "past_block_size", "huggingface", "nanogpt"):
            assert f"{row[name]:,.0f}" in table
        assert f"{row['vs_nanogpt']:.1f}×" in table


def test_writing_past_block_size_and_ratios() -> None:
    own = {15: [1.0, 1.0, 2.0, 1.0, 5.0, 1.0], 31: [29.0, 30.0, 26.0]}
    writers = {
        "chargpt": lambda n_texts, n_new: own[n_new].pop(0),
        "PyTorch's layers": lambda n_texts, n_new: 4.0,
        bench_writing.HUGGING_FACE: lambda n_texts, n_new: 10.0,
    }
    row = compare_writers(writers, 32, 16, 3, lambda line: None)
    assert row["characters_per_second"] == 32 * 15 / 2
    assert row["vs_huggingface"] == 5  # median of 10, 5 and 2
    assert row["huggingface"] == 32 * 15 / 10
    assert row["vs_pytorch"] == 2  # median of 4, 2 and 0.8
    assert row["past_block_size"] == pytest.approx(32 * 16 / 28)  # of 28, 29 and 25 seconds
    assert row["nanogpt"] is row["vs_nanogpt"] is None


def test_the_command_prints_a_table_of_writing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--generate", "--rounds", "1", *SHAPE])
    assert stop.value.code == 0
    assert "one text" in capsys.readouterr().out


# --- mistakes

BENCHES: list[Callable[[BenchConfig], Any]] = [
    lambda config: bench(model_config=SMALL, train_config=QUICK, config=config),
    lambda config: bench_generation(model_config=SMALL, device="cpu", config=config),
]


@pytest.mark.parametrize("run", BENCHES, ids=["train", "generate"])
def test_a_clone_that_fails_is_named_with_its_last_line(
    run: Callable[[BenchConfig], Any], tmp_path: Path
) -> None:
    clone = clone_in(tmp_path / "broken", BROKEN, BROKEN)
    before = sorted(clone.rglob("*"))
    message = r"(train|model)\.py failed \(RuntimeError: no such luck\): check whether it runs on"
    with pytest.raises(UserError, match=message):
        run(BenchConfig(rounds=1, seconds=0.01, peers=(f"nanogpt={clone}",)))
    assert sorted(clone.rglob("*")) == before


@pytest.mark.parametrize("run", BENCHES, ids=["train", "generate"])
def test_out_of_memory_is_one_line(
    run: Callable[[BenchConfig], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(module.contenders, "compare", fail)
    with pytest.raises(
        TrainingError, match="^out of memory on cpu, .*: give a lower --.* or --.*$"
    ):
        run(BenchConfig(seconds=0.001))


def test_a_tilde_stands_for_the_home_folder(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(clone.parent))
    assert find_clone(["nanogpt=~/nanoGPT"]) == clone


MISTAKES = [
    ("--peer nanogp=x", "--peer nanogp=x: unknown name 'nanogp': did you mean nanogpt?"),
    ("--peer nanogpt", "--peer nanogpt names no folder: give --peer nanogpt=FOLDER"),
    ("--peer nanogpt=.", "--peer nanogpt=. has no train.py: give the folder of a clone of"),
    ("--rounds 0", "rounds is 0: give a whole number of at least 1 (--rounds)"),
    ("--seconds 0", "seconds is 0.0: give a positive number (--seconds)"),
    ("--loss -1", "loss is -1.0: give a positive number, in nats per character (--loss)"),
    ("text.txt", "text.txt is read only for --loss: give --loss, too"),
    ("text.txt --loss 2", "there is no file text.txt"),
    ("--generate --loss 1.5", "--generate does not train"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments.split()])
    captured = capsys.readouterr()
    assert (stop.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert message in captured.err


def test_a_preset_and_a_file_set_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(module, "bench", lambda texts, **settings: given.update(settings))
    file = tmp_path / "my.toml"
    file.write_text('preset = "baby"\nn_layer = 2\nbatch_size = 8')
    with pytest.raises(SystemExit):
        cli.main(["bench", "--config", str(file), "--batch-size", "3", "--json"])
    assert (given["model_config"].d_model, given["model_config"].n_layer) == (384, 2)
    assert given["train_config"].batch_size == 3
    assert given["config"] == BenchConfig()
