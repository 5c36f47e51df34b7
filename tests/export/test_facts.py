"""The facts of a run, from its files and from measurements."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import QUICK, SMALL, words

import chargpt
from chargpt.export.facts import Facts, gather_facts
from chargpt.measure.scorecard import score_run
from chargpt.runs.report import read_metrics, read_samples
from chargpt.train import TrainResult, train

pytest.importorskip("pydivsufsort")


def facts_of(run: Path) -> Facts:
    return gather_facts(run, *chargpt.load(run))


def test_they_agree_with_the_files_and_with_eval(result: TrainResult) -> None:
    facts = facts_of(result.run)
    assert facts.summary == json.loads((result.run / "summary.json").read_text())
    assert facts.baselines == score_run(result.run).baselines
    assert facts.val_loss == facts.summary["val_loss"]
    rows = [row for row in read_metrics(result.run) if row["split"] == "validation"]
    assert [(point.step, point.loss) for point in facts.validation] == [
        (row["step"], row["val_loss"]) for row in rows
    ]
    assert [sample.step for sample in facts.samples] == [row["step"] for row in rows]
    assert facts.novelty is not None
    assert facts.novelty.samples.n_characters == 20_000
    assert facts.texts == ("hearts.txt",)


def test_what_is_not_known_has_a_reason(result: TrainResult, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(result.run, run)
    (run / "summary.json").write_text('{"verdict": "ok", "val_loss": NaN, "odd": [1]}')
    (run / "metrics.jsonl").unlink()
    (run / "samples.txt").unlink()
    facts = facts_of(run)
    assert facts.to_json()["summary"] == {"verdict": "ok", "val_loss": None}
    assert (facts.training, facts.validation, facts.samples) == ((), (), ())


def test_a_long_text_is_not_measured(result: TrainResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chargpt.export.facts.MOST_CHARACTERS", 2999)
    facts = facts_of(result.run)
    assert (facts.baselines, facts.novelty) == ((), None)
    assert "2,999 characters" in facts.note


def test_a_missing_text_is_reported_but_its_path_is_not_a_fact(tmp_path: Path) -> None:
    text = tmp_path / "secret folder" / "hearts.txt"
    text.parent.mkdir()
    text.write_text(words(3000))
    run = train(
        str(text), model_config=SMALL, train_config=QUICK, out=tmp_path / "run", quiet=True
    ).run
    text.unlink()
    lines: list[str] = []
    facts = gather_facts(run, *chargpt.load(run), report=lines.append)
    assert (facts.baselines, facts.novelty) == ((), None)
    assert "secret folder" in lines[-1]
    assert "secret" not in json.dumps(facts.to_json())


def test_samples_are_read_as_they_were_written(tmp_path: Path) -> None:
    texts = ["a\n\nb", "", "--- step 5, validation loss 2.0000\n", "last\n"]
    lines = [f"--- step {10 * i}, validation loss 1.5000\n{text}\n" for i, text in enumerate(texts)]
    (tmp_path / "samples.txt").write_text("".join(lines))
    samples = read_samples(tmp_path)
    assert [(sample.step, sample.text) for sample in samples] == list(
        zip([0, 10, 20, 30], texts, strict=True)
    )
