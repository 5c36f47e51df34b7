"""How fast is this machine, and how much of that does training use? ``chargpt bench`` in Python.

All contenders take turns, on one synthetic text. A speed is the median over the rounds, a ratio the
median of the rounds' ratios.
"""

from __future__ import annotations

import math
import random
import string
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chargpt.base.checks import check
from chargpt.base.errors import TrainingError, is_out_of_memory
from chargpt.base.seeding import own_random_state
from chargpt.base.units import human_count
from chargpt.base.version import __version__
from chargpt.compute.counts import count_parameters, training_flops_per_token
from chargpt.compute.device import DTYPES, choose_device, cpu_name, describe_device
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import load_corpus
from chargpt.data.texts import STANDARD_INPUT
from chargpt.measure import contenders, timing
from chargpt.measure.contenders import NANOGPT, OWN, Contender, ratio, summary
from chargpt.runs.report import read_metrics
from chargpt.train import train
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer

N_CHARACTERS = 200_000
SYMBOLS = string.ascii_letters + string.digits + ".,\n"  # 65, as many as Shakespeare's
ENDLESS = 1_000_000_000  # a budget in steps that no measurement reaches


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to measure, and for how long.

    Raises:
        UserError: a number outside its range.
    """

    rounds: int = 3
    """Turns of each contender."""
    seconds: float = 5.0
    """Seconds per turn, without the warm-up."""
    peers: tuple[str, ...] = ()
    """Each ``name=folder``; see `chargpt.measure.contenders.parse_peers`."""
    loss: float | None = None
    """Validation loss to reach, in nats per character; None: do not try."""

    def __post_init__(self) -> None:
        check(self.rounds >= 1, self, "rounds", "give a whole number of at least 1")
        check(0 < self.seconds < math.inf, self, "seconds", "give a positive number")
        good = self.loss is None or 0 < self.loss < math.inf
        check(good, self, "loss", "give a positive number, in nats per character")


def bench(
    texts: Sequence[str] = ("tiny-shakespeare",),
    *,
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig | None = None,
    config: BenchConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure training on this machine.

    Args:
        texts: the texts for ``config.loss``; not read without it.
        model_config: the shape.
        train_config: batch, device, precision, compilation; its budget matters for the loss only.
        data_config: how to read the texts.
        config: what to measure, and for how long.
        report: prints a line of progress.

    Returns:
        What ``--json`` prints: ``machine``, ``choices`` (each with its reason),
        ``ceilings_gflops`` by dtype, ``train`` (speed, share of the ceiling, peak memory, ratios),
        ``model``, ``parts_milliseconds``, ``huggingface``, ``nanogpt`` (None without that peer) and
        ``loss`` (None without ``config.loss``). Speeds are in characters per second; None stands
        for what could not be measured.

    Raises:
        UserError: a setting, a peer or a text is wrong.
        TrainingError: out of memory, or the loss is NaN or infinite.
    """
    data_config, config = data_config or DataConfig(), config or BenchConfig()
    clones = contenders.parse_peers(config.peers)
    if config.loss is not None and STANDARD_INPUT not in texts:  # it can be read only once
        load_corpus(texts, data_config)  # so that a mistake shows before the measurements
    try:
        with own_random_state():
            lines: list[str] = []
            trainer = synthetic_trainer(model_config, train_config, lines.append)
            figures = _measure(trainer, _choices(lines, report), clones, config, report)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = describe_device(choose_device(train_config.device).device)
        raise TrainingError(
            f"out of memory on {device}: give a lower --batch-size ({train_config.batch_size}) or "
            f"--block-size ({model_config.block_size})"
        ) from error
    figures["loss"] = None
    if config.loss is not None:
        report(f"training to a validation loss of {config.loss:g}")
        figures["loss"] = seconds_to_loss(
            config.loss,
            texts,
            model_config=model_config,
            train_config=train_config,
            data_config=data_config,
        )
    return figures


def synthetic_trainer(
    model_config: GPT2Config,
    train_config: TrainConfig,
    report: Callable[[str], None] = lambda line: None,
) -> Trainer:
    """Return a trainer, as `chargpt train` makes it, for a random text of 65 symbols.

    Raises:
        UserError: a setting is wrong.
    """
    rng = random.Random(train_config.seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.txt")
        path.write_text("".join(rng.choices(SYMBOLS, k=N_CHARACTERS)), encoding="utf-8", newline="")
        return make_plan(
            [str(path)],
            model_config=model_config,
            train_config=train_config.replace(steps=ENDLESS),
            data_config=DataConfig(),
            out=Path(folder, "run"),
            resuming=False,
            report=report,
        ).trainer


def _measure(
    trainer: Trainer,
    choices: dict[str, str],
    clones: dict[str, Path],
    config: BenchConfig,
    report: Callable[[str], None],
) -> dict[str, Any]:
    device, n_characters = trainer.device, trainer.tokens_per_step
    report("matrix products")
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    ceilings = {name: timing.ceiling(DTYPES[name], device) for name in dtypes}
    compiled = trainer.forward is not trainer.model
    timing.forget_peak_memory(device)
    guess = timing.median_seconds(contenders.own_step(trainer), 0, device)
    memory = timing.peak_memory_bytes(device)  # before other contenders take memory
    parts = timing.step_parts(trainer)
    with tempfile.TemporaryDirectory() as folder:
        turns = _contenders(trainer, config.seconds, compiled=compiled)
        if clones:
            nanogpt = contenders.NanoGPT(clones["nanogpt"], trainer, Path(folder), guess)
            turns.append(
                Contender(NANOGPT, lambda: n_characters / nanogpt.step_seconds(config.seconds))
            )
        rates = contenders.take_turns(turns, config.rounds, report)
    speeds = {name: _speed(of_name, n_characters) for name, of_name in rates.items()}
    medians = {name: speed["characters_per_second"] for name, speed in speeds.items()}
    theirs = [name for name in rates if name not in (OWN, NANOGPT)]
    best = max(theirs, key=medians.__getitem__, default=None)
    needed = medians[OWN] * training_flops_per_token(trainer.model.config)  # FLOP/s
    return {
        "machine": {
            **describe_machine(device),
            "precision": trainer.precision.name,
            "precision_reason": trainer.precision.reason,
        },
        "choices": choices,
        "ceilings_gflops": {name: rate / 1e9 for name, rate in ceilings.items()},
        "train": {
            **speeds[OWN],
            "characters_per_step": n_characters,
            "parameters": count_parameters(trainer.model),
            "ceiling_share": needed / ceilings[trainer.precision.name],
            "peak_memory_bytes": memory,
            "vs_huggingface": ratio(rates, best),
            "vs_nanogpt": ratio(rates, NANOGPT),
        },
        "model": asdict(trainer.model.config),
        "parts_milliseconds": parts,
        "huggingface": _peer(best, speeds),
        "nanogpt": _peer(NANOGPT, speeds) if clones else None,
    }


def _contenders(trainer: Trainer, seconds: float, *, compiled: bool) -> list[Contender]:
    """Return chargpt and Hugging Face's models, which train in this process."""

    def contender(name: str, step: Callable[[], None]) -> Contender:
        def measure() -> float:
            step_seconds = timing.median_seconds(step, seconds, trainer.device)
            return trainer.tokens_per_step / step_seconds

        return Contender(name, measure)

    theirs = contenders.hugging_face_trainers(trainer, compiled=compiled)
    own = contender(OWN, contenders.own_step(trainer))
    return [own, *(contender(peer.name, peer.step) for peer in theirs)]


# --- the machine


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device, the processor, the threads and the versions."""
    return {
        "device": describe_device(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "chargpt": __version__,
        "torch": torch.__version__,
    }


# --- training


def _choices(lines: Sequence[str], report: Callable[[str], None]) -> dict[str, str]:
    """Return how the trainer was made fast: each choice by name, with its reason."""
    choices = {name: why.strip() for name, _, why in (line.partition(" ") for line in lines)}
    choices = {name: choices[name] for name in ("kernels", "attention", "compile")}
    for name, why in choices.items():
        report(f"{name:<11}{why}")
    return choices


def _speed(rates: Sequence[float], characters_per_step: int) -> dict[str, Any]:
    speed = summary(rates)
    step = characters_per_step / speed["characters_per_second"]
    return {**speed, "milliseconds_per_step": 1000 * step}


def _peer(name: str | None, speeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a peer's name and speed, or a note on why it did not take part."""
    if name is None:
        note = "not installed: pip install transformers"
        return {"name": None, **dict.fromkeys(speeds[OWN]), "note": note}
    return {"name": name, **speeds[name], "note": ""}


# --- seconds to a loss


def seconds_to_loss(
    loss: float,
    texts: Sequence[str],
    *,
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig,
) -> dict[str, Any]:
    """Train with the whole budget and find out when the validation loss first reached a value.

    Args:
        loss: mean over the whole validation part, in nats per character.
        texts: the texts to train on.
        model_config: the shape.
        train_config: how to train; its budget also sets the schedule.
        data_config: how to read the texts.

    Returns:
        ``target``; ``seconds`` of training at the first evaluation at or below it, with compilation
        and without evaluations, and its ``step`` (both None if the budget ended first); ``best``
        loss; ``train_seconds`` of the whole run.

    Raises:
        UserError: a text is wrong.
        TrainingError: training cannot continue.
    """
    train_config = train_config.replace(log_interval=1, sample_length=0)  # logs the time of steps
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        summary = train(
            texts,
            model_config=model_config,
            train_config=train_config,
            data_config=data_config,
            out=out,
        ).summary
        rows = read_metrics(out)
    clock = {row["step"]: row["train_seconds"] for row in rows if row["split"] == "train"}
    evaluations = [row for row in rows if row["split"] == "validation"]
    step = next((row["step"] for row in evaluations if row["val_loss"] <= loss), None)
    return {
        "target": loss,
        "seconds": None if step is None else clock[step],
        "step": step,
        "best": summary.val_loss,
        "train_seconds": summary.train_seconds,
    }


# --- for people


def table(figures: dict[str, Any]) -> str:
    """Return the figures of `bench` as lines for a person."""
    machine, own = figures["machine"], figures["train"]
    rows = [
        ("device", f"{machine['device']} ({machine['cpu']})"),
        ("torch", machine["torch"]),
        ("precision", f"{machine['precision']} ({machine['precision_reason']})"),
        *figures["choices"].items(),
    ]
    for dtype, rate in figures["ceilings_gflops"].items():
        rows.append((f"ceiling {dtype}", f"{rate:,.0f} GFLOP/s in matrix products"))
    rows += [
        (
            "training",
            f"{human_count(own['parameters'])} parameters, {own['characters_per_step']:,} "
            f"characters/step; {own['ceiling_share']:.0%} of the {machine['precision']} ceiling",
        ),
        ("a step", ", ".join(f"{k} {v:.2f} ms" for k, v in figures["parts_milliseconds"].items())),
        ("memory", _memory(own["peak_memory_bytes"])),
    ]
    if figures["loss"] is not None:
        rows.append((f"loss {figures['loss']['target']:g}", _reached(figures["loss"])))
    lines = [f"{name:<15}{value}" for name, value in rows]
    return "\n".join([*lines, "", *_speeds(figures)])


def _memory(n_bytes: int | None) -> str:
    return "not reported by this system" if n_bytes is None else f"{human_count(n_bytes)}B at peak"


def _reached(loss: dict[str, Any]) -> str:
    if loss["seconds"] is None:
        best = "none" if loss["best"] is None else f"{loss['best']:.4f}"
        return f"not reached in {loss['train_seconds']:.1f} s of training; the best was {best}"
    return f"after {loss['seconds']:.1f} s of training (step {loss['step']:,})"


def _speeds(figures: dict[str, Any]) -> list[str]:
    own = figures["train"]
    rows = [(OWN, own, None)]
    for key in ("huggingface", "nanogpt"):
        if figures[key] is not None:
            rows.append((figures[key]["name"], figures[key], own[f"vs_{key}"]))
    lines = [f"{'':<34}{'characters/s':>13}{'slowest':>11}{'fastest':>11}{'ms/step':>10}"]
    for name, speed, times in rows:
        if name is None:
            lines.append(f"{'Hugging Face GPT-2':<34}{speed['note']}")
            continue
        numbers = [speed[f"characters_per_second{end}"] for end in ("", "_min", "_max")]
        line = f"{name:<34}{numbers[0]:>13,.0f}{numbers[1]:>11,.0f}{numbers[2]:>11,.0f}"
        line += f"{speed['milliseconds_per_step']:>10.2f}"
        lines.append(line + (f"  chargpt is {times:.2f}× as fast" if times else ""))
    return lines
