"""Everything decided before the first step, each with its reason. Nothing is written here."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chargpt.base.errors import UserError
from chargpt.base.seeding import INIT, derive_seed
from chargpt.base.units import human_count
from chargpt.base.version import __version__
from chargpt.compute.build import is_library_name
from chargpt.compute.counts import count_parameters, training_flops_per_token
from chargpt.compute.device import (
    PrecisionChoice,
    choose_device,
    choose_precision,
    cpu_name,
    describe_device,
)
from chargpt.compute.optimizers import make_optimizer
from chargpt.compute.parallel import ParallelChoice, choose_parallel, shard
from chargpt.compute.world import ALONE, World, launch_id
from chargpt.config import BUDGETS, DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import Corpus, load_corpus
from chargpt.data.windows import Windows
from chargpt.model import GPT2
from chargpt.runs.checkpoint import MODEL
from chargpt.runs.folder import RunConfig, read_config, read_tokenizer
from chargpt.runs.weights import check_model_file
from chargpt.training.ngram_targets import NgramTargets
from chargpt.training.saving import restore_last, send_model
from chargpt.training.size import Choice
from chargpt.training.speed import SpeedChoices, accelerate, bf16_gain, has_same_bits
from chargpt.training.start import Start, read_start, take_weights
from chargpt.training.trainer import Trainer

FREE_ON_RESUME = {
    *BUDGETS,
    *("eval_interval", "save_interval", "patience", "log_interval", "sample_length", "track"),
    *("device", "precision", "kernels", "attention", "compile", "parallel", "deterministic"),
}
"""May change on resume: budget, intervals, hardware; nothing that affects learning."""
LARGE_HEAD = 0.25  # share of the parameters or operations
AnyConfig = GPT2Config | TrainConfig | DataConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A trainer ready for its first step."""

    trainer: Trainer
    corpus: Corpus
    run_config: RunConfig  # what config.json will hold
    speed: SpeedChoices


def make_plan(
    sources: Sequence[str],
    *,
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig,
    out: Path,
    resuming: bool,
    start_from: Path | None = None,
    choose: Callable[[Corpus], Choice] | None = None,
    quiet: bool = True,
    report: Callable[[str], None] = lambda line: None,
    world: World = ALONE,
) -> Plan:
    """Read the text, choose the hardware, build the trainer; report each choice and its reason.

    A ``vocab_size`` of 0 follows the text. With `resuming`, the trainer is put where the run in
    `out` stopped; its ``last/`` must be whole. A new run takes the weights of the run `start_from`,
    if one is given. `choose` replaces the configurations of a new run by those that suit its text;
    until then they name the device, and the shape that `start_from` has. `quiet` hides the progress
    of reading the text. The processes of `world` plan together; rank 0 reads runs.

    Raises:
        UserError: anything that cannot work.
    """
    device, device_reason = choose_device(train_config.device)
    parallel = _parallel(device, world, model_config, train_config)
    if device.type == "cuda" and world.size > 1:
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    before = world.on_first(lambda: read_config(out)) if resuming else None
    start = None
    if start_from and not before and world.is_first:
        start = read_start(start_from, model_config, data_config.tokenizer)
    known, origin = world.on_first(lambda: _vocabulary(start, before, start_from, out))
    corpus = load_corpus(sources, data_config, characters=known, quiet=quiet, report=report)
    _refuse_another_text(corpus, world)
    if before:  # before memory is taken for what a file asks for
        shape = before.model_config
        world.on_first(lambda: check_model_file(out / "last" / MODEL, shape))
    rates: Any = before.environment.get("rates") if before else None
    model_config = _with_vocabulary(model_config, corpus.tokenizer.vocab_size)
    if choose and not before:
        choice = world.on_first(lambda: choose(corpus))
        model_config, train_config, rates = choice.model_config, choice.train_config, choice.rates
        for line in choice.reasons:
            report(f"auto       {line}")
        parallel = _parallel(device, world, model_config, train_config)
    precision = world.on_first(  # which may measure this machine
        lambda: _choose_precision(train_config, model_config, device, before)
    )
    model = _make_model(model_config, train_config, device)
    if start:
        report(take_weights(model, corpus.tokenizer, start))
    if start_from and not before:
        send_model(model, world)
    shard(model, parallel, precision)
    trainer = _make_trainer(
        model, train_config, corpus, precision=precision, parallel=parallel, out=out, world=world
    )
    if before:
        _refuse_changes(before, trainer, data_config, corpus)
        restore_last(trainer)
    for line in _describe(trainer, corpus, data_config, device_reason):
        report(line)
    if before:
        report(f"resuming   after step {trainer.state.step:,}")
    speed = accelerate(trainer, report)
    environment = _environment(trainer, speed)
    environment |= {k: v for k, v in {"from": origin, "rates": rates}.items() if v}
    if before:
        same_bits = has_same_bits(trainer, speed)
        _report_changes(before.environment, environment, report, same_bits=same_bits)
    run_config = RunConfig(
        model_config=model.config,
        train_config=train_config,
        data_config=data_config,
        sources=corpus.sources,
        text=corpus.facts,
        environment=environment,
    )
    return Plan(trainer=trainer, corpus=corpus, run_config=run_config, speed=speed)


def _parallel(
    device: torch.device, world: World, model_config: GPT2Config, train_config: TrainConfig
) -> ParallelChoice:
    batch_size = train_config.batch_size
    return choose_parallel(train_config.parallel, device, world, model_config, batch_size)


def _make_model(model_config: GPT2Config, train_config: TrainConfig, device: torch.device) -> GPT2:
    torch.manual_seed(derive_seed(train_config.seed, INIT))
    return GPT2(model_config).to(device)


def _make_trainer(
    model: GPT2,
    train_config: TrainConfig,
    corpus: Corpus,
    *,
    precision: PrecisionChoice,
    parallel: ParallelChoice,
    out: Path,
    world: World,
) -> Trainer:
    device = model.token_embedding.weight.device
    # bf16 is precise enough for Muon's orthogonalisation, where it is not slower.
    fast_bf16 = device.type == "cuda" or precision.name == "bf16"
    muon_dtype = torch.bfloat16 if fast_bf16 else torch.float32
    return Trainer(
        model=model,
        forward=model,
        optimizer=make_optimizer(model, train_config, muon_dtype=muon_dtype),
        scaler=torch.amp.GradScaler(device.type, enabled=precision.name == "fp16"),
        windows=Windows(corpus.train, model.config.block_size, train_config.seed),
        ngram=_ngram(corpus, train_config),
        validation=corpus.validation,
        train_config=train_config,
        precision=precision,
        parallel=parallel,
        out=out,
        world=world,
    )


def _ngram(corpus: Corpus, train_config: TrainConfig) -> NgramTargets | None:
    if not train_config.has_ngram:
        return None
    return NgramTargets.count(corpus.train, corpus.tokenizer.vocab_size, train_config.ngram_order)


def _choose_precision(
    train_config: TrainConfig,
    model_config: GPT2Config,
    device: torch.device,
    before: RunConfig | None,
) -> PrecisionChoice:
    if train_config.precision != "auto":
        return choose_precision(train_config.precision, device)
    same = _same_precision(before.environment, device) if before else None
    return same or choose_precision("auto", device, bf16_gain(train_config, model_config, device))


def _refuse_another_text(corpus: Corpus, world: World) -> None:
    """Refuse a text on this machine that differs from that of rank 0."""
    if corpus.facts != world.on_first(lambda: corpus.facts):
        raise UserError(
            f"{', '.join(corpus.sources)}: not the text that rank 0 trains on (its SHA-256 "
            "differs): give every machine the same files"
        )


def _with_vocabulary(model_config: GPT2Config, vocab_size: int) -> GPT2Config:
    if model_config.vocab_size not in (0, vocab_size):
        raise UserError(
            f"vocab_size is {model_config.vocab_size}, but the text has {vocab_size} distinct "
            "tokens: leave out --vocab-size"
        )
    return model_config.replace(vocab_size=vocab_size)


# --- resuming


def _vocabulary(
    start: Start | None, before: RunConfig | None, start_from: Path | None, out: Path
) -> tuple[tuple[str, ...], str | None]:
    """Return the characters that join those of the text, and the run that a run starts from."""
    if start:
        return start.tokenizer.characters, str(start.run)
    origin = _origin(before, start_from) if before else None
    return (read_tokenizer(out).characters if origin else ()), origin


def _origin(before: RunConfig, start_from: Path | None) -> str | None:
    """Return the run whose model a run started from; a UserError if another one is given."""
    origin: str | None = before.environment.get("from")
    if start_from and str(start_from) != origin:
        started = f"from {origin}" if origin else "without another run's model"
        raise UserError(f"this run started {started}, not from {start_from}: leave out --from")
    return origin


def _same_precision(environment: dict[str, Any], device: torch.device) -> PrecisionChoice | None:
    """Return the precision that the run started with, if the device is the same."""
    known = environment.get("precision") in ("fp32", "bf16", "fp16")
    if not known or environment.get("device") != _device_name(device):
        return None
    choose_precision(environment["precision"], device)  # refuses what this device cannot do
    return PrecisionChoice(environment["precision"], "as the run started")


def _device_name(device: torch.device) -> str:
    """Return a GPU's name, or "cpu"; the environment has threads and processor besides."""
    return "cpu" if device.type == "cpu" else describe_device(device)


def _refuse_changes(
    before: RunConfig, trainer: Trainer, data_config: DataConfig, corpus: Corpus
) -> None:
    """Refuse to resume a run with settings or texts that would change what it learns."""
    _refuse_change(before.data_config, data_config)
    if before.text != corpus.facts:
        raise UserError(
            f"{', '.join(corpus.sources)}: not the text this run learned from (its SHA-256 "
            "differs): give that text, or train again with another --out"
        )
    _refuse_change(before.model_config, trainer.model.config)
    _refuse_change(before.train_config, trainer.train_config)


def _refuse_change(before: AnyConfig, now: AnyConfig) -> None:
    for name, was in asdict(before).items():
        wanted = getattr(now, name)
        if was != wanted and name not in FREE_ON_RESUME:
            raise UserError(
                f"{name} was {was!r} in this run and cannot become {wanted!r}: leave it as it was, "
                "or train again with another --out"
            )


def _report_changes(
    was: dict[str, Any], now: dict[str, Any], report: Callable[[str], None], *, same_bits: bool
) -> None:
    """Report what has changed and may round differently."""
    for name in _changes(was, now, same_bits=same_bits):
        report(
            f"resuming   {name} was {was[name]}, is {now.get(name)}: losses may differ by rounding"
        )


def _changes(was: dict[str, Any], now: dict[str, Any], *, same_bits: bool) -> list[str]:
    """Return the names of what changed and may round differently; see `has_same_bits`."""
    names = [name for name in was if was[name] != now.get(name) and name != "launch"]
    if same_bits and is_library_name(was.get("kernels", "")):
        return [name for name in names if name not in ("threads", "kernels")]
    return names


def _environment(trainer: Trainer, speed: SpeedChoices) -> dict[str, Any]:
    """Return what may change how numbers are rounded."""
    return {
        "chargpt": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": cpu_name(),
        "device": _device_name(trainer.device),
        "devices": trainer.world.size * trainer.parallel.n_gpus,
        "precision": trainer.precision.name,
        "threads": torch.get_num_threads(),
        **speed._asdict(),
        **({"launch": launch_id()} if launch_id() else {}),
    }


# --- lines for the user


def _describe(
    trainer: Trainer, corpus: Corpus, data_config: DataConfig, device_reason: str
) -> list[str]:
    model, precision = trainer.model, trainer.precision
    lines = [
        f"text       {corpus.summary()}",
        f"model      {human_count(count_parameters(model))} parameters; {_settings(model.config)}",
        f"training   {_settings(trainer.train_config, TrainConfig())}",
        f"device     {describe_device(trainer.device)} ({device_reason})",
        f"precision  {precision.name} ({precision.reason})",
        f"budget     {_describe_budget(trainer)}",
    ]
    if corpus.tokenizer.unit == "char" and (head := _describe_head(model)):
        lines.append(head)
    if data := _settings(data_config, DataConfig()):
        lines.append(f"data       {data}")
    if trainer.device.type == "cuda" or trainer.world.size > 1:
        lines.append(f"parallel   {trainer.parallel.reason}")
    return lines


def _describe_head(model: GPT2) -> str:
    """Return what the vocabulary costs, if that is much."""
    config = model.config
    weights = config.vocab_size * config.d_model
    parameters = weights / count_parameters(model)
    operations = 6 * weights / training_flops_per_token(config)
    if max(parameters, operations) < LARGE_HEAD:
        return ""
    return (
        f"head       {config.vocab_size:,} tokens take {parameters:.0%} of the parameters and "
        f"{operations:.0%} of the operations: --min-count or --tokenizer byte makes them fewer"
    )


def _settings(config: AnyConfig, usual: AnyConfig | None = None) -> str:
    """Return settings as ``name value``: those that are not None, and not as `usual`."""
    known = asdict(usual) if usual else {}
    return ", ".join(
        f"{name} {value if str(value).strip() else repr(value)}"
        for name, value in asdict(config).items()
        if value is not None and value != known.get(name)
    )


def _describe_budget(trainer: Trainer) -> str:
    tokens = f"{trainer.tokens_per_step:,} tokens a step"
    every = f"evaluation every {trainer.eval_interval:,} steps"
    minutes = trainer.train_config.minutes
    if trainer.total_steps is None:
        return f"{minutes:g} minutes of training, {tokens}, {every}"
    limit = "" if minutes is None else f", at most {minutes:g} minutes of training"
    seen = trainer.total_steps * trainer.tokens_per_step / len(trainer.windows.tokens)
    return f"{trainer.total_steps:,} steps{limit}, {tokens} ({seen:.1f} epochs), {every}"
