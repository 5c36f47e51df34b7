"""Loss against seconds of training: chargpt, nanoGPT and Hugging Face's GPT-2 on one machine.

Run it from anywhere: ``python benchmarks/curves.py --nanogpt CLONE --seconds 180 --out FOLDER``.
They train on Tiny Shakespeare, one after another, each for at most about that time, not counting
evaluations. ``FOLDER/curves.json`` holds the points, ``FOLDER/curves.png`` the picture
(``--redraw`` draws it again from the points).

- chargpt's presets keep their own budget; the time is a limit beside it.
- nanoGPT with its README's recipe for a CPU: context 64, batch 12, 2,000 iterations.
- nanoGPT and Hugging Face's GPT-2 with the shape of the preset tiny: context 128, batch 32, peak
  learning rate 1e-3, which decays over the whole time.

The last three train without dropout, as that recipe does for a small model. A trial of nanoGPT's
speed sets its number of iterations. Its losses are its own estimates, over random batches with as
many characters as the validation part; the others measure the whole validation part.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from protocols import learning_curve, whole_loss
from torch import Tensor, nn

from chargpt.base import files as durable
from chargpt.base.errors import UserError
from chargpt.base.seeding import own_random_state
from chargpt.cli.flags import preset_configs
from chargpt.compute.device import synchronize
from chargpt.compute.optimizers import schedule
from chargpt.config import PRESETS, DataConfig, GPT2Config, Preset, TrainConfig, tiny
from chargpt.measure.contenders import HuggingFace, NanoGPT, describe_machine, find_clone
from chargpt.train import train
from chargpt.training.plan import make_plan
from chargpt.training.trainer import Trainer

TEXT = "tiny-shakespeare"
CURVES, PICTURE = "curves.json", "curves.png"
N_EVALUATIONS = 20  # of nanoGPT and Hugging Face's GPT-2
TRIAL_SECONDS = 2.0
PEAK = 1e-3  # learning rate of those two: nanoGPT's for this text
README_SHAPE = GPT2Config(block_size=64, n_layer=4, n_head=4, d_model=128, dropout=0.0)
README_BATCH, README_ITERATIONS = 12, 2000
TWIN_BATCH = 32
PUBLISHED = 1.4697


class Point(NamedTuple):
    """A loss, and the seconds of training before it."""

    seconds: float
    val_loss: float


class Curve(NamedTuple):
    """The losses of one contender over time."""

    name: str
    points: list[Point]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train one after another, and update points and picture after each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, help="folder of a clone; left out without it")
    parser.add_argument("--seconds", type=float, default=180.0, help="for each curve (180)")
    parser.add_argument("--presets", nargs="*", default=["speedrun", "tiny"], help="of chargpt")
    parser.add_argument("--out", type=Path, required=True, help="folder of points and picture")
    parser.add_argument("--redraw", action="store_true", help="draw the points that are there")
    given = parser.parse_args(arguments)
    if given.redraw != (given.out / CURVES).exists():
        there = "no curves to draw" if given.redraw else "curves already (--redraw draws them)"
        parser.error(f"{given.out} holds {there}: give another --out")
    if given.redraw:
        draw(given.out)
        return
    try:
        presets = {name: as_preset(name) for name in given.presets}
        clone = None
        if given.nanogpt is not None:
            clone = find_clone([f"nanogpt={given.nanogpt}"])
        measure(presets, clone, given.seconds, given.out)
    except UserError as error:
        parser.error(str(error))


def as_preset(name: str) -> Preset:
    """Return a preset.

    Raises:
        UserError: there is no such preset.
    """
    preset_configs(name)  # checks the name
    return PRESETS[name]()


def measure(presets: dict[str, Preset], clone: Path | None, seconds: float, out: Path) -> None:
    """Write the curve of each contender as soon as it is finished."""
    out.mkdir(parents=True, exist_ok=True)
    curves: list[Curve] = []
    for curve in _contenders(presets, clone, seconds, out):
        curves.append(curve)
        report = {
            "machine": describe_machine(torch.device("cpu")),
            "seconds": seconds,
            "curves": [c._asdict() for c in curves],
        }
        durable.write_json(out / CURVES, report)
        draw(out)
        end = f"{curve.points[-1].val_loss:.4f} after {curve.points[-1].seconds:.1f} s"
        print(f"{curve.name}: {end}", file=sys.stderr)


def _contenders(
    presets: dict[str, Preset], clone: Path | None, seconds: float, out: Path
) -> Iterator[Curve]:
    for name, chosen in presets.items():
        yield own_curve(name, chosen, seconds, out / f"chargpt-{name}")
    training = TrainConfig(batch_size=TWIN_BATCH, learning_rate=PEAK, minutes=seconds / 60)
    shape = tiny().model_config.replace(dropout=0.0)
    if clone is not None:
        recipe = text_trainer(README_SHAPE, training.replace(batch_size=README_BATCH))
        name = "nanoGPT, its README's CPU recipe"
        yield nanogpt_curve(name, clone, recipe, seconds, README_ITERATIONS)
        yield nanogpt_curve("nanoGPT, shape of tiny", clone, text_trainer(shape, training), seconds)
    with own_random_state():
        try:
            twin = TimedHuggingFace(text_trainer(shape, training))
        except ImportError:
            print("Hugging Face's GPT-2 is left out: pip install transformers", file=sys.stderr)
            return
        yield Curve(f"{twin.name}, shape of tiny", twin.curve(seconds))


def text_trainer(model: GPT2Config, training: TrainConfig, text: str = TEXT) -> Trainer:
    """Return a trainer as `chargpt train` makes it."""
    nowhere = Path(tempfile.gettempdir(), "chargpt-curves")  # nothing is written
    with own_random_state():
        return make_plan(
            [text],
            model_config=model,
            train_config=training,
            data_config=DataConfig(),
            out=nowhere,
            resuming=False,
        ).trainer


# --- chargpt


def own_curve(name: str, chosen: Preset, seconds: float, run: Path) -> Curve:
    """Train a preset into a run folder.

    Raises:
        SystemExit: it was interrupted.
    """
    training = within(chosen, seconds).replace(log_interval=1, sample_length=0)
    summary = train(
        TEXT, model_config=chosen.model_config, train_config=training, out=run, quiet=True
    ).summary
    if summary.stop_reason in ("interrupted", "terminated"):
        raise SystemExit(f"{summary.stop_reason} in {run}")
    points = [Point(e.seconds, e.val_loss) for e in learning_curve(run)]
    return Curve(f"chargpt, preset {name}", points)


def within(chosen: Preset, seconds: float) -> TrainConfig:
    """Return how a preset trains, limited to `seconds`."""
    training, minutes = chosen.train_config, seconds / 60
    if training.minutes is not None:
        minutes = min(minutes, training.minutes)
    return training.replace(steps=training.steps, epochs=training.epochs, minutes=minutes)


# --- nanoGPT

_EVALUATION = re.compile(r"^step (\d+): train loss \S+, val loss (\S+)$", re.MULTILINE)
_ITERATION = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.MULTILINE)


def parse_nanogpt(output: str) -> list[Point]:
    """Return the learning curve that nanoGPT printed with ``log_interval=1``.

    The time of an iteration with an evaluation includes the evaluation, so that the median of the
    other iterations replaces it.
    """
    losses = {int(step): float(loss) for step, loss in _EVALUATION.findall(output)}
    seconds = {int(number): float(ms) / 1000 for number, ms in _ITERATION.findall(output)}
    typical = statistics.median(s for number, s in seconds.items() if number not in losses)
    own = {number: typical if number in losses else s for number, s in seconds.items()}
    return [
        Point(sum(s for number, s in own.items() if number < step), loss)
        for step, loss in losses.items()
    ]


def nanogpt_curve(
    name: str, clone: Path, trainer: Trainer, seconds: float, limit: int | None = None
) -> Curve:
    """Train a copy of a clone with the shape, batch and text of a trainer.

    Args:
        name: name of the curve.
        clone: the clone, to which nothing is written.
        trainer: gives shape, batch and text.
        seconds: approximate end of the schedule.
        limit: at most this many iterations.
    """
    nanogpt = NanoGPT(clone, trainer, step_seconds=0.05)
    iterations = int(seconds / nanogpt.step_seconds(min(seconds, TRIAL_SECONDS)))
    iterations = max(2, iterations if limit is None else min(iterations, limit))
    interval = max(2, iterations // N_EVALUATIONS)
    iterations -= iterations % interval  # so that the last one is evaluated
    characters = trainer.train_config.batch_size * trainer.windows.block_size
    output, _ = nanogpt.train(
        iterations,
        learning_rate=PEAK,
        warmup_iters=min(100, iterations // 2),
        lr_decay_iters=iterations,
        eval_interval=interval,
        eval_iters=math.ceil(len(trainer.validation) / characters),
    )
    return Curve(name, parse_nanogpt(output))


# --- Hugging Face


class TimedHuggingFace(HuggingFace):
    """Hugging Face's GPT-2 in the precision that chargpt picks, on chargpt's schedule.

    Args:
        trainer: gives shape, batches, text, learning rate and schedule.

    Raises:
        ImportError: the package transformers is not installed.
    """

    def __init__(self, trainer: Trainer) -> None:
        torch.manual_seed(trainer.train_config.seed)
        super().__init__(trainer, trainer.precision)

    def curve(self, seconds: float) -> list[Point]:
        """Train for `seconds`, not counting evaluations."""
        trainer, spent = self.trainer, 0.0
        points: list[Point] = []
        while spent < seconds:
            share = schedule(max(spent / seconds, 1e-3), trainer.train_config)
            start = time.perf_counter()
            for group in self.optimizer.param_groups:
                group["lr"] = trainer.train_config.learning_rate * share
            self.step()
            synchronize(trainer.device)
            spent += time.perf_counter() - start
            if spent >= min(1.0, (len(points) + 1) / N_EVALUATIONS) * seconds:
                points.append(Point(spent, self._val_loss()))
        return points

    def _val_loss(self) -> float:
        trainer = self.trainer
        autocast = self.precision.autocast(trainer.device)
        T = trainer.windows.block_size
        return whole_loss(_Logits(self.model), trainer.validation, T, autocast=autocast)


class _Logits(nn.Module):
    """A Hugging Face model that maps ids (B, T) to logits (B, T, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids).logits
        return logits


# --- the picture

STYLES = {"chargpt": "-", "nanoGPT": "--", "Hugging": ":"}  # by first word of the name
COLORS = ("#0072B2", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def draw(folder: Path) -> Path:
    """Draw ``curves.json`` of a folder into its ``curves.png``, at twice the size to be shown.

    Returns:
        The picture's path.
    """
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    report = json.loads((folder / CURVES).read_text(encoding="utf-8"))
    figure = Figure(figsize=(9, 5.6), dpi=120)
    figure.set_layout_engine("none")  # whatever the user's matplotlib settings say
    axes = figure.add_axes((0.08, 0.12, 0.89, 0.85))
    for curve, color in zip(report["curves"], COLORS, strict=False):
        points = [(seconds, loss) for seconds, loss in curve["points"] if seconds > 0]
        style = STYLES[curve["name"].split()[0].rstrip(",")]
        label = f"{curve['name']}: {min(loss for _, loss in points):.3f}"
        axes.plot(*zip(*points, strict=True), style, color=color, linewidth=2.2, label=label)
    axes.set_xscale("log")
    axes.set_ylim(1.3, 3.5)  # the legend is above the curves
    axes.set_yticks([1.5, 2.0, 2.5, 3.0, 3.5])
    left, right = axes.get_xlim()
    axes.axhline(PUBLISHED, color="0.35", linestyle=(0, (6, 4)), linewidth=1.2)
    axes.text(
        0.01, PUBLISHED - 0.012, f"nanoGPT, 10.65 M parameters, published: {PUBLISHED}",
        transform=axes.get_yaxis_transform(), va="top", fontsize=12, color="0.35",
    )  # fmt: skip
    ticks = [tick for tick in TICKS if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("seconds of training, without evaluations", fontsize=14)
    axes.set_ylabel("validation loss, nats per character", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="lowest loss", title_fontsize=12, fontsize=12, loc="upper right")
    figure.savefig(folder / PICTURE)
    return folder / PICTURE


if __name__ == "__main__":
    main()
