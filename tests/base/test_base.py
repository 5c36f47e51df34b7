"""Files are replaced completely or left as they were; modules can be called."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest

from chargpt.base import files
from chargpt.base.errors import UserError
from chargpt.base.files import read_text, replacing, write_bytes


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path) as part:
        assert part.parent == tmp_path
        assert part.name.startswith(".")
        assert not part.exists()
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["write", "fsync", "rename"])
def test_a_failure_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    fail = Mock(side_effect=error)
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if step != "write":
        owner, name = {"fsync": (os, "fsync"), "rename": (Path, "replace")}[step]
        monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error)), replacing(path) as part:
        part.write_bytes(b"new")
        if step == "write":
            fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_order_is_write_flush_rename_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name must not reach the disk before the data."""
    calls = Mock()
    calls.flush.side_effect, calls.rename.side_effect = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", calls.flush)
    monkeypatch.setattr(os, "replace", calls.rename)
    write_bytes(tmp_path / "file", b"new")
    order = [name for name, *_ in calls.mock_calls]
    assert order == ["flush", "rename"] + ["flush"] * (os.name != "nt")


@pytest.mark.parametrize("failures", [1, 3, 4])
def test_a_rename_is_retried_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    """A virus scanner may hold a new file for a moment; three retries are enough."""
    path, rename = tmp_path / "file", Path.replace
    held = iter([PermissionError(errno.EACCES, "in use")] * failures)

    def replace(part: Path, target: Path) -> Path:
        for error in held:
            raise error
        return rename(part, target)

    monkeypatch.setattr(files, "_RENAME_WAITS_S", (0.0, 0.0, 0.0))
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError) if failures > 3 else nullcontext():
        write_bytes(path, b"new")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"new"] * (failures <= 3)


def test_writers_at_the_same_time_do_not_mix(tmp_path: Path) -> None:
    path, texts = tmp_path / "file", [bytes([i]) * 100_000 for i in range(8)]
    with ThreadPoolExecutor(len(texts)) as pool:
        list(pool.map(write_bytes, [path] * len(texts), texts))
    assert path.read_bytes() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_lack_of_memory_is_not_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    path.write_text("{}")

    for code, kind, message in (
        (errno.ENOMEM, MemoryError, r"not enough memory to read .*file\.json"),
        (errno.EIO, UserError, "the run is damaged"),
    ):
        error = OSError(code, os.strerror(code))
        monkeypatch.setattr(Path, "read_text", Mock(side_effect=error))
        with pytest.raises(kind, match=message):
            read_text(path)


ORDERS = {
    "call first": "import chargpt; called = chargpt.{name}; from chargpt.{name} import {other}",
    "import first": "from chargpt.{name} import {other}; import chargpt; called = chargpt.{name}",
}
CHECK = """
import inspect, sys
assert callable(called) and callable(chargpt.{name}) and callable({other})
function = sys.modules["chargpt.{name}"].{name}
for each in (called, chargpt.{name}):
    assert inspect.signature(each) == inspect.signature(function)
    assert inspect.getdoc(function) in inspect.getdoc(each)
    try:
        sys.exit(str(each(no_such_argument=1)))
    except TypeError as error:
        assert "{name}() " in str(error), error
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "other"), [("train", "fit"), ("generate", "complete")])
def test_a_module_can_be_called_like_its_function(order: str, name: str, other: str) -> None:
    program = (ORDERS[order] + CHECK).format(name=name, other=other)
    subprocess.run([sys.executable, "-c", program], check=True)
