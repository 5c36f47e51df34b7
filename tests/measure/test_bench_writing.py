"""`chargpt bench --generate`: what it reports and how that hangs together; never how fast it is."""

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


def test_the_report_survives_json_and_has_what_it_promises(report: dict[str, Any]) -> None:
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


def test_rates_and_ratios_are_those_of_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, name: str, seconds: list[float]) -> None:
            self.name, self.left = name, seconds

        def seconds(self, batch_size: int, n_new: int) -> float | None:
            if n_new > 15:
                return 30.0 if self.name == "chargpt" else None
            return self.left.pop(0)

    own = Fake("chargpt", [1.0, 2.0, 5.0])
    other = Fake(module.HuggingFace.name, [10.0, 10.0, 10.0])
    row = module._measure([own, other], 32, SMALL, BenchConfig(), lambda line: None)
    assert row["characters_per_second"] == 32 * 15 / 2
    assert row["characters_per_second_min"] == 32 * 15 / 5
    assert row["vs_huggingface"] == 5  # of 10, 5 and 2
    assert row["huggingface"] == 32 * 15 / 10
    assert row["past_block_size"] == 32 * 16 / 28  # of 29, 28 and 25 seconds
    assert row["nanogpt"] is None
    assert row["vs_nanogpt"] is None


def test_the_table_shows_every_figure(report: dict[str, Any]) -> None:
    table = generation_table(report)
    for row in report["generate"].values():
        for name in ("characters_per_second", "past_block_size", "huggingface", "nanogpt"):
            assert f"{row[name]:,.0f}" in table
        assert f"{row['vs_nanogpt']:.1f}×" in table


def test_a_clone_that_cannot_write_is_a_mistake_and_stays_as_it_is(tmp_path: Path) -> None:
    clone = clone_in(tmp_path / "broken", "raise RuntimeError('no such luck')")
    before = sorted(clone.rglob("*"))
    config = BenchConfig(rounds=1, peers=(f"nanogpt={clone}",))
    with pytest.raises(UserError, match="no such luck.*see whether it runs alone"):
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
