"""Training that starts from another run's model (``--from``)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK, SMALL, words

import chargpt
from chargpt.base.errors import UserError
from chargpt.cli import main as cli
from chargpt.config import DataConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.runs.folder import load, read_config
from chargpt.runs.imported import write_imported_run
from chargpt.train import TrainResult, train
from chargpt.training.plan import Plan, make_plan

NEW = "¡ÄÖzq𝄞"


@pytest.fixture
def new_text(tmp_path: Path) -> Path:
    """A text with some characters of the run's and some that the run has never seen."""
    path = tmp_path / "new.txt"
    path.write_text((words(400, seed=1).replace("queen", "q𝄞¡z") + NEW) * 5, encoding="utf-8")
    return path


def plan_from(run: Path, text: Path, out: Path, **changes: Any) -> tuple[Plan, list[str]]:
    """Return a plan, and the lines that were printed; `changes` are fields of GPT2Config."""
    lines: list[str] = []
    configs = {"model_config": SMALL.replace(**changes), "train_config": QUICK}
    files: Any = {"out": out, "resuming": False, "start_from": run, "report": lines.append}
    out.mkdir(exist_ok=True)
    return make_plan([str(text)], data_config=DataConfig(), **configs, **files), lines


def test_the_old_text_has_the_old_loss(
    result: TrainResult, text_file: Path, tmp_path: Path
) -> None:
    validation = chargpt.load_corpus([str(text_file)]).validation
    plan, lines = plan_from(result.run, text_file, tmp_path / "run")
    expected = chargpt.evaluate(load(result.run).model, validation, 16)
    found = chargpt.evaluate(plan.trainer.model, plan.corpus.validation, 16)
    assert found == pytest.approx(expected, rel=1e-6)
    assert any("it knows all characters" in line for line in lines)


def test_known_characters_keep_their_logits_and_new_ones_are_named(
    result: TrainResult, new_text: Path, tmp_path: Path
) -> None:
    plan, lines = plan_from(result.run, new_text, tmp_path / "run", dropout=0.5)
    old, new = load(result.run), plan.corpus.tokenizer
    assert set(new.characters) == {*old.tokenizer.characters, *new_text.read_text("utf-8")}
    text = words(16, seed=3)
    before = old.model(torch.from_numpy(old.tokenizer.encode(text).astype(int))[None])
    after = plan.trainer.model.eval()(torch.from_numpy(new.encode(text).astype(int))[None])
    known = [new.characters.index(character) for character in old.tokenizer.characters]
    torch.testing.assert_close(after[..., known], before, rtol=1e-5, atol=1e-6)
    added = sorted({*new.characters} - {*old.tokenizer.characters})
    assert any(f"new characters ({len(added)}): {added[0]!r}, " in line for line in lines)
    rows = plan.trainer.model.token_embedding.weight[[new.characters.index(c) for c in added]]
    assert len(rows.unique(dim=0)) == len(added), "equal rows would learn alike"


@pytest.mark.parametrize("several", [False, True])
def test_end_of_text_keeps_its_row(tmp_path: Path, several: bool) -> None:
    lines = DataConfig(document_separator="\n")
    (tmp_path / "old.txt").write_text("abc\nbca\n" * 40)
    (tmp_path / "new.txt").write_text("aXc\nYca\n" * 40)
    run = train(
        str(tmp_path / "old.txt"), model_config=SMALL, train_config=QUICK, data_config=lines,
        out=tmp_path / "old", quiet=True,
    ).run  # fmt: skip
    data_config = lines if several else DataConfig()
    (tmp_path / "run").mkdir()
    plan = make_plan(
        [str(tmp_path / "new.txt")], model_config=SMALL, train_config=QUICK,
        data_config=data_config, out=tmp_path / "run", resuming=False, start_from=run,
    )  # fmt: skip
    old, tokenizer = load(run), plan.corpus.tokenizer
    assert (tokenizer.end_of_text_id is not None) == several
    rows = plan.trainer.model.token_embedding.weight
    for token in ["a", "b", "c"]:
        was, now = (t.characters.index(token) for t in (old.tokenizer, tokenizer))
        assert torch.equal(rows[now], old.model.token_embedding.weight[was])
    if several:
        assert torch.equal(rows[-1], old.model.token_embedding.weight[-1])


def test_it_learns_faster_than_from_scratch_and_resumes(
    result: TrainResult, new_text: Path, tmp_path: Path
) -> None:
    settings: Any = {"train_config": QUICK.replace(steps=5), "quiet": True}
    fresh = train(str(new_text), model_config=SMALL, out=tmp_path / "fresh", **settings)
    started = train(str(new_text), out=tmp_path / "run", start_from=result.run, **settings)
    assert started.summary.val_loss < fresh.summary.val_loss
    assert read_config(started.run).environment["from"] == str(result.run)
    again: Any = {"out": started.run, "resume": True, "quiet": True, "model_config": SMALL}
    more = QUICK.replace(steps=8)
    with pytest.raises(UserError, match=f"^this run started from {result.run}, not from elsewhere"):
        train(str(new_text), train_config=more, start_from="elsewhere", **again)
    resumed = train(str(new_text), train_config=more, **again)
    assert resumed.summary.steps == 8
    assert resumed.tokenizer == started.tokenizer
    assert read_config(started.run).environment["from"] == str(result.run)
    resumed = train(str(new_text), train_config=more, start_from=result.run, **again)
    assert resumed.tokenizer == started.tokenizer


def test_an_imported_model_is_a_start(
    text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = CharTokenizer("the king")
    torch.manual_seed(5)
    model = chargpt.GPT2(SMALL.replace(vocab_size=8))
    write_imported_run(Path("old"), model, tokenizer, origin="nanoGPT")
    with pytest.raises(SystemExit) as stop:
        cli.main(
            f"train {text_file} --from old --out new --steps 1 --batch-size 1 --learning-rate 1e-9 "
            "--device cpu --precision fp32 --dropout 0".split()
        )
    assert not stop.value.code
    new = load("new")
    assert new.model.config == SMALL.replace(vocab_size=new.tokenizer.vocab_size, dropout=0.0)
    rows = [new.tokenizer.characters.index(c) for c in tokenizer.characters]
    torch.testing.assert_close(
        new.model.token_embedding.weight[rows], model.token_embedding.weight, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "value"), [("block_size", 32), ("n_layer", 3), ("bias", False), ("d_model", 32)]
)
def test_another_shape_is_refused_by_name(
    result: TrainResult, text_file: Path, tmp_path: Path, name: str, value: int
) -> None:
    with pytest.raises(UserError, match=rf"^{name} is .* cannot become {value!r}: leave out --"):
        plan_from(result.run, text_file, tmp_path / "run", **{name: value})
