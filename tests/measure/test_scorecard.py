"""`chargpt eval`: which files it opens, and that it encodes each text once."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, SMALL, words

from chargpt.base.errors import UserError
from chargpt.config import DataConfig, Unknown
from chargpt.engine.evaluation import evaluate
from chargpt.measure.baselines import NgramModel
from chargpt.measure.novelty import novelty_of_run
from chargpt.measure.scorecard import score_run
from chargpt.runs.folder import load
from chargpt.train import TrainResult, train


def train_on(run: Path, text: Path, **data: Any) -> Path:
    train(
        str(text), model_config=SMALL, train_config=QUICK.replace(steps=1),
        data_config=DataConfig(**data), out=run, quiet=True,
    )  # fmt: skip
    return run


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the texts that are opened from here on, without repetitions."""
    names: list[str] = []
    real = Path.open

    def open_text(path: Path, *arguments: Any, **options: Any) -> Any:
        if arguments == ("rb",) and path.suffix == ".txt" and names[-1:] != [path.name]:
            names.append(path.name)
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", open_text)
    return names


def test_without_baselines_only_the_given_file_is_opened(
    result: TrainResult, tmp_path: Path, opened: list[str]
) -> None:
    file = tmp_path / "other.txt"
    file.write_text(words(400, seed=1), encoding="utf-8")
    lines: list[str] = []
    alone = score_run(result.run, [str(file)], with_baselines=False, report=lines.append)
    assert (opened, lines, alone.baselines, alone.note) == (["other.txt"], [], (), "")
    beside = score_run(result.run, [str(file)], report=lines.append)
    assert opened == ["other.txt", "hearts.txt", "other.txt"]
    assert lines[0].startswith("reading the run's text: ") and "hearts.txt" in lines[0]
    assert beside.nats_per_char == alone.nats_per_char
    assert len(beside.baselines) == 4


def test_without_files_the_files_of_the_run_are_reported(
    result: TrainResult, opened: list[str]
) -> None:
    lines: list[str] = []
    assert score_run(result.run, split="train", report=lines.append).baselines == ()
    assert opened == ["hearts.txt"]
    opened.clear()
    novelty_of_run(result.run, samples="a king", report=lines.append)
    assert opened == ["hearts.txt"]
    assert len(lines) == 2 and lines[0] == lines[1]


@pytest.mark.parametrize("size", [2999, 4 * 3001 + 1])
def test_a_file_of_another_size_is_refused_unread(
    tmp_path: Path, opened: list[str], size: int
) -> None:
    text = tmp_path / "hearts.txt"
    text.write_text(words(3000), encoding="utf-8")
    run = train_on(tmp_path / "run", text)
    opened.clear()
    text.write_bytes(b"x" * size)
    lines: list[str] = []
    message = rf"hearts\.txt is not the text of this run \(its size differs\): {size:,} bytes"
    with pytest.raises(UserError, match=message):
        score_run(run, report=lines.append)
    assert (opened, lines) == ([], [])
    card = score_run(run, [str(tmp_path / "run" / "config.json")], unknown="skip")
    assert "no baselines: " in card.note and "size differs" in card.note


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32", "latin-1"])
def test_the_size_of_the_runs_own_text_is_accepted(tmp_path: Path, encoding: str) -> None:
    """Byte-order marks, wide characters and empty documents, in two files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(2):
        text = words(400, seed=number).replace("\n", "\n\n\né")
        (folder / f"{number}.txt").write_bytes(text.encode(encoding))
    run = train_on(tmp_path / "run", folder, encoding=encoding, document_separator="\n")
    assert score_run(run, with_baselines=False).n_tokens > 0


@pytest.mark.parametrize(("separator", "unknown"), [("", "replace"), ("\n", "skip")])
def test_tokens_of_a_file_are_those_of_its_documents(
    tmp_path: Path, separator: str, unknown: Unknown
) -> None:
    """A document without known characters stays a document."""
    text, file = tmp_path / "hearts.txt", tmp_path / "other.txt"
    text.write_text(words(3000), encoding="utf-8")
    run = train_on(tmp_path / "run", text, document_separator=separator)
    file.write_text("the king\n\nZZZ\nof hearts", encoding="utf-8")
    model, tokenizer = load(run)
    end = [] if tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
    documents = ["the king", "ZZZ", "of hearts"] if separator else [file.read_text()]
    expected = [np.append(tokenizer.encode(d, unknown=unknown), end) for d in documents]
    tokens = np.concatenate(expected).astype(int)
    card = score_run(run, [str(file)], unknown=unknown, with_baselines=False)
    assert card.n_tokens == len(tokens)
    assert card.nats_per_char == evaluate(model, tokens, SMALL.block_size)


def test_a_table_is_read_by_the_column_of_the_run(tmp_path: Path) -> None:
    table, other = tmp_path / "train.jsonl", tmp_path / "other.jsonl"
    text = words(3000)
    table.write_text("".join(json.dumps({"t": line}) + "\n" for line in text.splitlines()))
    run = train_on(tmp_path / "run", table, text_column="t")
    other.write_text('{"id": 7, "t": "the king"}\n{"t": "of hearts"}\n')
    card = score_run(run, [str(other)], with_baselines=False)
    assert card.n_tokens == len("the king") + 1 + len("of hearts") + 1


def test_an_unknown_character_and_too_short_a_text_are_named(
    result: TrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "other.txt"
    file.write_text("the €", encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.txt: the model has never seen '€'"):
        score_run(result.run, [str(file)], with_baselines=False)
    file.write_text("€k", encoding="utf-8")
    with pytest.raises(UserError, match=r"other\.txt: fewer than two known characters: give a"):
        score_run(result.run, [str(file)], unknown="skip", with_baselines=False)


def test_a_run_of_an_archive_is_evaluated_on_it(tmp_path: Path) -> None:
    packed = tmp_path / "t.txt.gz"
    packed.write_bytes(gzip.compress(words(3000).encode()))
    options = {"model_config": SMALL, "train_config": QUICK, "quiet": True}
    run = train(
        str(packed), data_config=DataConfig(tokenizer="byte"), out=tmp_path / "run", **options
    )
    card = score_run(run.run)
    assert (card.unit, card.n_tokens, card.n_characters) == ("byte", 300, 300)
    assert card.nats_per_char == pytest.approx(run.summary.val_loss, rel=1e-6)


def test_figures_of_a_byte_model_are_those_of_characters(tmp_path: Path) -> None:
    """Each of the text's characters is two bytes, except the spaces and line ends."""
    text = tmp_path / "greek.txt"
    letters = {ord(a): chr(ord(a) - ord("a") + 0x3B1) for a in "abcdefghijklmnopqrstuvwxyz"}
    text.write_text(words(3000).translate(letters), encoding="utf-8")
    run = train_on(tmp_path / "run", text, tokenizer="byte")
    card = score_run(run)
    scored = text.read_bytes()[-card.n_tokens :]
    n_characters = sum(byte & 0xC0 != 0x80 for byte in scored)
    ratio = card.n_tokens / n_characters
    assert 1.5 < ratio < 2 and card.n_characters == n_characters
    assert card.nats_per_char == pytest.approx(card.nats_per_token * ratio)
    by_letters = NgramModel.fit(np.frombuffer(text.read_bytes()[: -card.n_tokens], "u1"), 256)
    ngram = by_letters.nats_per_char(np.frombuffer(scored, "u1"))
    assert card.baselines[1].bits_per_char == pytest.approx(ngram / np.log(2) * ratio)


def test_rare_characters_of_training_stay_known(tmp_path: Path) -> None:
    """They are U+FFFD in a given file too, and after the tokenizer was saved and read."""
    text, file = tmp_path / "hearts.txt", tmp_path / "other.txt"
    text.write_text("é" + words(3000), encoding="utf-8")
    run = train_on(tmp_path / "run", text, min_count=2)
    file.write_text("the thé of hearts", encoding="utf-8")
    _, tokenizer = load(run)
    assert tokenizer.decode(tokenizer.encode("thé")) == "th\ufffd"
    assert type(tokenizer).from_json(tokenizer.to_json()) == tokenizer
    assert score_run(run, [str(file)], with_baselines=False).n_tokens == 17
