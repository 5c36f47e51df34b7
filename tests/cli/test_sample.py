"""``chargpt sample`` and ``chargpt novelty`` from outside."""

import io
import json
import os
import random
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from conftest import words

import chargpt as package
from chargpt.config import GPT2Config, SampleConfig, TrainConfig
from chargpt.generate import complete
from chargpt.train import TrainResult, train

Run = Callable[..., Any]


def expected(result: TrainResult, prompt: str, **settings: Any) -> list[str]:
    model, tokenizer = package.load(result.run)
    config = SampleConfig(**settings)
    return [c.text for c in complete(model, tokenizer, [prompt], config)]


# --- sample


def test_samples_are_printed_in_order(chargpt: Run, result: TrainResult) -> None:
    stop = expected(result, "the", num_samples=3, max_new_tokens=60)[0][20:22]
    texts = expected(result, "the", num_samples=3, max_new_tokens=60, stop=(stop,))
    assert len({len(text) for text in texts}) > 1
    options = ("--prompt", "the", "--num-samples", 3, "--max-new-tokens", 60, "--stop", stop)
    shown = "".join(f"--- sample {i + 1}\nthe{text}\n" for i, text in enumerate(texts))
    assert chargpt("sample", *options, result.run) == (0, shown, "")


def test_a_prompt_comes_unchanged_from_a_file_or_standard_input(
    chargpt: Run, result: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the king\nand "
    text = expected(result, prompt, max_new_tokens=20)[0]
    (tmp_path / "prompt.txt").write_bytes(prompt.encode("utf-8-sig"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    for file in (tmp_path / "prompt.txt", "-"):
        code, out, _ = chargpt("sample", result.run, "--prompt-file", file, "--max-new-tokens", 20)
        assert (code, out) == (0, prompt + text + "\n")


def test_out_writes_the_text_to_a_file_only(
    chargpt: Run, result: TrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "new.txt"
    options = ("--prompt", "the", "--no-echo", "--max-new-tokens", 20, "--out", file)
    assert chargpt("sample", result.run, *options) == (0, "", "")
    assert file.read_text() == expected(result, "the", max_new_tokens=20)[0] + "\n"
    assert list(tmp_path.iterdir()) == [file]


def test_out_writes_into_a_fifo_and_through_a_link(
    chargpt: Run, result: TrainResult, tmp_path: Path
) -> None:
    fifo, link, target = tmp_path / "fifo", tmp_path / "link", tmp_path / "target.txt"
    os.mkfifo(fifo)
    target.write_text("old")
    link.symlink_to(target)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    options = ("sample", result.run, "--no-echo", "--max-new-tokens", 20, "--out")
    assert chargpt(*options, fifo) == (0, "", "")
    assert chargpt(*options, link) == (0, "", "")
    text = expected(result, "", max_new_tokens=20)[0] + "\n"
    assert os.read(reader, 1000) == text.encode()
    os.close(reader)
    assert target.read_text() == text
    assert stat.S_ISFIFO(fifo.lstat().st_mode)
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == {fifo, link, target}


def test_a_failure_leaves_the_old_file(chargpt: Run, result: TrainResult, tmp_path: Path) -> None:
    file = tmp_path / "old.txt"
    file.write_text("old")
    assert "never seen '£'" in chargpt("sample", result.run, "--prompt", "£", "--out", file).mistake
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_bias_and_a_ban_reach_the_text(chargpt: Run, result: TrainResult) -> None:
    options = ("sample", result.run, "--prompt", "the", "--no-echo", "--max-new-tokens", 40)
    assert chargpt(*options, "--logit-bias", "q=100")[1] == "q" * 40 + "\n"
    assert chargpt(*options, "--logit-bias", r"\n=100")[1] == "\n" * 41
    assert chargpt(*options, "--logit-bias", "q=100", "--logit-bias", "u=200")[1][0] == "u"
    assert "q" not in chargpt(*options, "--logit-bias", "q=100", "--forbidden", "q")[1]


def test_a_typed_line_end_stops_the_text(chargpt: Run, result: TrainResult) -> None:
    options = ("sample", result.run, "--prompt", "the", "--no-echo", "--max-new-tokens", 200)
    assert "\n" in chargpt(*options)[1].strip()
    line = expected(result, "the", max_new_tokens=200)[0].split("\n")[0]
    assert chargpt(*options, "--stop", r"\n")[1] == line + "\n"


def test_typed_lines_are_continued_also_after_mistakes(
    chargpt: Run, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mistakes are a character that the model has never seen, and a line that is not UTF-8."""
    typed = io.TextIOWrapper(io.BytesIO(b"the\n\xc2\xa3\nth\xe9\nthe\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    code, out, err = chargpt("sample", result.run, "--interactive", "--max-new-tokens", 30)
    first, *_, fourth = expected(result, "the", max_new_tokens=30, num_samples=4)
    assert first != fourth
    assert (code, out) == (0, f"> the{first}\n> > > the{fourth}\n> \n")
    assert re.fullmatch(".*never seen '£'.*\nchargpt: the line is not UTF-8: convert it\n", err)


def test_ctrl_c_ends_a_text_and_at_the_prompt_the_program(
    chargpt: Run, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        yield None, "abc"
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", Mock(side_effect=["the", KeyboardInterrupt]))
    monkeypatch.setattr("chargpt.generate.generate", interrupted)
    code, out, _ = chargpt("sample", result.run, "--interactive")
    assert (code, out) == (130, "theabc\n")


def test_surprise_is_printed_or_written_as_a_page(
    chargpt: Run, result: TrainResult, tmp_path: Path
) -> None:
    text = "the king and queen of hearts said: no! "
    file, page = tmp_path / "some.txt", tmp_path / "page.html"
    file.write_text(text)
    code, out, _ = chargpt("sample", result.run, "--surprise", file)
    assert code == 0
    assert out.startswith(text)  # no colours outside a terminal
    assert "mean" in out
    assert chargpt("sample", result.run, "--surprise", file, "--out", page) == (0, "", "")
    shown = re.sub("<[^>]*>", "", page.read_text("utf-8"))
    assert text in shown
    assert "some.txt" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file exclude each other"),
        (["--interactive", "--surprise", "x"], "--interactive and --surprise exclude each other"),
        (["--interactive", "--out", "x"], "--interactive and --out exclude each other"),
        (["--prompt-file", "nowhere"], "nowhere cannot be read"),
        (["--logit-bias", "e"], "--logit-bias is 'e': give CHARACTER=NUMBER"),
        (["--logit-bias", "ee=1"], "give single characters"),
        (["--logit-bias", "e=nan"], "logit_bias is {'e': nan}"),
        (["--logit-bias", "£=1"], "logit_bias names '£'"),
        (["--out", "no/such/folder"], "no/such/folder cannot be written"),
        (["--stride", "2"], "--stride works only with --surprise"),
        (["--surprise", "here.txt", "--out", "page.txt"], "give NAME.html"),
        (["--surprise", "here.txt", "--stride", "99"], "stride is 99"),
        (["--surprise", "latin.txt"], "latin.txt is not UTF-8 (byte 3)"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--prompt", "a£"], "never seen '£'"),
        (["--forbidden", "everything"], "every character of the model is forbidden"),
    ],
)
def test_a_mistake_is_one_line(
    chargpt: Run,
    result: TrainResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("the king")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    everything = "".join(result.tokenizer.characters)
    arguments = [everything if a == "everything" else a for a in arguments]
    err = chargpt("sample", result.run, *arguments).mistake
    assert message in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


# --- novelty

PLANTED = "It was the night before the long frost, and no bird sang over Wexford."


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A model that has memorised a short text."""
    rng = random.Random(5)
    lines = [words(60, seed=rng.randrange(1000)).replace("\n", " ") for _ in range(30)]
    lines.insert(17, PLANTED)
    folder = tmp_path_factory.mktemp("heart")
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    configs: Any = {
        "model_config": GPT2Config(block_size=32, n_layer=2, n_head=2, d_model=64, dropout=0.0),
        "train_config": TrainConfig(
            steps=350, batch_size=16, optimizer="muon", patience=0, eval_interval=350,
            sample_length=0, device="cpu", precision="fp32", warmup_fraction=0.05,
        ),
    }  # fmt: skip
    return train(str(folder / "text.txt"), **configs, out=folder / "run", quiet=True)


def test_novelty_finds_memorised_text_and_its_place(
    chargpt: Run, overfitted: TrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "samples.txt"
    options = ("--prompt", PLANTED[:30], "--max-new-tokens", 60, "--temperature", 0, "--out", file)
    assert chargpt("sample", overfitted.run, "--which", "last", *options) == (0, "", "")
    assert PLANTED in file.read_text(), "the model has not memorised it"
    code, out, _ = chargpt("novelty", overfitted.run, "--samples", file, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["samples"]["shares"][1] > 0.7
    longest = report["copies"][0]
    assert PLANTED in longest["text"]
    text = (overfitted.run.parent / "text.txt").read_text()
    document, offset, line, occurrences = longest["place"]
    assert text[offset : offset + len(longest["text"])] == longest["text"]
    assert (document, line, occurrences) == (0, 1 + text.count("\n", 0, offset), 1)
    assert report["held_out"]["n_characters"] > 0


def test_novelty_without_a_file_writes_samples_and_prints_a_verdict(
    chargpt: Run, overfitted: TrainResult
) -> None:
    options = ("--which", "last", "--num-samples", 4, "--max-new-tokens", 50)
    code, out, err = chargpt("novelty", overfitted.run, *options)
    assert code == 0
    assert "writing 4 texts of at most 50 characters" in err
    assert "unseen text" in out
    assert "word for word" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "nowhere.txt"], "nowhere.txt"),
        (["--num-samples", "0"], "num_samples is 0"),
    ],
)
def test_a_mistake_with_novelty_exits_with_2(
    chargpt: Run, result: TrainResult, arguments: list[str], message: str
) -> None:
    assert message in chargpt("novelty", result.run, *arguments).mistake.splitlines()[-1]
