"""The command line from outside: stdout and stderr, exit codes, one line per mistake."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import words

from chargpt.base.files import seal
from chargpt.cli import flags
from chargpt.cli import main as cli
from chargpt.train import TrainResult

SHAPE = ["--n-layer", "1", "--n-head", "2", "--d-model", "16", "--block-size", "16"]
SHORT = [*SHAPE, *["--steps", "4", "--batch-size", "4", "--sample-length", "0", "--device", "cpu"]]


def write(name: str, data: bytes | str) -> None:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CHARGPT_DATA_DIR", raising=False)
    write("text.txt", words(3000))


# --- mistakes

LATIN = "\n".join(["all ascii here"] * 300 + ["caf\xe9"] + ["more"] * 300).encode("latin-1")

MISTAKES = {
    "train missing.txt": "missing.txt.* give a text file, a folder, a pattern, - for standard",
    "train text.tx": "text.tx.* did you mean text.txt?",
    "train text.txt --n-head 3 --d-model 128": "n_head is 3, .* d_model 128: give --n-head 2",
    "train short.txt": "the text is too short: 45 tokens to train on; give at least 200, or a",
    "train latin.txt": "latin.txt: byte 0xe9 at offset 4503 .line 301.* give --encoding",
    "train text.txt --n-heads 3": "n-heads, 3: did you mean --n-head?",
    "train text.txt --n-head x": "Error parsing --n-head: .*: see chargpt train --help",
    "train text.txt --n-head": "Missing value for argument '--n-head'",
    "train text.txt --preset big": "invalid choice 'big' for argument '--preset'",
    "train text.txt --dropout 1": "dropout is 1.0: give a number from 0",
    "train text.txt --steps 5 --epochs 1": "steps and epochs are budgets",
    "train text.txt --device cuda": "device is 'cuda', which",
    "train text.txt --vocab-size 7": "vocab_size is 7, but the text has 22 distinct",
    "train text.txt --config no.toml": "--config no.toml cannot be read",
    "train text.txt --config text.txt": "text.txt is not TOML",
    "train text.txt --config typo.toml": "typo.toml: unknown setting 'n_layers': did you mean",
    "train text.txt --config type.toml": "n_layer is '6': give a whole number",
    f"train text.txt --out {300 * 'x'}": "x cannot be a run folder .File name too long",
    "train text.txt --resume": "--resume needs to know which run: give --out FOLDER",
    "train text.txt --out full": "full is in use by something else: give another --out",
    "train text.txt --out text.txt": "text.txt is in use by something else",
    "trian": "unknown command 'trian': did you mean train?",
    "frobnicate": "unknown command 'frobnicate': .*train, sample, eval",
    "sample": "missing: RUN;",
    "export run": "missing: OUT, --to {hf,onnx,html};",
    "sample nowhere": "nowhere does not exist.* give the folder that `chargpt train`",
    "sample full": "full .* config.json",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(chargpt: Any, arguments: str) -> None:
    write("short.txt", words(50))
    write("latin.txt", LATIN)
    write("typo.toml", "n_layers = 6")
    write("type.toml", 'n_layer = "6"')
    Path("full").mkdir()
    write("full/thing", "x")
    before = sorted(Path().rglob("*"))
    message = chargpt(*arguments.split()).mistake
    assert message.count("\n") == 1, message
    assert message.startswith("chargpt: ")
    assert re.search(MISTAKES[arguments], message), message
    assert sorted(Path().rglob("*")) == before


def test_a_prompt_with_an_unknown_character(chargpt: Any, result: TrainResult) -> None:
    assert chargpt("sample", result.run, "--prompt", "Romeo\né").mistake == (
        "chargpt: the model has never seen 'é' (U+00E9); first at character 6 (line 2, column 1): "
        "leave it out, or give --unknown skip or --unknown replace\n"
    )


# --- help


def test_help_shows_types_choices_and_the_values_of_the_preset(chargpt: Any) -> None:
    auto = chargpt("train", "--help")
    tiny = chargpt("train", "--preset", "tiny", "--help")
    baby = chargpt("train", "--preset", "baby", "--help")
    assert tiny.code == baby.code == 0
    assert "--n-layer INT" in tiny.out
    assert "{pre,post,sandwich}" in tiny.out
    assert "Transformer blocks. ('auto')" in auto.out and "(1337)" in auto.out
    assert "Transformer blocks. (4)" in tiny.out
    assert "Transformer blocks. (6)" in baby.out
    assert "(384)" in chargpt("train", "--preset=baby", "--help").out


def test_no_command_prints_help_and_version_prints_the_version(chargpt: Any) -> None:
    assert "{train,sample,eval,novelty,check,bench,plan,export,import,serve}" in chargpt().out
    assert chargpt("--version").out.startswith("chargpt 0.")


@pytest.mark.parametrize(
    "statement",
    [
        "import chargpt",
        "from chargpt import tiny, GPT2Config, PRESETS, UserError",
        "import sys; sys.argv = ['chargpt', 'train', '--help']; import chargpt.cli.main as c\n"
        "try: c.main()\nexcept SystemExit: pass",
        "import sys; sys.argv = ['chargpt', 'train', 'missing']; import chargpt.cli.flags",
    ],
)
def test_torch_is_not_imported_before_it_is_needed(statement: str) -> None:
    code = (
        f"{statement}\nimport sys; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- training


def test_train_sample_and_eval_end_to_end(chargpt: Any) -> None:
    trained = chargpt("train", "text.txt", *SHORT)
    assert trained.code == 0
    summary = json.loads(Path("runs/text/summary.json").read_text())
    assert trained.out.startswith(f"{summary['verdict']}\n\n")
    assert len(trained.out) > 400  # the verdict and a sample
    assert "text       3,000 characters, 22 distinct; 2,700 to train on" in trained.err
    assert "n_layer 1, n_head 2, d_model 16" in trained.err
    assert "steps 4" in trained.err
    expected = {"val_loss", "bits_per_char", "best_step", "steps", "tokens", "train_seconds"}
    expected |= {"eval_seconds", "compile_seconds", "tokens_per_second", "n_params", "stop_reason"}
    assert expected <= summary.keys()
    assert Path("runs/text/loss.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads(Path("runs/text/config.json").read_text())
    assert (config["model_config"]["d_ff"], config["model_config"]["vocab_size"]) == (64, 22)
    Path("text.txt").rename("moved.txt")  # sampling needs only the run folder
    sampled = chargpt("sample", "runs/text", "--prompt", "the ", "--max-new-tokens", "50")
    assert (sampled.code, len(sampled.out)) == (0, 4 + 50 + 1)
    assert sampled.out.startswith("the ")
    gone = chargpt("eval", "runs/text").mistake
    assert "the run's text cannot be read again: there is no file text.txt" in gone
    scored = chargpt("eval", "runs/text", "moved.txt", "--json")
    card = json.loads(scored.out)
    assert (card["n_tokens"], card["baselines"]) == (3000, {})


def test_a_named_folder_is_never_overwritten(chargpt: Any) -> None:
    assert chargpt("train", "text.txt", "--out", "mine", *SHORT).code == 0
    again = chargpt("train", "text.txt", "--out", "mine", *SHORT).mistake
    assert "mine already has a run: give another --out, or --resume" in again


def test_preset_then_file_then_flags(chargpt: Any) -> None:
    write(
        "my.toml",
        'preset = "baby"\nsteps = 9\nminutes = 5\n[model]\nn_layer = 2\nd_model = 24\nn_head = 2',
    )
    arguments = ["--config", "my.toml", "--n-layer", "1", "--block-size", "8", "--steps", "2"]
    assert chargpt("train", "text.txt", *arguments, "--batch-size", "2").code == 0
    config = json.loads(Path("runs/text/config.json").read_text())
    model, training = config["model_config"], config["train_config"]
    assert (model["n_layer"], model["d_model"], model["d_ff"]) == (1, 24, 96)  # flag, file, derived
    assert model["dropout"] == 0.2  # from the preset that the file names
    assert (training["steps"], training["minutes"]) == (2, None)  # a flag removes the file's


def test_resume_keeps_the_settings_and_takes_a_longer_budget(chargpt: Any) -> None:
    assert chargpt("train", "text.txt", "--out", "run", *SHORT).code == 0
    resumed = chargpt("train", "--out", "run", "--resume", "--steps", "6")
    assert resumed.code == 0
    assert "resuming   after step 4" in resumed.err
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 6
    wider = chargpt("train", "--out", "run", "--resume", "--d-model", "32").mistake
    assert "d_model was 16 in this run and cannot become 32: leave it as it was" in wider
    faster = chargpt("train", "--out", "run", "--resume", "--learning-rate", "1").mistake
    assert "learning_rate was 0.004 in this run and cannot become 1.0" in faster
    for other_text in (words(3001), words(2999) + "ü"):
        write("text.txt", other_text)
        changed = chargpt("train", "--out", "run", "--resume").mistake
        assert "text.txt: not the text this run learned from (its SHA-256 differs)" in changed


def test_resume_refuses_the_same_text_with_other_file_boundaries(chargpt: Any) -> None:
    """End-of-text tokens would be at other places."""
    Path("d").mkdir()
    text = words(3000)
    for boundary in (1500, 1505):
        write("d/a.txt", text[:boundary])
        write("d/b.txt", text[boundary:])
        outcome = chargpt("train", "d", "--out", "run", "--resume", "auto", *SHORT)
        assert outcome.code == (0 if boundary == 1500 else 2)
    assert "d: not the text this run learned from" in outcome.err


def test_a_run_survives_a_closed_stdout_and_stderr() -> None:
    """Both are pipes whose reader has closed."""
    command = [sys.executable, "-m", "chargpt", "train", "text.txt", "--out", "run", *SHORT]
    read, written = os.pipe()
    os.close(read)
    with os.fdopen(written, "wb") as closed:
        subprocess.run(command, stdout=closed, stderr=closed, check=True)
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 4


def test_resume_auto_starts_a_run_and_resumes_it(chargpt: Any) -> None:
    command = ["train", "text.txt", *"--preset speedrun --out run --resume auto".split(), *SHORT]
    for said in ("nothing yet in run: starting from step 0", "resuming   after step 4"):
        outcome = chargpt(*command)
        assert outcome.code == 0
        assert said in outcome.err
    other = chargpt("train", "--out", "run", "--resume", "--preset", "baby").mistake
    assert "block_size was 16 in this run and cannot become 256" in other


def test_resume_without_a_run_is_a_mistake(chargpt: Any) -> None:
    for texts in ([], ["text.txt"]):
        message = chargpt("train", *texts, "--out", "typo", "--resume", *SHORT).mistake
        assert "typo has no run to resume: check --out, or give --resume auto" in message
        assert not Path("typo").exists()


@pytest.mark.parametrize(
    ("arguments", "completed"),
    [
        ("--resume", "--resume=yes"),
        ("--resume auto", "--resume auto"),
        ("--resume text.txt", "--resume=yes text.txt"),
        ("--resume --out auto", "--resume=yes --out auto"),
        ("--resume=auto", "--resume=auto"),
    ],
)
def test_resume_without_a_value_means_yes(arguments: str, completed: str) -> None:
    assert flags.complete_resume(arguments.split()) == completed.split()


def test_a_run_killed_before_its_first_checkpoint_starts_again(chargpt: Any) -> None:
    assert chargpt("train", "text.txt", "--out", "run", *SHORT).code == 0
    for folder in (path for path in Path("run").iterdir() if path.is_dir()):
        shutil.rmtree(folder)
    refused = chargpt("train", "--out", "run", "--resume").mistake
    assert "run has no checkpoint to resume from: give --resume auto to start" in refused
    again = chargpt("train", "--out", "run", "--resume", "auto")
    assert again.code == 0
    assert "nothing yet in run: starting from step 0" in again.err
    assert json.loads(Path("run/summary.json").read_text())["steps"] == 4


def test_standard_input_is_a_text(chargpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("text.txt").open() as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert chargpt("train", "-", "--out", "run", *SHORT).code == 0
    again = chargpt("eval", "run").mistake
    assert "the run read its text from standard input: name a file to evaluate on" in again


def test_one_name_per_line_gives_samples_that_end(chargpt: Any) -> None:
    write("names.txt", "\n".join(["anna", "otto", "eve", "ada"] * 300))
    shape = "--n-layer 2 --n-head 2 --d-model 32 --block-size 16 --dropout 0".split(" ")
    budget = "--steps 200 --batch-size 8 --learning-rate 1e-2 --sample-length 0".split(" ")
    outcome = chargpt("train", "names.txt", "--document-separator", r"\n", *shape, *budget)
    assert outcome.code == 0
    assert "in 1,200 documents" in outcome.err
    sampled = chargpt("sample", "runs/names", "--num-samples", "8", "--temperature", "0.2")
    assert sampled.code == 0
    names = [line for line in sampled.out.splitlines() if not line.startswith("---")]
    assert len(names) == 8
    assert set(names) <= {"anna", "otto", "eve", "ada"}


def test_ctrl_c_exits_with_130_and_prints_how_to_resume() -> None:
    command = [sys.executable, "-m", "chargpt", "train", "text.txt", *SHAPE, "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 1 " in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "saved in runs/text; resume with --out runs/text --resume" in err.replace(os.sep, "/")
    assert "stopped at step" in out
    assert "Traceback" not in err


# --- sample and eval


def test_eval_prints_the_model_beside_the_baselines(
    chargpt: Any, result: TrainResult, text_file: Path
) -> None:
    table = chargpt("eval", result.run)
    assert table.code == 0
    assert f"validation part of {text_file}: 300 tokens" in table.out
    for name in ("(best)", "letters by frequency", "order-5 n-gram", "bz2", "xz"):
        assert name in table.out
    card = json.loads(chargpt("eval", result.run, "--json").out)
    assert card["nats_per_char"] == pytest.approx(result.summary.val_loss, abs=1e-5)
    assert card["baselines"].keys() == {"letters by frequency", "order-5 n-gram", "bz2", "xz"}
    last = json.loads(chargpt("eval", result.run, "--json", "--which", "last").out)
    assert last["nats_per_char"] == pytest.approx(result.summary.final_val_loss, abs=1e-5)
    train_part = json.loads(chargpt("eval", result.run, "--json", "--split", "train").out)
    assert (train_part["n_tokens"], train_part["baselines"]) == (2700, {})


def test_eval_refuses_or_skips_unknown_characters(chargpt: Any, result: TrainResult) -> None:
    write("other.txt", "the king\nand ü queen " * 20)
    refused = chargpt("eval", result.run, "other.txt").mistake
    assert "other.txt: the model has never seen 'ü' (U+00FC); first at character 13 (" in refused
    skipped = chargpt("eval", result.run, "other.txt", "--unknown", "skip", "--json")
    assert json.loads(skipped.out)["n_tokens"] == 20 * 20


def test_a_damaged_run_is_named(chargpt: Any, result: TrainResult, tmp_path: Path) -> None:
    run = shutil.copytree(result.run, tmp_path / "run")
    with (run / "best" / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")
    said = "run/best is damaged (model.safetensors has changed, its SHA-256 differs)"
    outcome = chargpt("sample", "run", "--max-new-tokens", "1")
    assert outcome.code == 0
    assert outcome.err.replace(os.sep, "/") == (
        f"chargpt: {said}: using run/best.previous, the one before\n"
    )
    shutil.rmtree(run / "best.previous")
    message = chargpt("sample", "run", "--max-new-tokens", "1").mistake
    assert said in message.replace(os.sep, "/")


def test_names_in_a_config_cannot_control_the_terminal(
    chargpt: Any, result: TrainResult, text_file: Path, tmp_path: Path
) -> None:
    evil = "evil\x1b[2J\x9b\u202e.txt"
    Path(evil).write_text(text_file.read_text())
    run = shutil.copytree(result.run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(seal({**config, "sources": [evil]})))
    read = chargpt("eval", "run")
    Path(evil).unlink()
    missing = chargpt("eval", "run", text_file)
    assert (read.code, missing.code) == (0, 0)
    assert r"validation part of evil\x1b[2J\x9b\u202e.txt" in read.out
    assert r"reading the run's text: evil\x1b[2J\x9b\u202e.txt" in read.err
    assert r"chargpt: no baselines" in missing.err
    for text in (read.out, read.err, missing.out, missing.err):
        assert not set("\x1b\x9b\u202e") & set(text)


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes")],
)
def test_out_of_memory_is_one_line(
    chargpt: Any, monkeypatch: pytest.MonkeyPatch, result: TrainResult, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("chargpt.runs.folder.load", fail)
    outcome = chargpt("sample", result.run)
    assert (outcome.code, outcome.out) == (1, "")
    assert re.fullmatch("chargpt: out of memory: close other programs, or .*\n", outcome.err)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("a bug")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(type(error)):
        cli.main(["train"])
