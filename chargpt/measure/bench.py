"""How fast is this machine, and how much of that does training use? ``chargpt bench`` in Python.

All contenders take turns, on one random text. Figures are medians over the rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from chargpt.base.checks import Rule, check_fields
from chargpt.base.seeding import own_random_state
from chargpt.base.units import human_count
from chargpt.compute.counts import count_parameters, training_flops_per_token
from chargpt.compute.device import DTYPES, PrecisionChoice
from chargpt.config import DataConfig, GPT2Config, PositiveFloat, PositiveInt, TrainConfig
from chargpt.data.corpus import load_corpus
from chargpt.data.texts import STANDARD_INPUT
from chargpt.measure import contenders, timing
from chargpt.measure.contenders import NANOGPT, OWN, PYTORCH
from chargpt.measure.timing import median_seconds
from chargpt.runs.report import read_metrics
from chargpt.train import train
from chargpt.training.plan import Plan
from chargpt.training.probe import synthetic_plan
from chargpt.training.trainer import Trainer

CHOICES = ("kernels", "attention", "compile")
MISSING = "not installed: pip install transformers"
_LOSS = Rule(lambda loss: loss > 0, "give a positive number, in nats per character")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchConfig:
    """What to measure, and for how long; a UserError names a number outside its range."""

    rounds: PositiveInt = 3
    """Turns of each contender."""
    seconds: PositiveFloat = 5.0
    """Seconds per turn, without the warm-up."""
    peers: tuple[str, ...] = ()
    """``nanogpt=folder``, the folder of a local clone; or empty."""
    loss: Annotated[float | None, _LOSS] = None
    """Validation loss to reach, in nats per character; None: do not try."""

    def __post_init__(self) -> None:
        check_fields(self)


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

    The texts and the budget matter for ``config.loss`` only.

    Returns:
        What ``--json`` prints: ``machine``, ``choices`` with reasons, ``ceilings_gflops``,
        ``train``, ``model``, ``parts_milliseconds``, ``pytorch`` (chargpt without its kernels),
        ``huggingface``, ``nanogpt`` and ``loss``. Speeds are in characters per second; None stands
        for what was not measured.

    Raises:
        UserError: a setting, a peer or a text is wrong.
        TrainingError: out of memory, or the loss is NaN or infinite.
    """
    data_config, config = data_config or DataConfig(), config or BenchConfig()
    clone = contenders.find_clone(config.peers)
    if config.loss is not None and STANDARD_INPUT not in texts:  # it can be read only once
        load_corpus(texts, data_config)  # so that a mistake shows before the measurements
    sizes = f"--batch-size ({train_config.batch_size}) or --block-size ({model_config.block_size})"
    choices: dict[str, str] = {}

    def note(line: str) -> None:
        name, _, reason = line.partition(" ")
        if name in CHOICES:
            choices[name] = reason.strip()
            report(line)

    with contenders.enough_memory(train_config.device, sizes), own_random_state():
        plan = synthetic_plan(model_config, train_config, note)
        figures = _measure(plan, choices, clone, config, report)
    figures["loss"] = None
    if config.loss is not None:
        report(f"training to a validation loss of {config.loss:g}")
        configs = {"model_config": model_config, "train_config": train_config}
        figures["loss"] = seconds_to_loss(config.loss, texts, **configs, data_config=data_config)
    return figures


def synthetic_trainer(model_config: GPT2Config, train_config: TrainConfig) -> Trainer:
    """Return a trainer, as `chargpt train` makes it, for a random text of 65 symbols."""
    return synthetic_plan(model_config, train_config).trainer


def _measure(
    plan: Plan,
    choices: dict[str, str],
    clone: Path | None,
    config: BenchConfig,
    report: Callable[[str], None],
) -> dict[str, Any]:
    trainer = plan.trainer
    device, n_characters, precision = trainer.device, trainer.tokens_per_step, trainer.precision
    machine = contenders.describe_machine(device)
    report("matrix products")
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    ceilings = {name: timing.ceiling(DTYPES[name], device) for name in dtypes}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    steps = {OWN: timing.own_step(trainer)}
    guess = median_seconds(steps[OWN], 0, device)
    memory = timing.peak_memory_bytes(device)  # before other contenders take memory
    parts = timing.step_parts(trainer)
    if plan.speed.kernels != "off":
        steps[PYTORCH] = timing.own_step(_without_kernels(trainer))
    hugging_face = _hugging_face_steps(trainer)
    steps |= hugging_face
    seconds = config.seconds
    jobs = {name: partial(median_seconds, step, seconds, device) for name, step in steps.items()}
    if clone:
        jobs[NANOGPT] = partial(contenders.NanoGPT(clone, trainer, guess).step_seconds, seconds)
    rows = contenders.compare(jobs, n_characters, config.rounds, report)
    speeds: dict[str, dict[str, Any]] = {name: dict(row.speed) for name, row in rows.items()}
    for speed in speeds.values():
        speed["milliseconds_per_step"] = 1000 * n_characters / speed["characters_per_second"]
    best = max(hugging_face, key=lambda name: speeds[name]["characters_per_second"], default=None)
    per_token = training_flops_per_token(trainer.model.config)
    share = speeds[OWN]["characters_per_second"] * per_token / ceilings[precision.name]

    def peer(name: str | None) -> dict[str, Any]:
        speed = speeds[name] if name else dict.fromkeys(speeds[OWN])
        return {"name": name, **speed, "note": "" if name else MISSING}

    return {
        "machine": {**machine, "precision": precision.name, "precision_reason": precision.reason},
        "choices": choices,
        "ceilings_gflops": {name: rate / 1e9 for name, rate in ceilings.items()},
        "train": {
            **speeds[OWN],
            "characters_per_step": n_characters,
            "parameters": count_parameters(trainer.model),
            "ceiling_share": share,
            "peak_memory_bytes": memory,
            "vs_pytorch": rows[PYTORCH].times if PYTORCH in rows else None,
            "vs_huggingface": rows[best].times if best else None,
            "vs_nanogpt": rows[NANOGPT].times if clone else None,
        },
        "model": asdict(trainer.model.config),
        "parts_milliseconds": parts,
        "pytorch": peer(PYTORCH) if PYTORCH in rows else None,
        "huggingface": peer(best),
        "nanogpt": peer(NANOGPT) if clone else None,
    }


def _without_kernels(trainer: Trainer) -> Trainer:
    """Return a second trainer like it, in the same precision, on PyTorch's layers."""
    plain = {"kernels": "off", "attention": "auto", "compile": "off"}
    train_config = trainer.train_config.replace(precision=trainer.precision.name, **plain)
    return synthetic_trainer(trainer.model.config, train_config)


def _hugging_face_steps(trainer: Trainer) -> dict[str, Callable[[], None]]:
    """Return a step of Hugging Face's GPT-2, by name, in fp32 and in the trainer's precision."""
    fp32 = PrecisionChoice("fp32", "the precision of the weights")
    precisions = {choice.name: choice for choice in (fp32, trainer.precision)}.values()
    try:
        twins = [contenders.HuggingFace(trainer, choice) for choice in precisions]
    except ImportError:
        twins = []
    return {twin.name: twin.step for twin in twins}


def seconds_to_loss(loss: float, texts: Sequence[str], **configs: Any) -> dict[str, Any]:
    """Train with the whole budget, and return when the validation loss first reached `loss`.

    It is the loss over the whole validation part, in nats per character. `configs` are those of
    `chargpt.train.train`. ``seconds`` are those of training, with compilation and without
    evaluations; they and ``step`` are None if the budget ended first.
    """
    # Log the time of every step; write no samples.
    configs["train_config"] = configs["train_config"].replace(log_interval=1, sample_length=0)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        summary = train(texts, **configs, out=out).summary
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


def table(figures: dict[str, Any]) -> str:
    """Return the figures of `bench` as lines for a person."""
    machine, own = figures["machine"], figures["train"]
    memory = own["peak_memory_bytes"]
    rows = [
        ("precision", f"{machine['precision']} ({machine['precision_reason']})"),
        *figures["choices"].items(),
        *(
            (f"ceiling {dtype}", f"{rate:,.0f} GFLOP/s in matrix products")
            for dtype, rate in figures["ceilings_gflops"].items()
        ),
        (
            "training",
            f"{human_count(own['parameters'])} parameters, {own['characters_per_step']:,} "
            f"characters/step; {own['ceiling_share']:.0%} of the {machine['precision']} ceiling",
        ),
        ("a step", ", ".join(f"{k} {v:.2f} ms" for k, v in figures["parts_milliseconds"].items())),
        ("memory", f"{human_count(memory)}B at peak" if memory else "not reported by this system"),
    ]
    if figures["loss"] is not None:
        rows.append((f"loss {figures['loss']['target']:g}", _reached(figures["loss"])))
    lines = contenders.heading(machine, rows)
    lines.append(f"{'':<34}{'characters/s':>13}{'slowest':>11}{'fastest':>11}{'ms/step':>10}")
    lines.append(_speed(OWN, own, ""))
    for key in ("pytorch", "huggingface", "nanogpt"):
        peer = figures[key]
        if peer and peer["name"]:
            times = f"  chargpt is {own[f'vs_{key}']:.2f}× as fast"
            lines.append(_speed(peer["name"], peer, times))
        elif peer:
            lines.append(f"{'Hugging Face GPT-2':<34}{peer['note']}")
    return "\n".join(lines)


def _reached(loss: dict[str, Any]) -> str:
    if loss["seconds"] is None:
        best = "none" if loss["best"] is None else f"{loss['best']:.4f}"
        return f"not reached in {loss['train_seconds']:.1f} s of training; the best was {best}"
    return f"after {loss['seconds']:.1f} s of training (step {loss['step']:,})"


def _speed(name: str, speed: dict[str, Any], times: str) -> str:
    numbers = [speed[f"characters_per_second{end}"] for end in ("", "_min", "_max")]
    line = f"{name:<34}{numbers[0]:>13,.0f}{numbers[1]:>11,.0f}{numbers[2]:>11,.0f}"
    return f"{line}{speed['milliseconds_per_step']:>10.2f}{times}"
