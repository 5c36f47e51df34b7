"""How fast does this machine train? Real steps of two small models on a random text."""

from __future__ import annotations

import random
import statistics
import string
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chargpt.compute.counts import training_flops_per_token
from chargpt.compute.device import synchronize
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import Corpus
from chargpt.training.ngram_targets import context_gain
from chargpt.training.plan import Plan, make_plan
from chargpt.training.size import (
    PROBE_WIDTHS,
    Choice,
    Rates,
    TextSize,
    choose,
    depends_on_speed,
    of_class,
)
from chargpt.training.trainer import Trainer

N_CHARACTERS = 200_000
SYMBOLS = string.ascii_letters + string.digits + ".,\n"  # 65, as many as Shakespeare's
ENDLESS = 1_000_000_000  # a budget in steps that no measurement reaches


def synthetic_plan(
    model_config: GPT2Config,
    train_config: TrainConfig,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Return a plan, as `chargpt train` makes it, for a random text of ``vocab_size`` symbols.

    0: 65 of them.
    """
    rng = random.Random(train_config.seed)
    # Each symbol once, so that the vocabulary has the size that the shape asks for.
    symbols, size = SYMBOLS, model_config.vocab_size
    if size not in (0, len(SYMBOLS)):
        symbols = "".join(map(chr, range(0x4E00, 0x4E00 + size)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "random.txt")
        text = symbols + "".join(rng.choices(symbols, k=N_CHARACTERS))
        path.write_text(text, encoding="utf-8", newline="")
        return make_plan(
            [str(path)],
            model_config=model_config,
            train_config=train_config.replace(steps=ENDLESS),
            data_config=DataConfig(),
            out=Path(folder, "run"),
            resuming=False,
            report=report,
        )


PROBE_SHAPE = GPT2Config(n_layer=2, n_head=4, dropout=0.0, bias=False)
PROBE_S = 0.5  # for each width
LEAST_STEPS = 3  # at least


def choose_for(
    corpus: Corpus,
    settings: Mapping[str, Any],
    *,
    devices: int = 1,
    rates: Rates | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Choice:
    """Return what suits a text, by default on this machine as it is now.

    See `chargpt.training.size.choose`; `rates` are those of another machine.
    """
    text = text_size(corpus)
    if rates is None and depends_on_speed(settings):
        choose(text, Rates(1e9, 1e9), settings, devices=devices)  # so that a mistake shows at once
        report("measuring  how fast this machine trains")
        rates = measure_rates(TrainConfig(**of_class(TrainConfig, settings)))
    return choose(text, rates, settings, devices=devices)


def text_size(corpus: Corpus) -> TextSize:
    """Return what of a text decides."""
    vocab_size = corpus.tokenizer.vocab_size
    gain = round(context_gain(corpus.train, vocab_size), 1)
    return TextSize(len(corpus.train), vocab_size, gain)


def measure_rates(train_config: TrainConfig) -> Rates:
    """Return how fast this machine trains, in a second or two.

    `train_config` names device, precision, kernels and attention; nothing is compiled, which would
    take longer than it tells.
    """
    small = train_config.replace(
        batch_size=16, gradient_accumulation_steps=1, optimizer="muon", compile="off",
        parallel="none",
    )  # fmt: skip
    return Rates(*(_rate(PROBE_SHAPE.replace(d_model=width), small) for width in PROBE_WIDTHS))


def _rate(model_config: GPT2Config, train_config: TrainConfig) -> float:
    trainer = synthetic_plan(model_config, train_config).trainer
    trainer.model.train()
    _seconds_of_step(trainer)  # which warms up
    times: list[float] = []
    end = time.perf_counter() + PROBE_S
    while len(times) < LEAST_STEPS or time.perf_counter() < end:
        times.append(_seconds_of_step(trainer))
    operations = training_flops_per_token(trainer.model.config) * trainer.tokens_per_step
    return float(f"{operations / statistics.median(times):.1e}")


def _seconds_of_step(trainer: Trainer) -> float:
    start = time.perf_counter()
    trainer.loss(trainer.batch(0), 0).backward()  # type: ignore[no-untyped-call]
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    synchronize(trainer.device)
    return time.perf_counter() - start
