"""`chargpt check` while another process saves into the folder."""

import shutil
from pathlib import Path

import pytest

from chargpt.measure import inspect
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import MANIFEST, MODEL, recover
from chargpt.train import TrainResult


@pytest.fixture
def run(result: TrainResult, tmp_path: Path) -> Path:
    return shutil.copytree(result.run, tmp_path / "run")


def bad_parts(run: Path) -> list[str]:
    return [finding.part for finding in inspect_run(run) if not finding.good]


def test_a_save_during_the_check_is_no_damage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look finds the old checkpoint half deleted, the second one the save finished."""
    shutil.copytree(run / "last", run / ".last.new")
    shutil.copytree(run / "last", run / "last.previous", dirs_exist_ok=True)
    (run / "last.previous" / MANIFEST).unlink()
    monkeypatch.setattr(inspect.time, "sleep", lambda seconds: recover(run, "last"))
    assert bad_parts(run) == []
    assert not (run / ".last.new").exists()


def test_a_move_between_listing_and_reading_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_problem = inspect.find_problem

    def move_first(checkpoint: Path) -> str | None:
        monkeypatch.setattr(inspect, "find_problem", find_problem)
        checkpoint.rename(checkpoint.with_name("moved"))
        return find_problem(checkpoint)

    monkeypatch.setattr(inspect, "find_problem", move_first)
    back = run / "moved"
    monkeypatch.setattr(inspect.time, "sleep", lambda seconds: back.rename(run / "best"))
    assert bad_parts(run) == []


@pytest.mark.parametrize(("saving", "waits"), [(False, 0), (True, inspect.LOOKS - 1)])
def test_damage_is_reported_with_an_unfinished_save_beside_it_or_not(
    run: Path, monkeypatch: pytest.MonkeyPatch, saving: bool, waits: int
) -> None:
    if saving:
        (run / ".best.new").mkdir()
    (run / "last" / MODEL).write_bytes(b"damaged")
    looks: list[float] = []
    monkeypatch.setattr(inspect.time, "sleep", looks.append)
    assert bad_parts(run) == ["last"]
    assert len(looks) == waits
