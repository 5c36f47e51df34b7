"""Progress is shown on stderr, and only there."""

import pytest

from chargpt.base import progress


def test_lines_name_the_share_that_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with progress.progress("reading", 400, unit="B") as advance:
        advance(100)
        advance(200)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert [line.split(",")[0] for line in shown.err.splitlines()] == [
        "reading    25%",
        "reading    75%",
    ]
    assert "B/s" in shown.err


def test_short_and_quiet_work_shows_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with progress.progress("reading", 400, unit="B") as advance:
        advance(400)
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    with progress.progress("reading", 400, unit="B", quiet=True) as advance:
        advance(400)
    assert capsys.readouterr().err == ""
