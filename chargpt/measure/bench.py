"""How fast is this machine, and how much of that does training use? ``chargpt bench`` in Python.

All that takes part in a comparison is measured in turns, on one synthetic text. A speed is the
median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import math
import random
import statistics
import string
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
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
from chargpt.compute.device import choose_device, cpu_name, describe_device
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import load_corpus
from chargpt.data.texts import STANDARD_INPUT
from chargpt.measure.peers import NanoGPT, Own, Runner, hugging_face, parse_peers
from chargpt.measure.timing import ceiling, forget_peak_memory, peak_memory_bytes, step_parts
from chargpt.runs.report import read_metrics
from chargpt.train import train
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer

N_CHARACTERS = 200_000
SYMBOLS = string.ascii_letters + string.digits + ".,\n"  # 65, as many as Shakespeare's
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ENDLESS = 1_000_000_000  # a budget in steps that no measurement spends

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to measure, and for how long.

    Raises:
        UserError: a number outside its range.
    """

    rounds: int = 3
    """Turns that each contender takes."""
    seconds: float = 5.0
    """Of a turn, warm-up apart."""
    peers: tuple[str, ...] = ()
    """Each ``name=folder``; see `chargpt.measure.peers.parse_peers`."""
    loss: float | None = None
    """Nats a character to reach; None: do not try."""

    def __post_init__(self) -> None:
        check(self.rounds >= 1, self, "rounds", "give a whole number of at least 1")
        check(0 < self.seconds < math.inf, self, "seconds", "give a positive number")
        good = self.loss is None or 0 < self.loss < math.inf
        check(good, self, "loss", "give a positive number, nats a character")


def bench(
    texts: Sequence[str] = ("tiny-shakespeare",),
    *,
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig | None = None,
    config: BenchConfig | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Measure training on this machine.

    Args:
        texts: what to reach ``config.loss`` on; not read without it.
        model_config: the shape.
        train_config: batch, device, precision, compilation; its budget only counts for the loss.
        data_config: how to read the texts.
        config: what to measure, and for how long.
        tell: is given a line now and then.

    Returns:
        What ``--json`` prints: ``machine``, ``choices`` (each with its reason),
        ``ceilings_gflops`` by dtype, ``train`` (speed, share of the ceiling, peak memory, ratios),
        ``model``, ``parts_milliseconds``, ``huggingface``, ``nanogpt`` (None if it is no peer) and
        ``loss`` (None if none was given). Speeds are in characters a second; what could not be
        measured is None.

    Raises:
        UserError: anything wrong with the settings, a peer or a text.
        TrainingError: out of memory, or the loss is not finite.
    """
    data_config, config = data_config or DataConfig(), config or BenchConfig()
    clones = parse_peers(config.peers)
    if config.loss is not None and STANDARD_INPUT not in texts:  # that can be read only once
        load_corpus(texts, data_config)
    try:
        with own_random_state():
            lines: list[str] = []
            trainer = synthetic_trainer(model_config, train_config, lines.append)
            report = _measure(trainer, _choices(lines, tell), clones, config, tell)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        device = describe_device(choose_device(train_config.device).device)
        raise TrainingError(
            f"out of memory on {device}: give a lower --batch-size ({train_config.batch_size}) or "
            f"--block-size ({model_config.block_size})"
        ) from error
    report["loss"] = None
    if config.loss is not None:
        tell(f"training to a validation loss of {config.loss:g}")
        report["loss"] = seconds_to_loss(
            config.loss,
            texts,
            model_config=model_config,
            train_config=train_config,
            data_config=data_config,
        )
    return report


def synthetic_trainer(
    model_config: GPT2Config, train_config: TrainConfig, report: Tell = lambda line: None
) -> Trainer:
    """Return a trainer, as `chargpt train` makes it, for random characters over 65 symbols.

    Raises:
        UserError: a setting that cannot work.
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
    tell: Tell,
) -> dict[str, Any]:
    tell("matrix products")
    ceilings = {name: ceiling(DTYPES[name], trainer.device) for name in _dtypes(trainer.device)}
    own = Own(trainer)
    compiled = trainer.forward is not trainer.model
    forget_peak_memory(trainer.device)
    guess = own.measure(0)
    memory = peak_memory_bytes(trainer.device)  # before a peer takes its own
    parts = step_parts(trainer)
    with ExitStack() as stack:
        theirs = hugging_face(trainer, compiled=compiled)
        runners: list[Runner] = [own, *theirs]
        for clone in clones.values():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            runners.append(NanoGPT(clone, trainer, folder, guess))
        seconds = _take_turns(runners, config, trainer.tokens_per_step, tell)
    speeds = {name: _speed(times, trainer.tokens_per_step) for name, times in seconds.items()}
    rates = {name: speed["characters_per_second"] for name, speed in speeds.items()}
    best = max((runner.name for runner in theirs), key=rates.__getitem__, default=None)
    needed = rates[own.name] * training_flops_per_token(trainer.model.config)  # FLOP/s
    return {
        "machine": {
            **describe_machine(trainer.device),
            "precision": trainer.precision.name,
            "precision_reason": trainer.precision.reason,
        },
        "choices": choices,
        "ceilings_gflops": {name: rate / 1e9 for name, rate in ceilings.items()},
        "train": {
            **speeds[own.name],
            "characters_per_step": trainer.tokens_per_step,
            "parameters": count_parameters(trainer.model),
            "ceiling_share": needed / ceilings[trainer.precision.name],
            "peak_memory_bytes": memory,
            "vs_huggingface": _ratio(seconds, own.name, best),
            "vs_nanogpt": _ratio(seconds, own.name, "nanoGPT"),
        },
        "model": asdict(trainer.model.config),
        "parts_milliseconds": parts,
        "huggingface": _described(best, speeds.get(best or "")),
        "nanogpt": _described("nanoGPT", speeds["nanoGPT"]) if clones else None,
    }


# --- the machine


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what a report says of the machine and of what runs on it."""
    return {
        "device": describe_device(device),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "chargpt": __version__,
        "torch": torch.__version__,
    }


def _dtypes(device: torch.device) -> Sequence[str]:
    return ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")


# --- training


def _choices(lines: Sequence[str], tell: Tell) -> dict[str, str]:
    """Return how the trainer was made fast: each choice by name, with its reason."""
    choices = {name: why.strip() for name, _, why in (line.partition(" ") for line in lines)}
    choices = {name: choices[name] for name in ("kernels", "attention", "compile")}
    for name, why in choices.items():
        tell(f"{name:<11}{why}")
    return choices


def _take_turns(
    runners: Sequence[Runner], config: BenchConfig, characters: int, tell: Tell
) -> dict[str, list[float]]:
    """Return the seconds of a step in each round, by the runner's name."""
    seconds: dict[str, list[float]] = {runner.name: [] for runner in runners}
    for number in range(1, config.rounds + 1):
        for runner in runners:
            times = seconds[runner.name]
            times.append(runner.measure(config.seconds))
            rate = human_count(characters / times[-1])
            tell(f"round {number} of {config.rounds}: {runner.name}: {rate} characters/s")
    return seconds


def _speed(seconds: Sequence[float], characters: int) -> dict[str, Any]:
    """Return the speed of steps that took so long, one for each round."""
    return {
        "characters_per_second": characters / statistics.median(seconds),
        "characters_per_second_min": characters / max(seconds),
        "characters_per_second_max": characters / min(seconds),
        "milliseconds_per_step": 1000 * statistics.median(seconds),
    }


def _ratio(seconds: dict[str, list[float]], own: str, other: str | None) -> float | None:
    """Return how many times as fast as `other` chargpt is: the median of the rounds' ratios."""
    if other not in seconds:
        return None
    pairs = zip(seconds[own], seconds[other], strict=True)
    return statistics.median(theirs / ours for ours, theirs in pairs)


def _described(name: str | None, speed: dict[str, Any] | None) -> dict[str, Any]:
    """Return a peer's speed with its name, or why there is none."""
    if name is None or speed is None:
        return {"name": None, **dict.fromkeys(_speed([1.0], 1)), "note": _NO_TRANSFORMERS}
    return {"name": name, **speed, "note": ""}


_NO_TRANSFORMERS = "not installed: pip install transformers"


# --- seconds to a loss


def seconds_to_loss(
    loss: float,
    texts: Sequence[str],
    *,
    model_config: GPT2Config,
    train_config: TrainConfig,
    data_config: DataConfig,
) -> dict[str, Any]:
    """Train with the whole budget, and look when the validation loss was first low enough.

    Args:
        loss: over the whole validation part, nats a character.
        texts: what to train on.
        model_config: the shape.
        train_config: how to train; its budget sets the schedule, too.
        data_config: how to read.

    Returns:
        ``target``; ``seconds`` of training at the first evaluation at or below it, compilation
        included and evaluations apart, and its ``step`` (both None if the budget ended first);
        ``best`` loss; ``train_seconds`` of the whole run.

    Raises:
        UserError: anything wrong with the texts.
        TrainingError: training cannot go on.
    """
    train_config = train_config.replace(log_interval=1, sample_length=0)  # the clock at every step
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


def table(report: dict[str, Any]) -> str:
    """Return what `bench` returned as lines for a person."""
    machine, own = report["machine"], report["train"]
    rows = [
        ("device", f"{machine['device']} ({machine['cpu']})"),
        ("torch", machine["torch"]),
        ("precision", f"{machine['precision']} ({machine['precision_reason']})"),
        *report["choices"].items(),
    ]
    for dtype, rate in report["ceilings_gflops"].items():
        rows.append((f"ceiling {dtype}", f"{rate:,.0f} GFLOP/s in products of matrices"))
    rows += [
        (
            "training",
            f"{human_count(own['parameters'])} parameters, {own['characters_per_step']:,} "
            f"characters a step; {own['ceiling_share']:.0%} of the {machine['precision']} ceiling",
        ),
        ("a step", ", ".join(f"{k} {v:.2f} ms" for k, v in report["parts_milliseconds"].items())),
        ("memory", _memory(own["peak_memory_bytes"])),
    ]
    if report["loss"] is not None:
        rows.append((f"loss {report['loss']['target']:g}", _reached(report["loss"])))
    lines = [f"{name:<15}{value}" for name, value in rows]
    return "\n".join([*lines, "", *_speeds(report)])


def _memory(n_bytes: int | None) -> str:
    return "not told by this system" if n_bytes is None else f"{human_count(n_bytes)}B at most"


def _reached(loss: dict[str, Any]) -> str:
    if loss["seconds"] is None:
        best = "none" if loss["best"] is None else f"{loss['best']:.4f}"
        return f"not reached in {loss['train_seconds']:.1f} s of training; the best was {best}"
    return f"after {loss['seconds']:.1f} s of training (step {loss['step']:,})"


def _speeds(report: dict[str, Any]) -> list[str]:
    own = report["train"]
    contenders = [("chargpt", own, None)]
    for key in ("huggingface", "nanogpt"):
        if report[key] is not None:
            contenders.append((report[key]["name"], report[key], own[f"vs_{key}"]))
    lines = [f"{'':<34}{'characters/s':>13}{'slowest':>11}{'fastest':>11}{'ms/step':>10}"]
    for name, speed, ratio in contenders:
        if ratio is None and name != "chargpt":
            lines.append(f"{'Hugging Face GPT-2':<34}{speed['note']}")
            continue
        numbers = [speed[f"characters_per_second{end}"] for end in ("", "_min", "_max")]
        line = f"{name:<34}{numbers[0]:>13,.0f}{numbers[1]:>11,.0f}{numbers[2]:>11,.0f}"
        line += f"{speed['milliseconds_per_step']:>10.2f}"
        lines.append(line + (f"  chargpt is {ratio:.2f}× as fast" if ratio else ""))
    return lines
