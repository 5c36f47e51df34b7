"""Large texts: cut, encoded by several processes, kept in files, and found again."""

import errno
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import QUICK, SMALL, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chargpt.base.errors import UserError
from chargpt.config import DataConfig
from chargpt.data import encoding, store
from chargpt.data.corpus import Corpus, load_corpus
from chargpt.data.encoding import Sizes
from chargpt.data.workers import Workers
from chargpt.train import train

TINY = Sizes(memory=0, unit=40, files=3, chunk=7)
LINES = DataConfig(document_separator="\n")
WAR = "".join(f"{i}. «Eh bien, mon prince» — так говорила 王 😀\r\n" for i in range(40))
LONG_AGO_S = time.time() - 3600


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and work in this process."""
    monkeypatch.setenv("CHARGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "available_cores", lambda: 1)
    return tmp_path / "cache" / "tokens"


def write(path: Path, text: str, mtime: float = LONG_AGO_S) -> str:
    path.write_bytes(text.encode())
    os.utime(path, (mtime, mtime))
    return str(path)


def load(*files: str, config: DataConfig = LINES, sizes: Sizes = TINY, **options: Any) -> Corpus:
    return load_corpus(files, config, sizes=sizes, **options)


def documents_of(texts: list[str], separator: str) -> list[str]:
    """Cut texts into documents as a whole: the reference."""
    if "\n" in separator:
        texts = [text.replace("\r\n", "\n") for text in texts]
        separator = separator.replace("\r\n", "\n")
    parts = [text.split(separator) if separator else [text] for text in texts]
    return [part for some in parts for part in some if part]


def check(corpus: Corpus, texts: list[str], separator: str = "\n") -> None:
    """Compare a corpus with one that is made all at once."""
    documents = documents_of(texts, separator)
    characters = sorted(set("".join(documents)))
    several = len(documents) > 1
    ids = {character: i for i, character in enumerate(characters)}
    expected = [
        i for text in documents for i in ([ids[c] for c in text] + [len(characters)] * several)
    ]
    assert list(corpus.tokenizer.characters) == characters
    assert np.concatenate([corpus.train, corpus.validation]).tolist() == expected
    lengths = np.array([len(document) for document in documents], dtype="<i8")
    facts = corpus.facts
    assert facts.boundaries == hashlib.sha256(lengths.tobytes()).hexdigest()
    assert facts.sha256 == hashlib.sha256("".join(texts).encode()).hexdigest()
    assert (facts.n_characters, facts.n_documents) == (lengths.sum(), len(documents))


def entries(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/entry.json")]


# --- cutting and encoding

LETTERS = st.text(st.sampled_from("ab\r\n\né王😀"), min_size=1, max_size=60)
SEPARATORS = st.sampled_from(["", "\n", "\n\n", "\r\n", "aa", "aba", "é", "王\n", "\n\r\n", "\r"])


@settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(LETTERS, min_size=1, max_size=5),
    separator=SEPARATORS,
    unit=st.integers(4, 30),
    chunk=st.integers(1, 9),
    files=st.integers(1, 3),
)
def test_a_text_is_the_same_however_it_is_cut(
    tmp_path: Path, texts: list[str], separator: str, unit: int, chunk: int, files: int
) -> None:
    texts = [*texts, "the end of the text"]
    names = [write(tmp_path / str(i), text) for i, text in enumerate(texts)]
    sizes = Sizes(memory=0, unit=unit, files=files, chunk=chunk)
    config = DataConfig(document_separator=separator, validation_fraction=0.3)
    try:
        check(load(*names, config=config, sizes=sizes), texts, separator)
    finally:
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


def test_small_and_large_texts_are_encoded_alike(tmp_path: Path, cache: Path) -> None:
    """A small one leaves no file."""
    name = write(tmp_path / "text", WAR)
    small = load(name, sizes=Sizes())
    assert not cache.exists()
    large = load(name)
    assert large.facts == small.facts
    assert large.tokenizer == small.tokenizer
    assert np.array_equal(large.train, small.train)
    assert np.array_equal(large.validation, small.validation)
    assert not large.train.flags.writeable


def test_a_separator_longer_than_what_is_read_to_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_WINDOW", 16)
    separator = "-" * 50
    text = separator.join(["one", "two", "three"] * 5)
    config = DataConfig(document_separator=separator)
    sizes = Sizes(memory=0, unit=60, chunk=9)
    check(load(write(tmp_path / "text", text), config=config, sizes=sizes), [text], separator)


def test_characters_join_the_vocabulary(tmp_path: Path) -> None:
    corpus = load(write(tmp_path / "text", "ab\nba\n" * 20), characters="xya")
    assert corpus.tokenizer.characters == ("a", "b", "x", "y")
    assert corpus.tokenizer.decode(corpus.train[:6]) == "abba"


def test_more_than_256_characters_in_many_documents(tmp_path: Path) -> None:
    """The mark that stands for end-of-text is an ASCII character with a large id."""
    text = "\n".join(chr(i) * 3 for i in range(0x400, 0x600)) + "\nplain\n"
    check(load(write(tmp_path / "text", text)), [text])


def test_a_large_file_of_another_encoding(tmp_path: Path) -> None:
    """It cannot be cut, and neither can a file that only looks like UTF-8."""
    config = DataConfig(encoding="cp1251")
    (tmp_path / "text").write_bytes(("война и мир " * 40).encode("cp1251"))
    corpus = load(str(tmp_path / "text"), config=config)
    assert corpus.tokenizer.decode(corpus.train[:11]) == "война и мир"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (WAR.encode() + b"caf\xe9\n" + WAR.encode(), r"0xe9 at offset \d+ \(line 41\)"),
        (b"PNG\0" + WAR.encode(), "is a binary file"),
    ],
)
def test_a_bad_byte_in_a_large_file_is_named(
    tmp_path: Path, cache: Path, data: bytes, message: str
) -> None:
    (tmp_path / "text").write_bytes(data)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path / "text"))
    assert not entries(cache)


def test_memory_does_not_grow_with_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts of all characters take 9 MB; the lengths of all documents would take 12 more."""
    monkeypatch.setattr("chargpt.data.corpus._BLOCK", 1 << 14)
    name = write(tmp_path / "text", "".join(f"{i:07}\n" for i in range(1_500_000)))
    tracemalloc.start()
    try:
        load(name, sizes=Sizes(memory=0, unit=1 << 17, chunk=1 << 14))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20_000_000


# --- other processes


def test_processes_give_the_same_text_and_do_not_run_the_script_again(tmp_path: Path) -> None:
    """The script has no guard, as beginners write it."""
    name = write(tmp_path / "text", WAR)
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "import sys\n"
        "from chargpt.data import store\n"
        "from chargpt.data.corpus import load_corpus\n"
        "from chargpt.data.encoding import Sizes\n"
        "store.available_cores = lambda: 3\n"
        f"corpus = load_corpus([{name!r}], sizes=Sizes(0, 40, 3, 7))\n"
        "print(corpus.tokenizer.decode(corpus.train))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, check=True)
    assert done.stdout.decode().splitlines(keepends=True)[0].strip() == "started"
    expected = WAR[: int(0.9 * len(WAR))]
    assert done.stdout.decode().count("started") == 1
    assert expected.split("\r\n")[0] in done.stdout.decode()
    check(load(name, config=DataConfig()), [WAR], "")


def test_results_come_in_order_and_errors_are_raised() -> None:
    jobs = [(n,) for n in (3, 0, 1000, 2)]
    with Workers(2) as workers:
        assert [list(results) for results in workers.map(range, jobs)] == [
            list(range(n)) for (n,) in jobs
        ]
        with pytest.raises(TypeError, match="float"):
            [list(results) for results in workers.map(range, [(1,), (0.5,)])]


def test_a_process_that_is_killed_is_reported() -> None:
    with Workers(2) as workers, pytest.raises(UserError, match=r"ended \(exit code 9\): free"):
        [list(results) for results in workers.map(os._exit, [(9,)])]


# --- finding entries


@pytest.fixture
def passes_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes over the text so far."""
    made: list[str] = []

    def watch(name: str) -> None:
        real = getattr(store, name)

        def spy(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return real(*arguments, **options)

        monkeypatch.setattr(store, name, spy)

    watch("plan_encoding")
    watch("encode_in_file")
    return made


def test_an_unchanged_text_is_not_read_again(tmp_path: Path, passes_made: list[str]) -> None:
    name = write(tmp_path / "text", WAR)
    first = load(name)
    made = list(passes_made)
    second = load(name, config=LINES.replace(validation_fraction=0.5))
    assert passes_made == made == ["plan_encoding", "encode_in_file"]
    assert second.facts == first.facts
    assert len(second.train) < len(first.train)
    assert len(second.train) + len(second.validation) == len(first.train) + len(first.validation)


@pytest.mark.parametrize("change", ["touch", "move"])
def test_an_equal_text_finds_the_same_entry(
    tmp_path: Path, passes_made: list[str], change: str
) -> None:
    name = write(tmp_path / "text", WAR)
    load(name)
    if change == "touch":
        os.utime(name, (LONG_AGO_S + 9, LONG_AGO_S + 9))
    else:
        name = write(tmp_path / "other", WAR)
    check(load(name), [WAR])
    assert passes_made == ["plan_encoding", "encode_in_file", "plan_encoding"]


@pytest.mark.parametrize("config", [DataConfig(), DataConfig(document_separator="\r\n\r\n")])
def test_other_settings_are_another_entry(tmp_path: Path, config: DataConfig) -> None:
    name = write(tmp_path / "text", WAR)
    check(load(name), [WAR])
    check(load(name, config=config), [WAR], config.document_separator)


def test_a_change_is_seen_at_once(tmp_path: Path) -> None:
    """Also one with the same size, time and file number, right after the text was written."""
    for change in range(3):
        now = time.time()
        text = WAR.replace("prince", f"princ{change}")
        name = write(tmp_path / "text", text, mtime=now if change else now + 0.5)
        os.utime(name, (LONG_AGO_S, now))
        check(load(name), [text])


def test_a_text_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(tmp_path / "text", WAR)
    real = encoding.encode

    def change(*arguments: Any) -> Iterator[Any]:
        write(tmp_path / "text", WAR.swapcase(), mtime=LONG_AGO_S + 1)
        return real(*arguments)

    monkeypatch.setattr(encoding, "encode", change)
    with pytest.raises(UserError, match="text changed while it was read: start again"):
        load(name)
    monkeypatch.setattr(encoding, "encode", real)
    check(load(name), [WAR.swapcase()])


def damage_tokens(entry: Path) -> None:
    os.truncate(entry / "tokens.bin", 7)


def damage_facts(entry: Path) -> None:
    text = (entry / "entry.json").read_text()
    (entry / "entry.json").write_text(text.replace('"n_documents": 40', '"n_documents": 41'))


def remove_tokens(entry: Path) -> None:
    (entry / "tokens.bin").unlink()


@pytest.mark.parametrize("damage", [damage_tokens, damage_facts, remove_tokens])
def test_a_damaged_entry_is_made_again(tmp_path: Path, cache: Path, damage: Any) -> None:
    name = write(tmp_path / "text", WAR)
    load(name)
    damage(entries(cache)[0])
    lines: list[str] = []
    check(load(name, report=lines.append), [WAR])
    assert any("is damaged: encoding the text again" in line for line in lines)


def test_only_unfinished_work_is_removed_and_only_when_old(tmp_path: Path, cache: Path) -> None:
    name = write(tmp_path / "text", WAR)
    load(name)
    [entry] = entries(cache)
    for age, path in ((40, cache / "unfinished-old"), (20, cache / "unfinished-new"), (99, entry)):
        path.mkdir(exist_ok=True)
        os.utime(path, (time.time() - age * 86_400,) * 2)
    load(write(tmp_path / "other", "other " * 20))
    assert not (cache / "unfinished-old").exists()
    assert (cache / "unfinished-new").exists()
    assert entry.exists()


# --- failures


def test_a_full_disk_names_the_folder_and_the_bytes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(tmp_path / "text", WAR)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError) as caught:
        load(name)
    n_tokens = len("".join(documents_of([WAR], "\n"))) + 40
    assert f"No space left on device; the text needs {n_tokens:,} bytes in {cache}" in str(
        caught.value
    )
    assert not entries(cache)


def test_encoding_continues_after_the_disk_was_full(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, passes_made: list[str]
) -> None:
    name = write(tmp_path / "text", WAR)
    real, done = encoding.encode_into, []

    def fill(*arguments: Any) -> Iterator[int]:
        done.append(arguments[1])
        if len(done) == 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(encoding, "encode_into", fill)
    with pytest.raises(UserError, match="No space left on device"):
        load(name)
    assert not entries(cache)
    check(load(name), [WAR])
    assert passes_made == ["plan_encoding", "encode_in_file", "encode_in_file"]
    assert len(set(done)) == len(done) - 1  # only the one that failed was tried again


def test_two_starts_encode_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, passes_made: list[str]
) -> None:
    name = write(tmp_path / "text", WAR)
    waiting = threading.Event()
    results: list[Corpus] = []

    def report(line: str) -> None:
        assert "another start is encoding this text" in line or "tokens" in line
        waiting.set()

    real = encoding.encode_into

    def encode_into(*arguments: Any) -> Iterator[int]:
        if not second.is_alive() and not results:
            second.start()
            assert waiting.wait(30)
        return real(*arguments)

    second = threading.Thread(target=lambda: results.append(load(name, report=report)))
    monkeypatch.setattr(encoding, "encode_into", encode_into)
    first = load(name)
    second.join(30)
    assert np.array_equal(results[0].train, first.train)
    assert passes_made == ["plan_encoding", "encode_in_file"]


KILLED = """
import os, signal, sys
from chargpt.config import DataConfig
from chargpt.data import encoding, store
from chargpt.data.corpus import load_corpus

left = int(sys.argv[2])

def count(frame, event, argument):
    global left
    left -= event in ("call", "c_call") and "chargpt" in frame.f_code.co_filename
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

store.available_cores = lambda: int(sys.argv[3])
sys.setprofile(count)
load_corpus(sys.argv[1:2], DataConfig(document_separator="\\n"), sizes=encoding.Sizes(0, 99, 3, 50))
sys.setprofile(None)
print(-left)
"""


def test_killed_starts_leave_nothing_wrong_and_are_continued(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten kills at random calls of a function; what they leave is whole or continued."""

    def start(calls: int, cores: int) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", KILLED, name, str(calls), str(cores)]
        return subprocess.run(command, capture_output=True, check=False)

    name = write(tmp_path / "text", WAR)
    chance, n_encoded = random.Random(0), []
    totals: dict[int, int] = {}
    for cores in (1, 2):
        totals[cores] = int(start(-1, cores).stdout)
        shutil.rmtree(cache)
    encoded: list[int] = []
    real = encoding.encode_into
    monkeypatch.setattr(encoding, "encode_into", lambda *a: encoded.append(a[1]) or real(*a))
    for attempt in range(10):
        cores = 1 + attempt % 2
        share = (attempt + chance.random()) / 10.5  # with two, the number of calls varies
        calls = 1 + int(share * totals[cores])
        assert start(calls, cores).returncode == -signal.SIGKILL
        encoded.clear()
        check(load(name, sizes=Sizes(0, 99, 3, 50)), [WAR])
        n_encoded.append(len(encoded))
        shutil.rmtree(cache)
    assert any(0 < n < max(n_encoded) for n in n_encoded)  # continued in the second pass


def test_training_from_a_file_learns_the_same(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write(tmp_path / "text", words(3000))
    options: Any = {"model_config": SMALL, "train_config": QUICK, "quiet": True}
    small = train(name, out=tmp_path / "small", **options)
    monkeypatch.setattr("chargpt.data.corpus.Sizes", lambda: TINY)
    large = train(name, out=tmp_path / "large", **options)
    assert entries(cache)
    assert large.summary.val_loss == small.summary.val_loss
    assert train(name, out=tmp_path / "small", resume=True, **options).summary.steps == 12
