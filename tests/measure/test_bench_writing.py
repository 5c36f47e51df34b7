"""`chargpt bench --generate`: what it reports and whether its figures agree; never its speed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL

from chargpt.base.errors import UserError
from chargpt.cli import main as cli
from chargpt.measure import bench_writing as module
from chargpt.measure.bench import BenchConfig
from chargpt.measure.bench_writing import bench_generation, generation_table
from chargpt.measure.contenders import take_turns

FAKE = """
import torch
class GPTConfig:
    def __init__(self, **shape):
        assert shape == dict(
            vocab_size=65, block_size=16, n_layer=2, n_head=2, n_embd=16, bias=True
        ), shape
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
    def generate(self, ids, n, temperature=1.0):
        assert ids.shape[1] == 1 and (n, temperature) in [(2, 1.0), (15, 0.8)], (ids.shape, n)
        return ids
"""


def clone_in(folder: Path, script: str = FAKE) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "train.py").write_text("")
    (folder / "model.py").write_text(script)
    (folder / "config" / "train_shakespeare_char.py").write_text("")
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    clone = clone_in(tmp_path_factory.mktemp("peer") / "nanoGPT")
    config = BenchConfig(rounds=2, peers=(f"nanogpt={clone}",))
    return bench_generation(model_config=SMALL, config=config)


def test_the_report_is_json_with_all_its_keys(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report)) == report
    assert set(report) == {"machine", "model", "parameters", "decoder", "generate"}
    assert set(report["generate"]) == {"batch_1", "batch_32"}
    for row in report["generate"].values():
        assert set(row) == {
            *("characters_per_second", "characters_per_second_min", "characters_per_second_max"),
            *("past_block_size", "huggingface", "vs_huggingface", "nanogpt", "vs_nanogpt"),
        }
        assert all(math.isfinite(value) and value > 0 for value in row.values())
        slowest, fastest = row["characters_per_second_min"], row["characters_per_second_max"]
        assert slowest <= row["characters_per_second"] <= fastest


def test_rates_past_block_size_and_ratios() -> None:
    own = {15: [1.0, 1.0, 2.0, 1.0, 5.0, 1.0], 31: [29.0, 30.0, 26.0]}
    writers = {
        "chargpt": lambda n_texts, n_new: own[n_new].pop(0),
        module.HUGGING_FACE: lambda n_texts, n_new: 10.0,
    }
    contenders = module.make_contenders(writers, 32, 16)
    row = module._row(take_turns(contenders, 3, lambda line: None))
    assert row["characters_per_second"] == 32 * 15 / 2
    assert row["characters_per_second_min"] == 32 * 15 / 5
    assert row["vs_huggingface"] == 5  # median of 10, 5 and 2
    assert row["huggingface"] == 32 * 15 / 10
    assert row["past_block_size"] == 32 * 16 / 28  # median of 28, 29 and 25 seconds
    assert row["nanogpt"] is None
    assert row["vs_nanogpt"] is None


def test_the_table_shows_every_figure(report: dict[str, Any]) -> None:
    table = generation_table(report)
    for row in report["generate"].values():
        for name in ("characters_per_second", "past_block_size", "huggingface", "nanogpt"):
            assert f"{row[name]:,.0f}" in table
        assert f"{row['vs_nanogpt']:.1f}×" in table


def test_a_clone_that_fails_is_an_error_and_stays_unchanged(tmp_path: Path) -> None:
    clone = clone_in(tmp_path / "broken", "raise RuntimeError('no such luck')")
    before = sorted(clone.rglob("*"))
    config = BenchConfig(rounds=1, peers=(f"nanogpt={clone}",))
    with pytest.raises(UserError, match="no such luck.*check whether it runs on its own"):
        bench_generation(model_config=SMALL, config=config)
    assert sorted(clone.rglob("*")) == before


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    shape = "--n-layer 1 --n-head 2 --d-model 16 --block-size 8 --device cpu".split()
    for flag in ([], ["--json"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", "--generate", "--rounds", "1", *shape, *flag])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert json.loads(out)["generate"] if flag else "one text" in out


def test_generate_and_loss_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--generate", "--loss", "1.5"])
    assert stop.value.code == 2
    assert "--generate does not train" in capsys.readouterr().err
