"""Runs the command line inside this process."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from chargpt.cli import main as cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def mistake(self) -> str:
        """What stderr says about a mistake of the user."""
        assert (self.code, self.out) == (2, "")
        return self.err


@pytest.fixture
def chargpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run
