"""Which folder a run gets, and what a start that fails leaves behind."""

from pathlib import Path

import pytest
from conftest import QUICK, SMALL

from chargpt.base.errors import UserError
from chargpt.runs.folder import LOCK
from chargpt.runs.reserve import free_folder, reserved
from chargpt.train import train


def test_free_folders_are_named_after_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder(["a/b/my poem.txt"]) == Path("runs/my-poem")
    Path("runs/my-poem").mkdir(parents=True)
    assert free_folder(["my poem.txt"]) == Path("runs/my-poem-2")
    assert free_folder(["-"]) == Path("runs/text")
    assert free_folder(["*.txt"]) == Path("runs/text")
    assert free_folder(["a", "b"]) == Path("runs/texts")
    assert free_folder(["tiny-shakespeare"]) == Path("runs/tiny-shakespeare")


def test_a_start_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyError), reserved(tmp_path / "runs" / "new", resume=False) as resuming:
        assert not resuming
        assert (tmp_path / "runs" / "new").is_dir()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_on_windows_a_held_lock_cannot_be_removed_and_hides_no_error(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows refuses to remove an open file: the user must still see what went wrong."""
    unlink = Path.unlink

    def refuse_lock(path: Path, missing_ok: bool = False) -> None:
        if path.name == LOCK:
            raise PermissionError(13, "used by another process")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_lock)
    run = tmp_path / "run"
    with pytest.raises(UserError, match="there is no file missing.txt"):
        train("missing.txt", out=run, quiet=True)
    assert [path.name for path in run.iterdir()] == [LOCK]
    monkeypatch.undo()
    config = QUICK.replace(steps=1)
    train(str(text_file), model_config=SMALL, train_config=config, out=run, quiet=True)
    assert (run / "summary.json").exists()
