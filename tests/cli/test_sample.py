"""``chargpt sample`` and ``chargpt novelty`` as a person meets them."""

import io
import json
import random
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import words

import chargpt as package
from chargpt.cli import main as cli
from chargpt.config import GPT2Config, SampleConfig, TrainConfig
from chargpt.generate import complete
from chargpt.train import TrainResult, train

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def chargpt(capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def expected(result: TrainResult, prompt: str, **settings: Any) -> list[str]:
    model, tokenizer = package.load(result.run)
    config = SampleConfig(**settings)
    return [c.text for c in complete(model, tokenizer, [prompt], config)]


# --- sample


def test_samples_are_printed_in_order_whoever_ends_first(chargpt: Run, result: TrainResult) -> None:
    stop = expected(result, "the", num_samples=3, max_new_tokens=60)[0][20:22]
    texts = expected(result, "the", num_samples=3, max_new_tokens=60, stop=(stop,))
    assert len({len(text) for text in texts}) > 1
    code, out, _ = chargpt(
        *("sample", result.run, "--prompt", "the", "--num-samples", 3),
        *("--max-new-tokens", 60, "--stop", stop),
    )
    assert code == 0
    shown = "".join(f"--- sample {i + 1}\nthe{text}\n" for i, text in enumerate(texts))
    assert out == shown


def test_a_prompt_comes_from_a_file_or_standard_input_as_it_is(
    chargpt: Run, result: TrainResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the king\nand "
    text = expected(result, prompt, max_new_tokens=20)[0]
    (tmp_path / "prompt.txt").write_bytes(prompt.encode("utf-8-sig"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    for file in (tmp_path / "prompt.txt", "-"):
        code, out, _ = chargpt("sample", result.run, "--prompt-file", file, "--max-new-tokens", 20)
        assert (code, out) == (0, prompt + text + "\n")


def test_out_takes_the_text_and_nothing_is_printed(
    chargpt: Run, result: TrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "new.txt"
    code, out, _ = chargpt(
        *("sample", result.run, "--prompt", "the", "--no-echo", "--max-new-tokens", 20),
        *("--out", file),
    )
    assert (code, out) == (0, "")
    assert file.read_text() == expected(result, "the", max_new_tokens=20)[0] + "\n"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_leaves_the_old_file(chargpt: Run, result: TrainResult, tmp_path: Path) -> None:
    file = tmp_path / "old.txt"
    file.write_text("old")
    code, _, err = chargpt("sample", result.run, "--prompt", "£", "--out", file)
    assert code == 2
    assert "never seen '£'" in err
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_bias_and_a_ban_reach_the_text(chargpt: Run, result: TrainResult) -> None:
    options = ("sample", result.run, "--prompt", "the", "--no-echo", "--max-new-tokens", 40)
    assert chargpt(*options, "--logit-bias", "q=100")[1] == "q" * 40 + "\n"
    assert chargpt(*options, "--logit-bias", r"\n=100")[1] == "\n" * 41
    assert chargpt(*options, "--logit-bias", "q=100", "--logit-bias", "u=200")[1][0] == "u"
    assert "q" not in chargpt(*options, "--logit-bias", "q=100", "--forbidden", "q")[1]


def test_lines_typed_are_continued_and_mistakes_do_not_end_it(
    chargpt: Run, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["the", "£", "the", None])

    def type_in(prompt: str) -> str:
        line = next(typed)
        if line is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", type_in)
    code, out, err = chargpt("sample", result.run, "--interactive", "--max-new-tokens", 30)
    first, _, third = expected(result, "the", max_new_tokens=30, num_samples=3)
    assert (code, out) == (0, f"the{first}\nthe{third}\n\n")
    assert err.count("never seen '£'") == 1
    assert first != third


def test_ctrl_c_ends_a_text_and_at_the_prompt_leaves(
    chargpt: Run, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["the", KeyboardInterrupt])

    def type_in(prompt: str) -> str:
        line = next(typed)
        if not isinstance(line, str):
            raise KeyboardInterrupt
        return line

    def interrupted(*_: Any, **__: Any) -> Any:
        yield None, "abc"
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr("chargpt.generate.generate", interrupted)
    code, out, _ = chargpt("sample", result.run, "--interactive")
    assert (code, out) == (130, "theabc\n")


class _Text(HTMLParser):
    text = ""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_surprise_is_shown_in_the_terminal_and_kept_as_a_page(
    chargpt: Run, result: TrainResult, tmp_path: Path
) -> None:
    text = "the king and queen of hearts said: no! "
    file, page = tmp_path / "some.txt", tmp_path / "page.html"
    file.write_text(text)
    code, out, _ = chargpt("sample", result.run, "--surprise", file)
    assert code == 0
    assert out.startswith(text)  # no colours where no terminal is
    assert "mean" in out
    assert chargpt("sample", result.run, "--surprise", file, "--out", page) == (0, "", "")
    parser = _Text()
    parser.feed(page.read_text("utf-8"))
    assert text in parser.text
    assert "some.txt" in parser.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file exclude each other"),
        (["--interactive", "--surprise", "x"], "--interactive and --surprise exclude each other"),
        (["--interactive", "--out", "x"], "--interactive and --out exclude each other"),
        (["--prompt-file", "nowhere"], "nowhere cannot be read"),
        (["--logit-bias", "e"], "--logit-bias is 'e': give CHARACTER=NUMBER"),
        (["--logit-bias", "ee=1"], "give single characters"),
        (["--logit-bias", "e=nan"], "logit_bias is {'e': nan}"),
        (["--logit-bias", "£=1"], "logit_bias names '£', unknown to the model"),
        (["--out", "no/such/folder"], "no/such/folder cannot be written"),
        (["--stride", "2"], "--stride belongs to --surprise"),
        (["--surprise", "here.txt", "--out", "page.txt"], "give NAME.html"),
        (["--surprise", "here.txt", "--stride", "99"], "stride is 99"),
        (["--surprise", "latin.txt"], "latin.txt is not UTF-8 (byte 3)"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--min-p", "1.5"], "min_p is 1.5"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--context-kept", "0"], "context_kept is 0.0"),
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
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.txt").write_text("the king")
    Path("latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    before = sorted(tmp_path.iterdir())
    everything = "".join(result.tokenizer.characters)
    arguments = [everything if a == "everything" else a for a in arguments]
    code, out, err = chargpt("sample", result.run, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


# --- novelty

PLANTED = "It was the night before the long frost, and no bird sang over Wexford."


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A model that has learned a short text by heart."""
    rng = random.Random(5)
    lines = [words(60, seed=rng.randrange(1000)).replace("\n", " ") for _ in range(30)]
    lines.insert(17, PLANTED)
    folder = tmp_path_factory.mktemp("heart")
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    model = GPT2Config(block_size=32, n_layer=2, n_head=2, d_model=64, dropout=0.0)
    training = TrainConfig(
        steps=350, batch_size=16, optimizer="muon", patience=0, eval_interval=350,
        sample_length=0, device="cpu", precision="fp32", warmup_fraction=0.05,
    )  # fmt: skip
    return train(
        str(folder / "text.txt"),
        model_config=model,
        train_config=training,
        out=folder / "run",
        quiet=True,
    )


def test_what_was_learned_by_heart_is_found_with_its_place(
    chargpt: Run, overfitted: TrainResult, tmp_path: Path
) -> None:
    file = tmp_path / "samples.txt"
    sampled = chargpt(
        *("sample", overfitted.run, "--which", "last", "--prompt", PLANTED[:30]),
        *("--max-new-tokens", 60, "--temperature", 0, "--out", file),
    )
    assert sampled[0] == 0
    assert PLANTED in file.read_text(), "the model has not learned it by heart"
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


def test_novelty_writes_by_itself_and_says_what_it_means(
    chargpt: Run, overfitted: TrainResult
) -> None:
    code, out, err = chargpt(
        *("novelty", overfitted.run, "--which", "last"),
        *("--num-samples", 4, "--max-new-tokens", 50),
    )
    assert code == 0
    assert "writing 4 texts of at most 50 characters" in err
    assert "unseen text" in out
    assert "word for word" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--samples", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--num-samples", "0"], "num_samples is 0"),
    ],
)
def test_a_mistake_with_novelty_is_one_line(
    chargpt: Run, result: TrainResult, arguments: list[str], said: str
) -> None:
    code, out, err = chargpt("novelty", result.run, *arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_out_of_memory_is_one_line_with_the_remedy(
    chargpt: Run, result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr("chargpt.generate.make_decoder", fail)
    code, _, err = chargpt("sample", result.run, "--num-samples", 8)
    assert (code, err.count("\n")) == (2, 1)
    assert "not enough memory to write 8 texts at the same time: give --num-samples 4" in err
