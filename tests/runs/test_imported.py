"""A model that was trained elsewhere, as a run: what works, and what has no text to work with."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import words

import chargpt
from chargpt.base.errors import UserError
from chargpt.cli import main as cli
from chargpt.data.tokenizer import CharTokenizer
from chargpt.generate import sample
from chargpt.measure.inspect import inspect_run
from chargpt.runs.folder import load, read_config
from chargpt.runs.imported import write_imported_run
from chargpt.train import train

TOKENIZER = CharTokenizer(set(words(1000)))


@pytest.fixture
def model() -> chargpt.GPT2:
    torch.manual_seed(0)
    shape = chargpt.GPT2Config(block_size=16, n_layer=1, n_head=2, d_model=16)
    return chargpt.GPT2(shape.replace(vocab_size=TOKENIZER.vocab_size)).eval()


@pytest.fixture
def run(tmp_path: Path, model: chargpt.GPT2, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder ``run`` of the current folder."""
    monkeypatch.chdir(tmp_path)
    write_imported_run(Path("run"), model, TOKENIZER, origin="nanoGPT", step=7, val_loss=1.5)
    return Path("run")


def command(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(line.split())
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def test_the_model_is_the_same(run: Path, model: chargpt.GPT2) -> None:
    ids = torch.arange(15)[None] % TOKENIZER.vocab_size
    for which in ("best", "last"):
        loaded = load(run, which=which)  # type: ignore[arg-type]
        assert loaded.tokenizer == TOKENIZER
        assert loaded.model.config == model.config
        assert torch.equal(loaded.model(ids), model(ids))
    assert read_config(run).imported_from == "nanoGPT"
    assert [entry.name for entry in run.parent.iterdir()] == ["run"]


def test_commands_that_need_only_a_model_work(
    run: Path, model: chargpt.GPT2, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = command(capsys, "sample run --prompt the --max-new-tokens 9 --seed 3")
    assert (code, out.rstrip("\n")) == (
        0, sample(model, TOKENIZER, prompt="the", max_new_tokens=9, seed=3).rstrip("\n"),
    )  # fmt: skip
    Path("text.txt").write_text(words(200), encoding="utf-8")
    code, out, err = command(capsys, "eval run text.txt")
    assert code == 0
    assert "text.txt: 200 tokens" in out
    assert "no baselines: the run was imported from nanoGPT" in err
    code, out, _ = command(capsys, "check run")
    assert code == 0
    assert {finding.part for finding in inspect_run(run)} == {
        "config.json", "tokenizer.json", "best",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("eval run", "name a file to evaluate on"),
        ("novelty run --device cpu", "novelty needs the text"),
        ("novelty run --samples text.txt", "novelty needs the text"),
        ("train --out run --resume", "with another --out"),
        ("train text.txt --out run --resume", "with another --out"),
        ("train text.txt --out run --resume auto", "with another --out"),
        ("train text.txt --out run", "already has a run: give another --out"),
    ],
)
def test_commands_that_need_a_text_or_an_optimizer_say_so(
    run: Path, capsys: pytest.CaptureFixture[str], line: str, remedy: str
) -> None:
    Path("text.txt").write_text(words(3000), encoding="utf-8")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, out, err = command(capsys, line)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "imported from nanoGPT" in err or "already has a run" in err
    assert remedy in err
    with pytest.raises(UserError, match="imported from nanoGPT"):
        train("text.txt", out=run, resume=True, quiet=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_lost_checkpoint_is_found(run: Path) -> None:
    (run / "best").rename("elsewhere")
    assert [finding.part for finding in inspect_run(run) if not finding.good] == ["best"]
    with pytest.raises(UserError, match="run has no checkpoint"):
        load(run)


def test_what_cannot_be_a_run_leaves_nothing(tmp_path: Path, model: chargpt.GPT2) -> None:
    def refused(message: str, out: str = "new", **changes: Any) -> None:
        before = sorted(tmp_path.rglob("*"))
        arguments = {"model": model, "tokenizer": TOKENIZER, "origin": "nanoGPT", **changes}
        with pytest.raises(UserError, match=message):
            write_imported_run(tmp_path / out, **arguments)
        assert sorted(tmp_path.rglob("*")) == before

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("dear")
    refused("full exists: give the name of a new folder", "full")
    refused("diary.txt exists", "full/diary.txt")
    refused("cannot be written .*: give a folder", "full/diary.txt/new")
    refused("cannot be written .*: give a folder", 300 * "x")
    refused("the vocabulary 3: give", tokenizer=CharTokenizer("abc"))
    with torch.no_grad():
        model.final_norm.weight[3] = torch.nan
    refused("final_norm.weight of the model is not finite")
