"""`chargpt check` while another process saves into the folder."""

import shutil
from pathlib import Path

import pytest

from chargpt.measure import inspect
from chargpt.measure.inspect import inspect_run
from chargpt.runs.checkpoint import MANIFEST, MODEL, finish_save
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
    looks: list[float] = []

    def finish(seconds: float) -> None:
        looks.append(seconds)
        finish_save(run, "last")

    monkeypatch.setattr(inspect.time, "sleep", finish)
    assert bad_parts(run) == []
    assert len(looks) == 1
    assert not (run / ".last.new").exists()


def test_a_move_between_listing_and_reading_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_problem = inspect.find_problem

    def move_first(checkpoint: Path) -> str | None:
        monkeypatch.setattr(inspect, "find_problem", find_problem)
        checkpoint.rename(checkpoint.with_name("moved"))
        return find_problem(checkpoint)

    def move_back(seconds: float) -> None:
        (run / "moved").rename(run / "best")

    monkeypatch.setattr(inspect, "find_problem", move_first)
    monkeypatch.setattr(inspect.time, "sleep", move_back)
    assert bad_parts(run) == []


def test_damage_is_reported_after_one_look(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "last" / MODEL).write_bytes(b"damaged")
    monkeypatch.setattr(inspect.time, "sleep", lambda seconds: pytest.fail("waited"))
    assert bad_parts(run) == ["last"]


def test_damage_beside_an_unfinished_save_is_reported(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / ".best.new").mkdir()
    (run / "last" / MODEL).write_bytes(b"damaged")
    looks: list[float] = []
    monkeypatch.setattr(inspect.time, "sleep", looks.append)
    assert bad_parts(run) == ["last"]
    assert len(looks) == inspect.LOOKS - 1
