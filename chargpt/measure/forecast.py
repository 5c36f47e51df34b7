"""``chargpt plan``: memory, speed and time of a training run, before it starts.

A short measurement on this machine gives the speed: real steps of models with one and a few layers
of the wanted width, on one and a few sequences. A step takes

    fixed + layers × per layer + sequences × (per sequence + layers × per layer and sequence)

so four such models give the four constants, and the formula gives the step of the whole model. A
model whose steps are short is timed itself. For a GPU that is not at hand, the time is the number
of operations over a share of its speed.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from chargpt.base.errors import UserError
from chargpt.base.units import human_count, human_time
from chargpt.compute.cost import (
    GPU_SHARE,
    GPUS,
    Cluster,
    Gpu,
    Memory,
    Shared,
    memory_of,
    shared_step,
)
from chargpt.compute.counts import parameters_of, training_flops_per_token
from chargpt.compute.device import describe_device
from chargpt.config import GPT2Config, TrainConfig
from chargpt.data.corpus import Corpus
from chargpt.measure.timing import own_step, peak_memory_bytes, seconds_of
from chargpt.training.ngram_targets import MOST_TOKENS
from chargpt.training.plan import Plan
from chargpt.training.probe import synthetic_plan
from chargpt.training.size import Rates

PROBE_LAYERS = (1, 3)
PROBE_STEP_S = 0.5  # of the largest probe
LONG_STEP_S = 2.0  # a shorter one is timed itself
PROBE_S = 0.3  # for each of the four probes
WORLDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class StepTime(NamedTuple):
    """The four constants of a step's time, in seconds."""

    fixed: float
    layer: float
    sequence: float
    both: float

    def of(self, n_layer: int, sequences: int) -> float:
        """Return the seconds of a step."""
        per_sequence = self.sequence + n_layer * self.both
        return self.fixed + n_layer * self.layer + sequences * per_sequence


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run will cost."""

    device: str
    how: str  # where the speed comes from
    units: str  # what tokens are: "characters" or "bytes"
    precision: str
    n_params: int
    operations_per_token: int
    memory: Memory
    program_bytes: int  # what the program itself takes, before the model
    tokens_per_step: int
    seconds_per_step: float
    tokens_per_second: float
    train_tokens: int  # in the text's training part
    steps: int
    seconds: float
    epochs: float
    devices: tuple[Shared, ...]  # one to 1,024
    bytes_per_device: tuple[int, ...]  # without the program
    most_bytes: float | None  # of the GPU; None: not known


def forecast(
    corpus: Corpus,
    model_config: GPT2Config,
    train_config: TrainConfig,
    *,
    gpu: str | None = None,
    gpu_share: float = GPU_SHARE,
    cluster: Cluster | None = None,
) -> Forecast:
    """Return what training costs, on this machine or on a GPU of `compute.cost.GPUS`.

    Raises:
        UserError: an unknown GPU, a share outside 0 … 1, or settings that cannot work here.
    """
    config = model_config.replace(vocab_size=corpus.tokenizer.vocab_size)
    sequences = train_config.batch_size * train_config.gradient_accumulation_steps
    tokens_per_step = sequences * config.block_size
    if gpu is None:
        speed = measure_speed(config, train_config)
    else:
        speed = assume_speed(config, gpu, gpu_share)
    step = speed.seconds_of(sequences)
    steps, seconds = _budget(train_config, corpus, tokens_per_step, step)
    n_params = parameters_of(config)
    counted = min(len(corpus.train), MOST_TOKENS) if train_config.has_ngram else 0
    memory = [_memory(config, train_config, speed, world, counted) for world in WORLDS]
    return Forecast(
        device=speed.device,
        how=speed.how,
        units=corpus.tokenizer.units,
        precision=speed.precision,
        n_params=n_params,
        operations_per_token=training_flops_per_token(config),
        memory=memory[0],
        program_bytes=speed.program_bytes,
        most_bytes=speed.most_bytes,
        tokens_per_step=tokens_per_step,
        seconds_per_step=step,
        tokens_per_second=tokens_per_step / step,
        train_tokens=len(corpus.train),
        steps=steps,
        seconds=seconds,
        epochs=steps * tokens_per_step / len(corpus.train),
        devices=tuple(
            shared_step(
                speed.seconds_of,
                n_params,
                train_config.batch_size,
                world,
                cluster or Cluster(),
                accumulation=train_config.gradient_accumulation_steps,
            )
            for world in WORLDS
        ),
        bytes_per_device=tuple(each.total for each in memory),
    )


def _memory(
    config: GPT2Config, train_config: TrainConfig, speed: Speed, world: int, counted: int
) -> Memory:
    return memory_of(
        config,
        train_config,
        precision=speed.precision,
        kernels=speed.kernels,
        pairs=speed.pairs,
        world=world,
        counted=counted,
    )


# --- speed


class Speed(NamedTuple):
    """How a device trains a model."""

    device: str
    how: str  # where the figures come from
    precision: str
    kernels: bool
    pairs: bool  # whether attention keeps its (T, T) weights
    program_bytes: int
    most_bytes: float | None  # of memory; None: not known
    fixed: float  # seconds of a step, whatever it trains
    sequence: float  # seconds of each sequence

    def seconds_of(self, sequences: int) -> float:
        """Return the seconds of a step."""
        return self.fixed + sequences * self.sequence


def assume_speed(config: GPT2Config, name: str, share: float) -> Speed:
    """Return the speed of a GPU that is not at hand, without a fixed part of a step.

    Raises:
        UserError: an unknown GPU, or a share outside 0 … 1.
    """
    gpu = _gpu(name, share)
    operations = training_flops_per_token(config) * config.block_size
    how = f"assumed: {share:.0%} of {gpu.flops / 1e12:,.0f} TFLOP/s"
    seconds = operations / (share * gpu.flops)
    facts = (gpu.precision, False, False, 0, gpu.memory)
    return Speed(name.upper(), how, *facts, fixed=0.0, sequence=seconds)


def assumed_rates(name: str, share: float) -> Rates:
    """Return how fast a GPU that is not at hand trains; errors as for `assume_speed`."""
    speed = share * _gpu(name, share).flops
    return Rates(speed, speed)


def _gpu(name: str, share: float) -> Gpu:
    if name not in GPUS:
        raise UserError(f"the GPU {name!r} is not known: give one of {', '.join(GPUS)}")
    if not 0 < share <= 1:
        raise UserError(f"gpu_share is {share}: give --gpu-share above 0, at most 1")
    return GPUS[name]


def measure_speed(config: GPT2Config, train_config: TrainConfig) -> Speed:
    """Return the speed of this machine."""
    plan = probe_plan(config, train_config)
    trainer = plan.trainer
    _seconds(plan, 0.0)
    on_cpu = trainer.device.type == "cpu"
    program = peak_memory_bytes(trainer.device) if on_cpu else 0
    times, n_layer, batch = fit_step(config, train_config), config.n_layer, train_config.batch_size
    guess = times.of(n_layer, batch)
    how, factor = "from steps of smaller models, measured now", 1.0
    if guess <= LONG_STEP_S:
        whole = probe_plan(config, train_config, n_layer=n_layer, sequences=batch)
        how, factor = "measured now, on real steps", _seconds(whole, 2 * PROBE_S) / guess
    fixed = max(0.0, times.fixed + n_layer * times.layer)  # noise may make it negative
    return Speed(
        device=describe_device(trainer.device),
        how=how,
        precision=trainer.precision.name,
        kernels=plan.speed.kernels != "off",
        pairs=plan.speed.attention == "matmul",
        program_bytes=program or 0,
        most_bytes=None,
        fixed=factor * fixed,
        sequence=factor * (guess - fixed) / batch,
    )


def probe_plan(config: GPT2Config, train_config: TrainConfig, **shape: Any) -> Plan:
    """Return a plan of such a model with other layers or sequences, for a random text."""
    changes = {"n_layer": 1, "sequences": 1} | shape
    small = train_config.replace(
        batch_size=changes["sequences"], gradient_accumulation_steps=1, parallel="auto"
    )
    return synthetic_plan(config.replace(n_layer=changes["n_layer"]), small)


def fit_step(config: GPT2Config, train_config: TrainConfig) -> StepTime:
    """Return the constants of a step's time, from real steps of four small models."""

    def seconds(n_layer: int, sequences: int) -> float:
        shape = {"n_layer": n_layer, "sequences": sequences}
        return _seconds(probe_plan(config, train_config, **shape), PROBE_S)

    (l1, l2), b1 = PROBE_LAYERS, 1
    one = seconds(l1, b1)
    # Large enough to use the cores as the whole batch does.
    b2 = max(b1 + 1, min(16, round(PROBE_STEP_S / (l2 * one))))
    t = {(l1, b1): one, (l1, b2): seconds(l1, b2), (l2, b1): seconds(l2, b1)}
    t[l2, b2] = seconds(l2, b2)
    both = (t[l2, b2] - t[l1, b2] - t[l2, b1] + t[l1, b1]) / ((l2 - l1) * (b2 - b1))
    layer = (t[l2, b1] - t[l1, b1]) / (l2 - l1) - b1 * both
    sequence = (t[l1, b2] - t[l1, b1]) / (b2 - b1) - l1 * both
    fixed = t[l1, b1] - l1 * layer - b1 * sequence - l1 * b1 * both
    return StepTime(fixed, layer, sequence, both)


def _seconds(plan: Plan, seconds: float) -> float:
    """Return the median time of a step, after two that warm up."""
    step, device = own_step(plan.trainer), plan.trainer.device
    first = min(seconds_of(step, device) for _ in range(2))
    n = max(2, min(100, round(seconds / first)))
    return statistics.median(seconds_of(step, device) for _ in range(n))


def _budget(
    train_config: TrainConfig, corpus: Corpus, tokens_per_step: int, step: float
) -> tuple[int, float]:
    """Return the steps and seconds of a run; evaluations take up to a tenth more."""
    steps: float = train_config.steps or float("inf")
    if train_config.epochs is not None:
        steps = train_config.epochs * len(corpus.train) / tokens_per_step
    if train_config.minutes is not None:
        steps = min(steps, 60 * train_config.minutes / step)
    return max(1, round(steps)), max(1, round(steps)) * step


# --- the table


def table(figures: Forecast) -> str:
    """Return the figures as lines for a person."""
    memory = figures.memory
    parts = ", ".join(f"{name} {human_count(n)}B" for name, n in asdict(memory).items() if n)
    program = figures.program_bytes
    total, units = memory.total + program, figures.units
    libraries = f", program {human_count(program)}B" if program else ""
    rate, step = figures.tokens_per_second, figures.seconds_per_step
    rows = [
        ("device", f"{figures.device}, {figures.precision} ({figures.how})"),
        ("model", f"{figures.n_params:,} parameters"),
        ("memory", f"{human_count(total)}B: {parts}{libraries}{_too_much(figures)}"),
        (
            "operations",
            f"{human_count(figures.operations_per_token)} per {units[:-1]}, "
            f"{human_count(figures.operations_per_token * figures.steps * figures.tokens_per_step)}"
            " in all",
        ),
        ("speed", f"{rate:,.0f} {units}/s, {1000 * step:,.1f} ms a step"),
        (
            "budget",
            f"{figures.steps:,} steps, {figures.steps * figures.tokens_per_step:,} {units}, "
            f"{figures.epochs:.1f} epochs of {figures.train_tokens:,}",
        ),
        ("time", f"{human_time(figures.seconds)} of training, evaluations up to a tenth more"),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows]
    titles = ("devices", "batch", "ms/step", f"{units}/s", "efficiency", "memory")
    lines += ["", "{:>8}{:>8}{:>11}{:>15}{:>12}{:>11}".format(*titles)]
    block = figures.tokens_per_step
    for shared, n_bytes in zip(figures.devices, figures.bytes_per_device, strict=True):
        tokens = block * shared.batch_size / figures.devices[0].batch_size
        lines.append(
            f"{shared.devices:>8,}{shared.batch_size:>8,}{1000 * shared.seconds:>11,.2f}"
            f"{tokens / shared.seconds:>15,.0f}{shared.efficiency:>12.0%}"
            f"{human_count(n_bytes) + 'B':>11}"
        )
    return "\n".join(lines)


def _too_much(figures: Forecast) -> str:
    most = figures.most_bytes
    if most is None or figures.memory.total <= most:
        return ""
    return (
        f"; more than the {human_count(most)}B of this GPU: give a lower --batch-size with more "
        "--gradient-accumulation-steps, or share it among several with --parallel fsdp"
    )
