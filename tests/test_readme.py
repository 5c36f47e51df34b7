"""The commands and code in README.md and two other documents run; only budgets are shortened."""

import io
import re
import shlex
from pathlib import Path
from typing import Any

import nanogpt_files
import pytest
from conftest import QUICK, SMALL, words

from chargpt.cli import main as cli
from chargpt.data import datasets
from chargpt.train import train

README = Path(__file__).parent.parent / "README.md"
WRITING = README.parent / "docs" / "generation.md"
EXPORT = README.parent / "docs" / "export.md"


def blocks(language: str, document: Path = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text("utf-8"), re.M | re.S)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that README.md names, and a short Tiny Shakespeare."""
    monkeypatch.chdir(tmp_path)
    text = "Once upon a time\n" + words(5000)
    Path("my.txt").write_text(text)
    for name in ("scene.txt", "chapter.txt"):
        Path(name).write_text("the king and queen of hearts said: ")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Once upon")))
    Path("names.txt").write_text("\n".join(["anna", "otto", "eve", "ada"] * 400))
    for block in blocks("toml"):
        Path("my.toml").write_text(block)
    nanogpt_files.write(tmp_path, nanogpt_files.checkpoint(nanogpt_files.ARGS), nanogpt_files.META)
    monkeypatch.setattr(datasets, "load_dataset", lambda _: text.encode())
    assert datasets.NAMES == ("tiny-shakespeare",)
    return tmp_path


def shortened(command: str) -> list[str]:
    """Replace the budget of a command by a small one: two steps, few characters, short rounds."""
    arguments = shlex.split(command, comments=True)[1:]
    if arguments[0] == "bench":
        small = "--n-layer 1 --n-head 1 --d-model 16 --block-size 16 --batch-size 1"
        return [*arguments, *small.split(), "--rounds", "1", "--seconds", "0.01"]
    if arguments[0] != "train":
        writes = arguments[0] in ("sample", "novelty")
        few = ["--num-samples", "2"] if arguments[0] == "novelty" else []
        return [*arguments, "--max-new-tokens", "20", *few] if writes else arguments
    budget = ("--minutes", "--steps", "--epochs")
    kept = [
        a for a, before in zip(arguments, ["", *arguments], strict=False) if before not in budget
    ]
    kept = [a for a in kept if a not in budget]
    small = ["--batch-size", "1", "--block-size", "32", "--device", "cpu"]
    return [*kept, *small, "--steps", "2", "--sample-length", "0"]


def test_every_command_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = [*blocks("bash"), *blocks("bash", WRITING)]
    lines = [line for block in shown for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("chargpt ")]
    assert len(commands) >= 16
    for command in commands:
        if "--resume" in command:
            continue
        with pytest.raises(SystemExit) as stop:
            cli.main(shortened(command))
        assert stop.value.code == 0, (command, capsys.readouterr().err)


def test_the_commands_and_the_code_of_the_exports_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("onnxruntime")
    train("my.txt", model_config=SMALL, train_config=QUICK, out="runs/my", quiet=True)
    [commands] = blocks("bash", EXPORT)
    for command in commands.splitlines():
        with pytest.raises(SystemExit) as stop:
            cli.main(shortened(command))
        assert stop.value.code == 0, (command, capsys.readouterr().err)
    [code] = blocks("python", EXPORT)
    transformers.logging.set_verbosity_error()
    exec(code.replace("ROMEO:", "Once"))
    assert capsys.readouterr().out.strip()


def test_every_make_target_exists() -> None:
    makefile = (README.parent / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", "\n".join(blocks("bash")), re.M)
    assert targets == ["train", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M)


def test_the_python_runs_from_top_to_bottom(folder: Path) -> None:
    namespace: dict[str, Any] = {}
    assert blocks("python")
    for block in (*blocks("python"), *blocks("python", WRITING)):
        exec(re.sub(r'(minutes"?[=:] ?)1', r"\g<1>0.01", block), namespace)
    assert namespace["logits"].shape == (1, 5, namespace["tokenizer"].vocab_size)


def test_every_link_leads_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text("utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).exists(), link
