"""Runs of earlier releases: each stays readable, and goes on as if it had been written today.

Format 1 had neither seals nor sizes. Its text was ``words(2000)`` as hearts.txt in the current
folder; what is there was written by that release, and nothing of it may ever be renewed.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import words
from safetensors.torch import load_file
from torch import Tensor

import chargpt
from chargpt.base.errors import UserError
from chargpt.base.files import check_seal, read_json, seal
from chargpt.cli import main as cli
from chargpt.data.corpus import load_corpus
from chargpt.engine.scoring import evaluate
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import (
    MANIFEST,
    MODEL,
    find_checkpoint,
    find_problem,
    finish_save,
    read_state,
)
from chargpt.runs.folder import load, read_config, read_tokenizer

FIXTURE = Path(__file__).parent / "fixtures" / "format-1"
GREEDY = {"!": " hng\nkoteas ", "Romeo": " nh\ngast    ", "no! O ": "gheas\nk     "}
"""What the model of the fixture writes after these, always the likeliest character that is new."""
ALPHABET = "\n !:ORadefghikmnoqrstu"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, beside the text that it was trained on, in the current folder."""
    (tmp_path / "hearts.txt").write_text(words(2000), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(FIXTURE, tmp_path / "run"))


def norm(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * weights[f"{name}.weight"].double() + weights[f"{name}.bias"].double()


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].double().T + weights[f"{name}.bias"].double()


def logits_of(ids: list[int], weights: dict[str, Tensor]) -> Tensor:
    """Return (T, V): a GPT-2 of one block with one head of width 8, in float64."""
    embedding = weights["token_embedding.weight"].double()
    x = embedding[ids] + weights["position_embedding.weight"].double()[: len(ids)]
    block = "blocks.0.attention"
    q, k, v = linear(norm(x, weights, f"{block}.norm"), weights, f"{block}.sublayer.qkv").split(
        8, -1
    )
    scores = q @ k.T / math.sqrt(8)
    scores[torch.ones(len(ids), len(ids)).triu(1).bool()] = -math.inf
    x = x + linear(scores.softmax(-1) @ v, weights, f"{block}.sublayer.projection")
    block = "blocks.0.feed_forward"
    hidden = linear(norm(x, weights, f"{block}.norm"), weights, f"{block}.sublayer.expand")
    cubic = hidden + 0.044715 * hidden**3
    hidden = 0.5 * hidden * (1 + (math.sqrt(2 / math.pi) * cubic).tanh())
    x = x + linear(hidden, weights, f"{block}.sublayer.projection")
    return norm(x, weights, "final_norm") @ embedding.T


def test_the_fixture_is_what_that_release_wrote() -> None:
    sums = {
        "best/model.safetensors": FIRST_SUM,
        "last/model.safetensors": FIRST_SUM,
    }
    for name, expected in sums.items():
        assert hashlib.sha256((FIXTURE / name).read_bytes()).hexdigest() == expected
    assert read_json(FIXTURE / "config.json")["format"] == 1
    assert "sha256" not in read_json(FIXTURE / "config.json")
    assert (
        hashlib.sha256(words(2000).encode()).hexdigest()
        == (read_json(FIXTURE / "config.json")["data"]["sha256"])
    )


FIRST_SUM = "6ce7b367242d709a583a6be098630cf6f7607aca2d6c6c767e3faf9c03452421"


@pytest.mark.parametrize("which", ["best", "last"])
def test_it_loads(which: Any) -> None:
    model, tokenizer = load(FIXTURE, which=which)
    assert "".join(tokenizer.characters) == ALPHABET
    assert model.config.vocab_size == 22
    weights = load_file(FIXTURE / which / MODEL)
    ids = tokenizer.encode("said: no").tolist()
    ours = model(torch.tensor([ids]))[0].double()
    torch.testing.assert_close(ours, logits_of(ids, weights), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["auto", "off"])
@pytest.mark.parametrize("prompt", GREEDY)
def test_it_writes_what_it_always_wrote(prompt: str, kernels: Any) -> None:
    model, tokenizer = load(FIXTURE)
    config = chargpt.SampleConfig(
        prompt=prompt, temperature=0, max_new_tokens=12, repetition_penalty=20, context_kept=1
    )
    written = chargpt.complete(model, tokenizer, [config.prompt], config, kernels=kernels)[0].text
    assert written == GREEDY[prompt]
    weights = load_file(FIXTURE / "best" / MODEL)
    ids = tokenizer.encode(prompt).tolist()
    for _ in range(12):
        logits = logits_of(ids[-8:], weights)[-1]
        for seen in set(ids):
            logits[seen] = logits[seen] / 20 if logits[seen] > 0 else logits[seen] * 20
        ids.append(int(logits.argmax()))
    assert tokenizer.decode(ids) == prompt + GREEDY[prompt]


def test_it_writes_the_sample_that_was_written_in_training() -> None:
    model, tokenizer = load(FIXTURE, which="last")
    last = (FIXTURE / "samples.txt").read_text().splitlines()[-1]
    config = chargpt.SampleConfig(max_new_tokens=10, seed=1337)
    [written] = chargpt.complete(model, tokenizer, [""], config, kernels="off")
    assert written.text.strip() == last


def test_it_is_checked() -> None:
    findings = inspect_run(FIXTURE)
    assert all(finding.good for finding in findings), findings
    assert {f.part for f in findings} == {
        "config.json", "tokenizer.json", "best", "last", "metrics.jsonl", "summary.json",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["best/model.safetensors", "best/state.json"])
def test_its_damage_is_found(run: Path, name: str) -> None:
    data = bytearray((run / name).read_bytes())
    data[len(data) // 2] ^= 1
    (run / name).write_bytes(data)
    assert [finding.part for finding in inspect_run(run) if not finding.good] == ["best"]
    with pytest.raises(UserError, match="best is damaged .*SHA-256 differs"):
        load(run)


def test_it_is_evaluated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the loss that it was saved with, and that its weights have."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["eval", "run", "--json", "--device", "cpu"])
    assert stop.value.code == 0
    card = json.loads(capsys.readouterr().out)
    saved = read_state(run / "best")["val_loss"]
    assert card["nats_per_char"] == pytest.approx(saved, abs=1e-6)
    weights = load_file(FIXTURE / "best" / MODEL)
    validation = load_corpus(["hearts.txt"]).validation.tolist()
    nats = 0.0
    for start in range(0, len(validation) - 1, 8):
        inputs = validation[start : start + 8][: len(validation) - 1 - start]
        targets = validation[start + 1 : start + 9]
        scores = logits_of(inputs, weights).log_softmax(-1)
        nats -= sum(float(scores[i, target]) for i, target in enumerate(targets))
    assert nats / (len(validation) - 1) == pytest.approx(saved, abs=1e-5)


def test_it_goes_on_and_is_written_in_the_format_of_today(run: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--out", "run", "--resume", "--steps", "9"])
    assert stop.value.code == 0
    assert read_state(run / "last")["step"] == 9
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["split"] == "train"]
    assert steps == list(range(1, 10)), "it went on from step 6"
    for name in ("config.json", "tokenizer.json", "last/manifest.json"):
        check_seal(read_json(run / name), name)
    assert read_json(run / "config.json")["format"] == 2
    assert read_json(run / "last" / MANIFEST)["format"] == 2
    assert all(finding.good for finding in inspect_run(run))
    before, after = read_json(FIXTURE / "config.json"), read_config(run)
    assert after["model"] == before["model"]
    assert {k: after["data"][k] for k in before["data"]} == before["data"]
    changed = {k for k, v in before["train"].items() if after["train"][k] != v}
    assert changed == {"steps"}
    assert "".join(read_tokenizer(run).characters) == ALPHABET
    assert find_problem(run / "last.previous") is None, "the one before is kept, in its own format"


def test_it_goes_on_from_where_it_was(run: Path) -> None:
    """Nothing is left to do: weights and loss are those that were there."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--out", "run", "--resume"])
    assert stop.value.code == 0
    model, tokenizer = load(run, which="last")
    for name, value in load_file(FIXTURE / "last" / MODEL).items():
        assert torch.equal(model.get_parameter(name), value)
    corpus = load_corpus(["hearts.txt"])
    assert corpus.tokenizer == tokenizer
    loss = evaluate(model, corpus.validation, 8)
    assert loss == pytest.approx(read_state(FIXTURE / "last")["val_loss"], abs=1e-6)
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


# --- formats to come


def renumber(path: Path, version: object, *, sealed: bool) -> None:
    value = json.loads(path.read_text()) | {"format": version}
    path.write_text(json.dumps(seal(value) if sealed else value))


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("version", [3, 2.5, 0, -1, "1", None, [1], {}])
def test_a_newer_config_is_refused_by_name(run: Path, version: object, sealed: bool) -> None:
    renumber(run / "config.json", version, sealed=sealed)
    with pytest.raises(UserError, match="has format .* this chargpt reads 2: upgrade chargpt"):
        load(run)
    findings = {finding.part: finding for finding in inspect_run(run)}
    assert not findings["config.json"].good
    assert "upgrade chargpt" in findings["config.json"].remark
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for texts in (["hearts.txt"], []):
        with pytest.raises(UserError, match="upgrade chargpt"):
            cli.run(["train", *texts, "--out", "run", "--resume"])
    after = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.name != ".lock" and path.is_file()
    }
    assert after == before


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("version", [3, "2", None])
def test_a_newer_manifest_is_refused_by_name(run: Path, version: object, sealed: bool) -> None:
    """It is not damaged: who reads of damage would train again."""
    for which in ("best", "last"):
        renumber(run / which / MANIFEST, version, sealed=sealed)
    findings = {finding.part: finding for finding in inspect_run(run)}
    for which in ("best", "last"):
        assert not findings[which].good
        with pytest.raises(UserError) as caught:
            load(run, which=which)  # type: ignore[arg-type]
        assert MANIFEST in str(caught.value)
    if sealed:
        assert "upgrade chargpt" in findings["last"].remark
        assert "upgrade chargpt" in str(caught.value)


def test_a_newer_state_is_not_passed_over_for_an_older_one(run: Path) -> None:
    """The steps since would be lost, and soon deleted."""
    shutil.copytree(run / "last", run / "last.previous")
    renumber(run / "last" / MANIFEST, 3, sealed=True)
    with pytest.raises(UserError, match="last/manifest.json has format 3: upgrade chargpt"):
        find_checkpoint(run, "last")
    with pytest.raises(UserError, match="upgrade chargpt"):
        finish_save(run, "last")
    assert (run / "last" / MANIFEST).exists()


def test_a_newer_tokenizer_is_refused_by_name(run: Path) -> None:
    renumber(run / "tokenizer.json", 2, sealed=False)
    with pytest.raises(UserError, match="the tokenizer has format 2, .* upgrade"):
        load(run)
    assert [f.part for f in inspect_run(run) if not f.good] == ["tokenizer.json"]
