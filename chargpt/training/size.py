"""The model and the recipe that suit a text, some minutes and a machine: `auto`, the default.

A pure function of its inputs: `choose`. docs/sizing.md has the measurements behind each number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from chargpt.base.errors import UserError
from chargpt.base.units import human_count
from chargpt.compute.counts import parameters_of, training_flops_per_token
from chargpt.config import BUDGETS, GPT2Config, TrainConfig

MINUTES = 3.0
PROBE_WIDTHS = (128, 256)
HEAD_UNIT = 16  # the kernels take widths that are multiples of it
LAYERS = {64: 3, 96: 4, 128: 4, 160: 5, 192: 5, 256: 6, 384: 6, 512: 8, 768: 12}
"""Layers by d_model: the shapes to choose from."""
LONG_CONTEXT_WIDTH, WIDE_HEAD_WIDTH = 160, 256  # from which on contexts are long, heads wide
CONTEXT, LONG_CONTEXT, SHORTEST_CONTEXT = 128, 256, 8
SHORTEST_TEXT = 200
CONTEXTS_IN_TEXT = 100  # at least so many windows
USEFUL_PASSES = 15.4  # Muennighoff et al. 2023, arXiv 2305.16264: R*, what repeats are worth
MOST_PASSES = 60.0  # more add little
BATCH_TOKENS, BATCH_SEEN, BATCH_POWER = 2048, 5.3e6, 0.383  # arXiv 2505.13738
DROPOUT = ((10.0, 0.0), (30.0, 0.06), (90.0, 0.2))  # by passes × √(parameters per character)
NGRAM = ((1e6, 0.5), (4e6, 0.3), (25e6, 0.3), (60e6, 0.0))  # weight by characters seen
NGRAM_START = 0.95
LEAST_BATCH = 2
MOST_PER_TOKEN = 9.0  # parameters in matrices; more learn the text by heart
USUAL_GAIN, GAIN_POWER = 1.7, 1.5  # Tiny Shakespeare's; texts with less need smaller models
SIZE_COST, SIZE_POWER = 0.0961, 0.4  # nats that a million parameters in matrices cost, there
DATA_COST, DATA_POWER = 0.2884, 0.6  # nats that a million characters seen cost
BLOCK_START = 3.5  # nats that the first characters of a block cost more than the others, together
RECIPE: Mapping[str, Any] = {
    "optimizer": "muon",
    "learning_rate": 4e-3,
    "muon_learning_rate": 0.02,
    "learning_rate_floor": 0.0,
    "warmup_fraction": 0.02,
    "cooldown": "linear",
    "cooldown_fraction": 0.6,
    "embedding_decay": 0.3,
}

CHOSEN = (
    *("n_layer", "n_head", "d_model", "block_size", "dropout", "bias", "d_ff"),
    *("embedding_dropout", "attention_dropout", "batch_size", "minutes", "epochs"),
    *("ngram_weight", "ngram_weight_floor", *RECIPE),
)
"""Fields that depend on text, minutes and machine, or are the recipe's."""


class TextSize(NamedTuple):
    """What of a text decides."""

    n_tokens: int  # to train on
    vocab_size: int
    context_gain: float = USUAL_GAIN
    """Nats of a token that the three before it tell; see `context_gain` of `ngram_targets`."""


class Rates(NamedTuple):
    """Floating-point operations a second that training makes at the two `PROBE_WIDTHS`."""

    narrow: float
    wide: float

    def at(self, d_model: int) -> float:
        """Return the operations a second at a width: a power law through the two, then flat."""
        narrow, wide = PROBE_WIDTHS
        slope = min(1.0, max(0.0, math.log(self.wide / self.narrow) / math.log(wide / narrow)))
        rate: float = self.narrow * (min(d_model, 2 * wide) / narrow) ** slope
        return rate


class Choice(NamedTuple):
    """What suits a text, some minutes and a machine, and why."""

    model_config: GPT2Config
    train_config: TrainConfig
    rates: Rates | None
    reasons: tuple[str, ...]


def of_class(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that are fields of a configuration class."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in settings.items() if name in names}


def depends_on_speed(settings: Mapping[str, Any]) -> bool:
    """Return whether the minutes limit a run, so that `choose` needs rates."""
    return bool(settings.get("minutes")) or not (settings.get("steps") or settings.get("epochs"))


def choose(
    text: TextSize, rates: Rates | None, settings: Mapping[str, Any], *, devices: int = 1
) -> Choice:
    """Return what suits a text on a machine; `settings`, by field name, are kept.

    Args:
        text: its size.
        rates: how fast one device trains; None, if it does not matter: see `depends_on_speed`.
        settings: fields of the two configurations; without a budget, the minutes are `MINUTES`.
        devices: that share each batch.

    Raises:
        UserError: settings that cannot work.
    """
    _check(settings)
    if text.n_tokens < SHORTEST_TEXT:
        raise UserError(
            f"the text is too short: {text.n_tokens:,} tokens to train on; give at least "
            f"{SHORTEST_TEXT:,}, or a preset with a lower --block-size"
        )
    if not any(settings.get(name) for name in BUDGETS):
        settings = {**settings, "minutes": MINUTES}
    widths = [settings["d_model"]] if "d_model" in settings else _widths(settings)
    shapes = [_shape(width, text, settings) for width in widths]
    runs = [_run(shape, text, rates, settings, devices) for shape in shapes]
    is_long = bool(settings.get("steps") or settings.get("epochs"))
    run = _best(runs, text, is_long=is_long)
    model, train = _dropout(run, text), _recipe(run, text, settings)
    choice = Choice(
        run.shape.replace(**model | of_class(GPT2Config, settings)),
        TrainConfig(**train | of_class(TrainConfig, settings)),
        rates,
        (),
    )
    return choice._replace(reasons=tuple(_reasons(choice, run.seen, text, settings)))


def _check(settings: Mapping[str, Any]) -> None:
    """Raise a UserError for a wrong value, before it is computed with."""
    heads = settings.get("n_head", 1)  # one that divides any width, or a width that it divides
    GPT2Config(**{"n_head": heads, "d_model": heads, **of_class(GPT2Config, settings)})
    TrainConfig(**of_class(TrainConfig, settings))


def _widths(settings: Mapping[str, Any]) -> list[int]:
    """Return the widths to choose from: with a given number of heads, multiples of it."""
    unit = math.lcm(HEAD_UNIT, settings.get("n_head") or 1)
    return sorted({unit * max(1, round(width / unit)) for width in LAYERS})


def _shape(d_model: int, text: TextSize, settings: Mapping[str, Any]) -> GPT2Config:
    """Return the model of a width, with the settings that are given."""
    nearest = min(LAYERS, key=lambda width: abs(width - d_model))
    head = 64 if d_model >= WIDE_HEAD_WIDTH and d_model % 64 == 0 else 32
    context = LONG_CONTEXT if d_model >= LONG_CONTEXT_WIDTH else CONTEXT
    shape: dict[str, Any] = {
        "d_model": d_model,
        "n_layer": LAYERS[nearest],
        "n_head": max(1, d_model // head) if d_model % head == 0 else 1,
        "block_size": max(SHORTEST_CONTEXT, min(context, text.n_tokens // CONTEXTS_IN_TEXT)),
        "bias": False,
    }
    shape |= of_class(GPT2Config, settings) | {"vocab_size": text.vocab_size}
    return GPT2Config(**shape)


class _Run(NamedTuple):
    shape: GPT2Config
    seen: float  # characters that it trains on
    batch_size: int


def _run(
    shape: GPT2Config,
    text: TextSize,
    rates: Rates | None,
    settings: Mapping[str, Any],
    devices: int,
) -> _Run:
    """Return the run of a shape: how long it is, and the batches that suit its length."""
    limits = [(settings.get("epochs") or MOST_PASSES) * text.n_tokens]  # more passes add little
    if minutes := settings.get("minutes"):
        assert rates is not None
        speed = devices * rates.at(shape.d_model) / training_flops_per_token(shape)
        limits.append(60 * minutes * speed)
    if steps := settings.get("steps"):
        # The batch follows the length of the run, which is steps × batch: this solves both.
        tokens = (BATCH_TOKENS * (steps / BATCH_SEEN) ** BATCH_POWER) ** (1 / (1 - BATCH_POWER))
        batch_size = _batch_size(tokens, shape, settings, devices)
        sequences = batch_size * settings.get("gradient_accumulation_steps", 1)
        limits[0] = steps * sequences * shape.block_size
        return _Run(shape, max(1.0, min(limits)), batch_size)
    seen = max(1.0, min(limits))
    tokens = BATCH_TOKENS * (seen / BATCH_SEEN) ** BATCH_POWER
    return _Run(shape, seen, _batch_size(tokens, shape, settings, devices))


def _best(runs: Sequence[_Run], text: TextSize, *, is_long: bool) -> _Run:
    """Return the run that ends lowest; a larger model comes later among `runs`.

    Of runs of a fixed length (`is_long`), a larger model would always end lower. So the first one
    is taken for which another model of as many operations would be no better.
    """
    fitting = [run for run in runs if _matrices(run.shape) <= MOST_PER_TOKEN * text.n_tokens]
    runs = fitting or runs[:1]
    if is_long:
        balanced = (i for i, run in enumerate(runs) if _is_large_enough(run, text))
        runs = runs[: next(balanced, len(runs)) + 1]
    return min(runs, key=lambda run: sum(_excess(run, text)) + BLOCK_START / run.shape.block_size)


def _excess(run: _Run, text: TextSize) -> tuple[float, float]:
    """Return what too small a model and too little text cost, in nats.

    The form is that of Hoffmann et al. 2022 (arXiv 2203.15556); a text that is seen again counts
    for less and less, as in `USEFUL_PASSES`.
    """
    more = max(0.0, run.seen / text.n_tokens - 1)
    worth = 1 + USEFUL_PASSES * (1 - math.exp(-more / USEFUL_PASSES))
    new = min(run.seen, text.n_tokens) * worth
    cost = SIZE_COST * min(1.0, text.context_gain / USUAL_GAIN) ** GAIN_POWER
    size = cost * (1e6 / _matrices(run.shape)) ** SIZE_POWER
    return size, DATA_COST * (1e6 / new) ** DATA_POWER


def _is_large_enough(run: _Run, text: TextSize) -> bool:
    """Return whether more parameters and fewer characters, as many operations, would cost more."""
    size, data = _excess(run, text)
    return SIZE_POWER * size <= DATA_POWER * data


def _matrices(shape: GPT2Config) -> int:
    return parameters_of(shape) - (shape.vocab_size + shape.block_size) * shape.d_model


def _batch_size(tokens: float, shape: GPT2Config, settings: Mapping[str, Any], devices: int) -> int:
    """Return the sequences of a batch, as given, or for about so many tokens a step."""
    if given := settings.get("batch_size"):
        return int(given)
    wanted = tokens / shape.block_size / settings.get("gradient_accumulation_steps", 1)
    sequences: int = max(LEAST_BATCH, 2 * round(wanted / 2))
    return -(-sequences // devices) * devices


def _dropout(run: _Run, text: TextSize) -> dict[str, float]:
    """Return dropout on the residual branches: more, the more a run can learn by heart."""
    exposure = run.seen / text.n_tokens * math.sqrt(_matrices(run.shape) / text.n_tokens)
    dropout = _line(exposure, DROPOUT, digits=2)
    others = {"embedding_dropout": 0.0, "attention_dropout": 0.0} if dropout else {}
    return {"dropout": dropout, **others}


def _recipe(run: _Run, text: TextSize, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of the training."""
    recipe = {**RECIPE, "batch_size": run.batch_size}
    if {"steps", "epochs"}.isdisjoint(settings) and run.seen >= MOST_PASSES * text.n_tokens:
        recipe["epochs"] = MOST_PASSES
    floor = _line(math.log(run.seen), [(math.log(x), y) for x, y in NGRAM], digits=2)
    wants_ngram = settings.get("ngram_weight") != 0 and settings.get("optimizer") != "adamw"
    if floor and wants_ngram:
        recipe |= {"ngram_weight": NGRAM_START, "ngram_weight_floor": floor}
    return recipe


def _line(x: float, points: Sequence[tuple[float, float]], *, digits: int) -> float:
    """Return y at x on straight lines between points, flat beyond them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x1, y1), (x2, y2) in pairwise(points):
        if x <= x2:
            return round(y1 + (y2 - y1) * (x - x1) / (x2 - x1), digits)
    return points[-1][1]


def _reasons(
    choice: Choice, seen: float, text: TextSize, settings: Mapping[str, Any]
) -> Iterator[str]:
    """Yield a line for each choice."""
    model, train, rates = choice.model_config, choice.train_config, choice.rates
    passes = seen / text.n_tokens
    given = ", ".join(sorted({*settings} - {*BUDGETS}))
    speed = ""
    if rates:
        per_second = rates.at(model.d_model) / training_flops_per_token(model)
        speed = f"about {human_count(per_second)} characters/s with this model: "
    yield f"{speed}{human_count(seen)} characters, {passes:.1f} passes over the text"
    yield (
        f"{human_count(parameters_of(model))} parameters, {model.n_layer} layers of "
        f"{model.d_model}: a larger one would see too little, a smaller one hold too little"
    )
    if text.context_gain < USUAL_GAIN / 2:
        yield (
            f"three tokens tell {text.context_gain:.1f} nats of the next one (in English "
            f"{USUAL_GAIN}): there is less to hold, so the model is smaller"
        )
    yield f"context {model.block_size}, {train.batch_size} sequences a step"
    if model.dropout:
        yield f"dropout {model.dropout}: each character is seen {passes:.0f} times"
    if train.ngram_weight:
        yield (
            f"an n-gram's expectations have {train.ngram_weight:.0%} of the loss at first, then "
            f"{train.ngram_weight_floor:.0%}: the run is short"
        )
    if train.epochs and "epochs" not in settings:
        yield f"ends after {train.epochs:.0f} passes: more would add nothing to this text"
    if given:
        yield f"kept as given: {given}"
