"""What is known about a run, for people: a model card or a page shows it beside the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from chargpt.base.errors import UserError
from chargpt.base.files import read_json
from chargpt.base.terminal import visible
from chargpt.compute.counts import parameters_of
from chargpt.config import CheckpointName, SampleConfig
from chargpt.data.tokenizer import CharTokenizer
from chargpt.generate import complete
from chargpt.measure.baselines import Baseline, baselines
from chargpt.measure.novelty import Novelty, novelty_of_run
from chargpt.measure.scorecard import training_corpus
from chargpt.model import GPT2
from chargpt.runs.folder import RunConfig, read_config
from chargpt.runs.report import Sample, read_metrics, read_samples
from chargpt.training.summary import SUMMARY

MOST_CHARACTERS = 20_000_000  # with a longer text, the measurements take minutes
_MOST_POINTS = 300  # of each loss curve
_MOST_SAMPLES = 100
_NOVELTY_CHARACTERS = 20_000

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a loss curve."""

    step: int
    loss: float  # nats per character


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What a run was asked for, how it went, and how good its model is."""

    name: str
    """Of the run folder."""
    checkpoint: CheckpointName
    val_loss: float | None
    """Of the checkpoint, in nats per character; None if not known."""
    n_params: int
    texts: tuple[str, ...]
    """File names, without folders and escaped; () if the model was imported."""
    n_characters: int
    n_documents: int
    validation_fraction: float
    tokens_per_step: int
    summary: dict[str, Any]
    """``summary.json``; {}: the run has not ended, or was imported."""
    training: tuple[Point, ...]
    """Loss of training steps, at most a few hundred."""
    validation: tuple[Point, ...]
    samples: tuple[Sample, ...]
    """Texts that the model wrote during training."""
    baselines: tuple[Baseline, ...]
    """Bits per character of simple methods on the validation part; () if not known."""
    novelty: Novelty | None
    """How much the model's text repeats of its training text; None if not known."""
    note: str
    """Why baselines or novelty are not known, for anybody to read; empty if they are."""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON values; a number that is not finite becomes None."""
        values = asdict(self)
        values["samples"] = [sample._asdict() for sample in self.samples]
        values["baselines"] = [baseline._asdict() for baseline in self.baselines]
        if self.novelty is not None:
            values["novelty"]["verdict"] = self.novelty.verdict
        # Python writes NaN and Infinity, which JSON does not have.
        result: dict[str, Any] = json.loads(json.dumps(values), parse_constant=lambda _: None)
        return result


def gather_facts(
    run: Path,
    model: GPT2,
    tokenizer: CharTokenizer,
    *,
    which: CheckpointName = "best",
    report: Callable[[str], None] = lambda line: None,
    measure: bool = True,
) -> Facts:
    """Read the files of a run, and measure its model beside simple methods.

    The measurements need the training text, which is read again if it has at most
    `MOST_CHARACTERS` characters and is still where it was; they take some seconds. Without
    `measure`, ``note`` says why they are missing.

    Raises:
        UserError: not a run folder.
    """
    config, summary = read_config(run), _summary(run)
    rows: tuple[Baseline, ...] = ()
    novelty, note = None, _not_measured(config)
    if not note and not measure:
        note = "it takes a while" if summary else "the training has not ended"
    elif not note:
        try:
            corpus = training_corpus(config, report)
            report("measuring simple methods, and how much the model copies")
            rows = tuple(baselines(corpus.train, corpus.validation, corpus.tokenizer))
            novelty = _novelty(run, model, tokenizer)
        except UserError as error:  # it names folders of this computer, which stay here
            report(f"some figures are missing: {error}")
            note = "the training text or a program was missing when it was exported"
    samples = read_samples(run)
    val_loss = summary.get("val_loss" if which == "best" else "final_val_loss")
    batch = config.train_config.batch_size * config.train_config.gradient_accumulation_steps
    return Facts(
        name=run.resolve().name,
        checkpoint=which,
        val_loss=val_loss if isinstance(val_loss, float) else None,
        n_params=parameters_of(model.config),
        texts=tuple(visible(Path(source).name) for source in config.sources),
        n_characters=config.text.n_characters,
        n_documents=config.text.n_documents,
        validation_fraction=config.data_config.validation_fraction,
        tokens_per_step=batch * model.config.block_size,
        summary=summary,
        training=_curve(run, "train", "loss"),
        validation=_curve(run, "validation", "val_loss"),
        samples=tuple(_thinned(samples, _MOST_SAMPLES)),
        baselines=rows,
        novelty=novelty,
        note=note,
    )


def _not_measured(config: RunConfig) -> str:
    """Return why a run's model is not measured; empty: it is."""
    if not config.sources:
        return "the model was made by another program"
    if config.text.n_characters > MOST_CHARACTERS:
        return f"the training text has more than {MOST_CHARACTERS:,} characters"
    return ""


def _novelty(run: Path, model: GPT2, tokenizer: CharTokenizer) -> Novelty:
    """Return how much the model copies, by texts that it writes at the default temperature."""
    n = 40 if tokenizer.end_of_text_id is None else 400  # documents are often short
    config = SampleConfig(num_samples=n, max_new_tokens=_NOVELTY_CHARACTERS // 40)
    samples = [completion.text for completion in complete(model, tokenizer, [""], config)]
    return novelty_of_run(run, samples=samples, held_out_characters=_NOVELTY_CHARACTERS)


def _summary(run: Path) -> dict[str, Any]:
    """Return the numbers and strings of ``summary.json``."""
    if not (run / SUMMARY).is_file():
        return {}
    values = read_json(run / SUMMARY)
    return {name: v for name, v in values.items() if v is None or isinstance(v, int | float | str)}


def _curve(run: Path, split: str, loss: str) -> tuple[Point, ...]:
    points = [
        Point(step=row["step"], loss=float(row[loss]))
        for row in read_metrics(run)
        if row["split"] == split and row[loss] is not None and math.isfinite(row[loss])
    ]
    return tuple(_thinned(points, _MOST_POINTS))


def _thinned(items: list[T], most: int) -> list[T]:
    """Return at most `most` items, evenly from all, with the first and the last."""
    if len(items) <= most:
        return items
    last = len(items) - 1
    return [items[round(i * last / (most - 1))] for i in range(most)]
