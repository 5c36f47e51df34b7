"""The run folder: all that a run leaves. Others can read it, and no file is ever half-written.

    config.json       format version, configurations, texts, environment
    tokenizer.json    the vocabulary
    best/  last/      checkpoints, and the ones before them (see `chargpt.runs.checkpoint`)
    metrics.jsonl  summary.json  samples.txt  loss.png
    .lock             held by the process that trains

There is no pickle. Loading a model reads nothing outside the folder, runs no code from it, and
takes no more memory than its files have bytes. Only resuming, ``eval`` and ``novelty`` open the
texts that config.json names.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import torch

from chargpt.base.checks import check_names, from_dict
from chargpt.base.errors import UserError
from chargpt.base.files import SEAL, check_seal, parse_json, read_json, read_text, seal, write_json
from chargpt.base.seeding import own_random_state
from chargpt.config import CheckpointName, DataConfig, GPT2Config, TrainConfig
from chargpt.data.byte_tokenizer import ByteTokenizer, tokenizer_from_json
from chargpt.data.passes import TextFacts
from chargpt.data.tokenizer import CharTokenizer
from chargpt.model import GPT2
from chargpt.runs.checkpoint import FORMAT, MODEL, find_checkpoint, has_checkpoint
from chargpt.runs.weights import check_model_file, load_model_tensors, read_tensors

MAX_TOKENIZER_BYTES = 32 * 2**20  # all of Unicode takes half of it
CONFIG, TOKENIZER, LOCK = "config.json", "tokenizer.json", ".lock"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What config.json holds: what was asked for, what was found, where the run began."""

    model_config: GPT2Config
    train_config: TrainConfig
    data_config: DataConfig
    sources: tuple[str, ...]
    """The texts as the user named them; empty for an imported model."""
    text: TextFacts
    environment: dict[str, Any]
    """Versions, processor, device, precision, kernels: another one may round differently."""

    @property
    def imported_from(self) -> str | None:
        """Where the model was trained, for a run without a text; None: here, by `train`."""
        origin = self.environment.get("imported_from") or "elsewhere"
        return None if self.sources else str(origin)[:80]


_PARTS: dict[str, type[Any]] = {
    "model_config": GPT2Config,
    "train_config": TrainConfig,
    "data_config": DataConfig,
    "text": TextFacts,
}


class Loaded(NamedTuple):
    """A model ready to use, with its tokenizer."""

    model: GPT2
    tokenizer: CharTokenizer


def load(
    run: str | Path, *, which: CheckpointName = "best", device: str | torch.device = "cpu"
) -> Loaded:
    """Return the model of a run folder, in evaluation mode, and its tokenizer.

    Args:
        run: the folder; nothing else is needed.
        which: the checkpoint of the lowest validation loss, or the last one. A run that was
            stopped before its first evaluation has only a last one, which then serves for both;
            an imported run has only a best one.
        device: where to put the model.

    Raises:
        UserError: not a run folder, a missing or damaged checkpoint, or another format.
    """
    folder = Path(run)
    run_config = read_config(folder)
    config = run_config.model_config
    tokenizer = read_tokenizer(folder)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{folder / TOKENIZER} has {tokenizer.vocab_size} tokens, the model "
            f"{config.vocab_size}: the run is damaged"
        )
    if not has_checkpoint(folder, which):
        which = "best" if run_config.imported_from else "last"
    weights = find_checkpoint(folder, which) / MODEL
    check_model_file(weights, config)
    with own_random_state():
        model = GPT2(config).to(device)
    load_model_tensors(model, read_tensors(weights))
    return Loaded(model.eval(), tokenizer)


def load_characters(
    run: str | Path, *, which: CheckpointName = "best", device: str | torch.device = "cpu"
) -> Loaded:
    """Load a model for a use that needs a character per token; see `load`.

    Raises:
        UserError: its tokens are bytes, or as `load` does.
    """
    loaded = load(run, which=which, device=device)
    if isinstance(loaded.tokenizer, ByteTokenizer):
        raise UserError(
            f"{run}: its tokens are bytes, and this needs characters: use sample and eval, or "
            "train with --tokenizer char"
        )
    return loaded


def read_config(run: Path) -> RunConfig:
    """Return ``config.json`` of a run folder.

    Raises:
        UserError: not a run folder, a damaged one, or one of another format.
    """
    path = run / CONFIG
    if not path.is_file():
        what = "has no config.json" if run.is_dir() else "does not exist"
        raise UserError(
            f"{run} {what}, so it is not a run: give the folder that `chargpt train` named"
        )
    values = read_json(path)
    version = values.pop("format", None)
    if version != FORMAT:
        remedy = "train again" if version in (1, 2) else "upgrade chargpt"
        raise UserError(f"{run} has format {version!r:.20}, this chargpt reads {FORMAT}: {remedy}")
    check_seal(values | {"format": version}, str(path))
    del values[SEAL]
    try:
        return _parse_config(values)
    except (UserError, TypeError) as error:  # TypeError: a field is missing
        raise UserError(f"{path}: {error}: the run is damaged") from error


def _parse_config(values: dict[str, Any]) -> RunConfig:
    check_names(values, [field.name for field in fields(RunConfig)])
    for part in (*_PARTS, "environment"):
        if not isinstance(values.get(part), dict):
            raise UserError(f"there is no part {part!r}")
    sources = values.get("sources")
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise UserError("the texts are not named")
    parts = {part: from_dict(cls, values[part]) for part, cls in _PARTS.items()}
    return RunConfig(sources=tuple(sources), environment=values["environment"], **parts)


def text_sources(config: RunConfig) -> tuple[str, ...]:
    """Return the texts that a run names, to read them again.

    Raises:
        UserError: one is a device or a pipe, which may never end; a user may still give it by name.
            Or the run was imported and names none; the caller adds the remedy.
    """
    if config.imported_from:
        raise UserError(f"the run was imported from {config.imported_from}, without a text")
    for source in config.sources:
        try:
            path = Path(source).expanduser()
            endless = path.exists() and not (path.is_file() or path.is_dir())
        except (OSError, RuntimeError, ValueError):
            continue  # reading it will say what is wrong
        if endless:
            what = f"{source}, which the run names as its text, is not a file"
            raise UserError(f"{what}: name the text")
    return config.sources


def write_config(run: Path, config: RunConfig) -> None:
    """Write ``config.json``, sealed."""
    write_json(run / CONFIG, seal({"format": FORMAT, **asdict(config)}))


def read_tokenizer(run: Path) -> CharTokenizer:
    """Return the tokenizer of a run; a UserError with the file's name if missing or damaged."""
    path = run / TOKENIZER
    text = read_text(path, max_bytes=MAX_TOKENIZER_BYTES)
    if text.count("[") + text.count("{") > 4:  # lists of lists take forty times their size
        raise UserError(f"{path} is not a vocabulary: the run is damaged")
    check_seal(parse_json(text, str(path)), str(path))
    try:
        return tokenizer_from_json(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def write_tokenizer(run: Path, tokenizer: CharTokenizer) -> None:
    """Write ``tokenizer.json``, sealed."""
    write_json(run / TOKENIZER, seal(parse_json(tokenizer.to_json(), TOKENIZER)))


def locked(run: Path) -> filelock.AcquireReturnProxy[Any]:
    """Lock a run folder for this process, until the returned context or the process ends.

    Raises:
        UserError: another process trains into it.
    """
    try:
        return filelock.FileLock(run / LOCK).acquire(blocking=False)
    except filelock.Timeout as error:
        raise UserError(
            f"another process is training into {run}: wait for it, or give another --out"
        ) from error
