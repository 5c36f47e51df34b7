"""A run folder's files: what a stranger, an editor or another release of chargpt did to them."""

import json
import shutil
from pathlib import Path

import pytest

from chargpt.base.errors import UserError
from chargpt.base.files import seal
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import MANIFEST, find_checkpoint, recover
from chargpt.runs.folder import load
from chargpt.train import TrainResult, train


@pytest.fixture
def run(tmp_path: Path, result: TrainResult) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(result.run, tmp_path / "run"))


def test_errors_name_what_is_wrong_with_a_folder(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist, so it is not a run: give the f"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no config.json, so it is not a run"):
        load(tmp_path)
    whole = (run / "config.json").read_text()
    config = json.loads(whole)
    (run / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="has format 99, this chargpt reads 3: upgrade chargpt"):
        load(run)
    (run / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not JSON .* the run is damaged"):
        load(run)
    config["model_config"]["d_model"] = 32
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="config.json has changed since it was written"):
        load(run)
    (run / "config.json").write_text(json.dumps(seal(config)))
    with pytest.raises(UserError, match="tensors with .* parameters, not those of config.json"):
        load(run)
    (run / "config.json").write_text(whole)
    for name in ("best", "best.previous", "last", "last.previous"):
        shutil.rmtree(run / name)
    with pytest.raises(UserError, match="has no checkpoint 'last': train it"):
        load(run)


# --- other formats


def renumber(path: Path, version: object) -> None:
    path.write_text(json.dumps(seal(json.loads(path.read_text()) | {"format": version})))


@pytest.mark.parametrize(
    ("version", "remedy"),
    [(1, "train again"), (2, "train again"), (4, "upgrade chargpt"), ("3", "upgrade chargpt")],
)
def test_a_config_of_another_format_is_refused(
    run: Path, text_file: Path, version: object, remedy: str
) -> None:
    renumber(run / "config.json", version)
    message = f"has format {version!r}, this chargpt reads 3: {remedy}"
    with pytest.raises(UserError, match=message):
        load(run)
    findings = {finding.part: finding for finding in inspect_run(run)}
    assert not findings["config.json"].good
    assert message in findings["config.json"].remark
    before = contents(run)
    with pytest.raises(UserError, match=message):
        train(str(text_file), out=run, resume=True, quiet=True)
    assert contents(run) == before


@pytest.mark.parametrize("version", [2, 4, "3"])
def test_a_checkpoint_of_another_format_is_refused(run: Path, version: object) -> None:
    """Its older neighbour is not used instead: the steps since would be lost, and then deleted."""
    assert (run / "last.previous").exists()
    renumber(run / "last" / MANIFEST, version)
    message = f"last/manifest.json has format {version!r}, this chargpt reads 3"
    with pytest.raises(UserError, match=message):
        find_checkpoint(run, "last")
    before = contents(run)
    with pytest.raises(UserError, match=message):
        recover(run, "last")
    assert contents(run) == before
    assert [f.part for f in inspect_run(run) if not f.good] == ["last"]


def test_a_tokenizer_of_a_newer_format_is_refused(run: Path) -> None:
    renumber(run / "tokenizer.json", 2)
    with pytest.raises(UserError, match="the tokenizer has format 2, .* upgrade"):
        load(run)
    assert [f.part for f in inspect_run(run) if not f.good] == ["tokenizer.json"]


def contents(run: Path) -> dict[Path, bytes]:
    """Return the bytes of every file except the lock."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: path.read_bytes() for path in files}
