"""Everything decided before the first step, and the lines that tell the user why."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chargpt.base.errors import UserError
from chargpt.base.seeding import INIT, derive_seed
from chargpt.base.units import human_count
from chargpt.base.version import __version__
from chargpt.compute.counts import count_parameters
from chargpt.compute.device import (
    PrecisionChoice,
    choose_device,
    choose_precision,
    cpu_name,
    describe_device,
)
from chargpt.compute.optimizers import make_optimizer
from chargpt.compute.parallel import ParallelChoice, choose_parallel, parallelize
from chargpt.config import BUDGETS, DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import Corpus, load_corpus
from chargpt.data.tokenizer import CharTokenizer
from chargpt.data.windows import Windows
from chargpt.model import GPT2
from chargpt.runs.checkpoint import MODEL, find_checkpoint
from chargpt.runs.folder import RunConfig, read_config
from chargpt.runs.weights import check_model_file
from chargpt.training.saving import restore_last
from chargpt.training.trainer import Trainer

# What may differ when a run goes on: how long, how often, and on what; nothing that it learns.
FREE_ON_RESUME = {
    *BUDGETS,
    *("eval_interval", "save_interval", "patience", "log_interval", "sample_length"),
    *(
        "deterministic",
        "device",
        "precision",
        "kernels",
        "attention",
        "compile",
        "parallel",
        "track",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A trainer ready for its first step."""

    trainer: Trainer
    corpus: Corpus
    config: RunConfig
    """What config.json will hold."""
    environment_before: dict[str, Any]
    """Of the run that is gone on with; empty: it begins."""
    lines: list[str]
    """For the user: what was found, what was decided, and why."""


def make_plan(
    sources: Sequence[str],
    *,
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig,
    out: Path,
    resuming: bool,
) -> Plan:
    """Read the text, choose the hardware and build the trainer; nothing is written.

    Args:
        sources: see `chargpt.data.corpus.load_corpus`.
        model_config: the shape; a ``vocab_size`` of 0 follows the text.
        train_config: how to train.
        data_config: how to read and split.
        out: the run folder.
        resuming: put the trainer where the run in `out` stopped.

    Raises:
        UserError: anything that cannot work, found before the first step.
    """
    device, why_device = choose_device(train_config.device)
    saved = read_config(out) if resuming else None
    precision = choose_precision(train_config.precision, device)
    if saved and train_config.precision == "auto":
        precision = _precision_as_before(saved.environment, device) or precision
    parallel = choose_parallel(train_config.parallel, device, train_config.batch_size)
    corpus = load_corpus(sources, data_config)
    model_config = _with_vocabulary(model_config, corpus.tokenizer)
    if saved is not None:  # before memory is taken for what a file asks for
        check_model_file(find_checkpoint(out, "last") / MODEL, saved.model_config)
    torch.manual_seed(derive_seed(train_config.seed, INIT))
    gpt2 = GPT2(model_config).to(device)
    trainer = _make_trainer(
        gpt2, train_config, corpus, precision=precision, parallel=parallel, out=out
    )
    config = _run_config(trainer, corpus, data_config)
    lines = _describe(trainer, corpus, data_config, why_device)
    if saved is not None:
        _refuse_changes(saved, config)
        restore_last(trainer)
        lines.append(f"resuming   after step {trainer.state.step:,}")
    return Plan(
        trainer=trainer,
        corpus=corpus,
        config=config,
        environment_before=saved.environment if saved else {},
        lines=lines,
    )


def _make_trainer(
    gpt2: GPT2,
    train_config: TrainConfig,
    corpus: Corpus,
    *,
    precision: PrecisionChoice,
    parallel: ParallelChoice,
    out: Path,
) -> Trainer:
    device = gpt2.token_embedding.weight.device
    return Trainer(
        model=gpt2,
        forward=parallelize(gpt2, parallel, precision),
        optimizer=make_optimizer(gpt2, train_config, muon_dtype=_muon_dtype(device, precision)),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.name == "fp16"),
        windows=Windows(corpus.train, gpt2.config.block_size, train_config.seed),
        validation=corpus.validation,
        train_config=train_config,
        precision=precision,
        parallel=parallel,
        out=out,
    )


def _precision_as_before(
    environment: dict[str, Any], device: torch.device
) -> PrecisionChoice | None:
    """Return the precision that the run began with, if the device is the same."""
    known = environment.get("precision") in ("fp32", "bf16", "fp16")
    if not known or environment.get("device") != describe_device(device):
        return None
    choose_precision(environment["precision"], device)  # refuses what cannot be here
    return PrecisionChoice(environment["precision"], "as the run began")


def _muon_dtype(device: torch.device, precision: PrecisionChoice) -> torch.dtype:
    """Return what Muon orthogonalises in: bf16 is enough, where it is not slower."""
    fast = device.type == "cuda" or precision.name == "bf16"
    return torch.bfloat16 if fast else torch.float32


def _with_vocabulary(config: GPT2Config, tokenizer: CharTokenizer) -> GPT2Config:
    if config.vocab_size not in (0, tokenizer.vocab_size):
        raise UserError(
            f"vocab_size is {config.vocab_size}, but the text has {tokenizer.vocab_size} distinct "
            "tokens: leave out --vocab-size"
        )
    return config.replace(vocab_size=tokenizer.vocab_size)


def _run_config(trainer: Trainer, corpus: Corpus, data_config: DataConfig) -> RunConfig:
    return RunConfig(
        model_config=trainer.model.config,
        train_config=trainer.train_config,
        data_config=data_config,
        sources=corpus.sources,
        text=corpus.facts,
        environment={
            "chargpt": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "processor": cpu_name(),
            "device": describe_device(trainer.device),
            "devices": max(1, len(trainer.parallel.device_ids)),
            "precision": trainer.precision.name,
            "threads": torch.get_num_threads(),
        },
    )


def _refuse_changes(before: RunConfig, now: RunConfig) -> None:
    """Refuse to resume a run with settings or texts that change what it learns.

    Raises:
        UserError: a difference in the model, the data, or how it learns.
    """
    for part in ("data_config", "model_config", "train_config"):
        was, wish = asdict(getattr(before, part)), asdict(getattr(now, part))
        for name in [name for name in was if name not in FREE_ON_RESUME]:
            if name == "vocab_size" and before.text != now.text:
                continue  # another text explains another vocabulary; see below
            if was[name] != wish[name]:
                raise UserError(
                    f"{name} was {was[name]!r} in this run and cannot become {wish[name]!r}: leave "
                    "it as it was, or train anew with another --out"
                )
    if before.text != now.text:
        raise UserError(
            f"{', '.join(now.sources)}: not the text this run learned from (its SHA-256 differs): "
            "give that text, or train anew with another --out"
        )


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each condition under which a run is gone on with that is not as it was."""
    return [
        f"resuming   {name} was {was}, is {now.get(name)}: losses may differ by rounding"
        for name, was in before.items()
        if now.get(name) != was
    ]


def _describe(
    trainer: Trainer, corpus: Corpus, data_config: DataConfig, why_device: str
) -> list[str]:
    model, precision = trainer.model, trainer.precision
    lines = [
        f"text       {corpus.summary()}",
        f"model      {human_count(count_parameters(model))} parameters; {_settings(model.config)}",
        f"training   {_settings(trainer.train_config)}",
        f"data       {_settings(data_config)}",
        f"device     {describe_device(trainer.device)} ({why_device})",
        f"precision  {precision.name} ({precision.reason})",
        f"budget     {_describe_budget(trainer)}",
    ]
    if trainer.device.type == "cuda":
        lines.append(f"parallel   {trainer.parallel.reason}")
    return lines


def _settings(config: GPT2Config | TrainConfig | DataConfig) -> str:
    """Return every setting as ``name value``, but budgets that are not in force."""
    values = {name: value for name, value in asdict(config).items() if value is not None}
    return ", ".join(
        f"{name} {value!r}" if value == "" or str(value).isspace() else f"{name} {value}"
        for name, value in values.items()
    )


def _describe_budget(trainer: Trainer) -> str:
    tokens = f"{trainer.tokens_per_step:,} tokens a step"
    every = f"evaluation every {trainer.eval_interval:,} steps"
    if trainer.total_steps is None:
        return f"{trainer.train_config.minutes:g} minutes of training, {tokens}, {every}"
    seen = trainer.total_steps * trainer.tokens_per_step / len(trainer.windows.tokens)
    return f"{trainer.total_steps:,} steps, {tokens} ({seen:.1f} epochs), {every}"
