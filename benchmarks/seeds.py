"""Train a preset with several seeds, one after another, and report time, loss and spread.

Run it from anywhere: ``python benchmarks/seeds.py --preset speedrun --out FOLDER``. Each seed is
an ordinary run in ``FOLDER/seed-N``; the table goes to stdout, all numbers to
``FOLDER/results.json``. The same command resumes after an interruption.

Seconds are seconds of training, with compilation and without evaluations. The losses over the
whole validation part are those of the run. The train loss is the mean of its last 100 steps, with
dropout. The loss by nanoGPT's protocol is that of the best checkpoint, like nanoGPT's published
one. The held-out loss is that of the last checkpoint. All are in the run's training precision.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from protocols import half_losses, learning_curve, nanogpt_loss, standard_error

import chargpt
from chargpt.base import files as durable
from chargpt.base.checks import check_names
from chargpt.base.errors import UserError
from chargpt.cli.flags import CONFIG_CLASSES, merge_settings, preset_configs, saved_configs
from chargpt.compute.device import PrecisionChoice, choose_device, cpu_name
from chargpt.config import PRESETS
from chargpt.data.corpus import load_corpus
from chargpt.runs import folder as run_folder
from chargpt.runs.report import read_metrics
from chargpt.train import SUMMARY, train

RESULTS = "results.json"
TRAIN_LOSS_STEPS = 100
COLUMNS = {  # result: heading, format
    "seed": ("seed", ""),
    "seconds_to_target": ("s to {target:g}", ".1f"),
    "eval_seconds": ("s of evaluations", ".1f"),
    "final_val_loss": ("final loss", ".4f"),
    "best_val_loss": ("best loss", ".4f"),
    "train_loss": ("train loss", ".4f"),
    "characters": ("characters", ",.0f"),
    "characters_per_second": ("characters/s", ",.0f"),
    "nanogpt_loss": ("nanoGPT's protocol", ".4f"),
    "held_out_loss": ("held-out loss", ".4f"),
}
Row = dict[str, Any]
"""Results of a seed by name; None for a missing one."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the missing runs, write the results, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="speedrun", help=f"of {', '.join(PRESETS)} (speedrun)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (5)")
    parser.add_argument("--first-seed", type=int, default=1337, help="the others follow (1337)")
    parser.add_argument("--target", type=float, default=1.4697, help="loss to reach (1.4697)")
    parser.add_argument("--text", nargs="+", default=["tiny-shakespeare"], help="to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs and results")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="key=value",
        help="settings over the preset's, such as minutes=1",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error("--seeds: give at least 1")
    try:
        run_seeds(given)
    except UserError as error:
        parser.error(str(error))


def run_seeds(given: argparse.Namespace) -> None:
    """Train and score each seed in turn, and update the results after each.

    Raises:
        UserError: a wrong setting, or a folder with a run of other settings.
        SystemExit: a run was interrupted.
    """
    changes = parse_settings(given.set)
    configs = merge_settings(preset_configs(given.preset), {}, changes)
    validation = load_corpus(given.text, configs["data_config"]).validation
    rows: list[Row] = []
    for seed in range(given.first_seed, given.first_seed + given.seeds):
        run = given.out / f"seed-{seed}"
        # Log the time of every step; write no samples.
        training = configs["train_config"].replace(seed=seed, log_interval=1, sample_length=0)
        train_seed(run, given.text, configs | {"train_config": training})
        rows.append(score_run(run, validation, given.target) | {"seed": seed})
        results = {
            "preset": given.preset,
            "set": changes,
            "text": given.text,
            "target": given.target,
            "machine": _machine(run),
            "seeds": rows,
            **summed_up(rows),
        }
        durable.write_json(given.out / RESULTS, results)
        best, seconds = rows[-1]["best_val_loss"], rows[-1]["train_seconds"]
        print(f"seed {seed}: best {best:.4f}, {seconds:.1f} s of training", file=sys.stderr)
    print(table(results))


def parse_settings(given: Sequence[str]) -> dict[str, Any]:
    """Return settings by name; a value is read as in TOML, and else is a text.

    Raises:
        UserError: no ``=``, an unknown name, or one that this script sets.
    """
    settings: dict[str, Any] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: give key=value")
        if name in ("seed", "log_interval", "sample_length"):
            raise UserError(f"--set {pair}: this script sets {name}; for seeds give --first-seed")
        try:
            settings[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[name] = value
    check_names(settings, [field.name for cls in CONFIG_CLASSES.values() for field in fields(cls)])
    return settings


# --- a seed


def train_seed(run: Path, texts: Sequence[str], configs: Mapping[str, Any]) -> None:
    """Train a run, or the rest of it.

    Raises:
        UserError: the folder holds a run of other settings.
        SystemExit: it was interrupted.
    """
    if _is_finished(run):
        old, sources = saved_configs(run)
        shape = configs["model_config"].replace(vocab_size=old["model_config"].vocab_size)
        if old != {**configs, "model_config": shape} or sources != tuple(texts):
            raise UserError(f"{run} was trained with other settings: give another --out")
        return
    result = train(texts, **configs, out=run, resume="auto", quiet=True)
    if result.summary.stop_reason in ("interrupted", "terminated"):
        raise SystemExit(f"{result.summary.stop_reason} in {run}: the same command resumes it")


def _is_finished(run: Path) -> bool:
    """Return whether a run finished; an interrupted one has a summary, too."""
    if not (run / SUMMARY).exists():
        return False
    return _summary(run)["stop_reason"] in ("budget", "patience")


def _summary(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    return summary


def score_run(run: Path, validation: Any, target: float) -> Row:
    """Return the results of a finished run.

    Args:
        run: the folder.
        validation: token ids, (n,).
        target: loss over the whole validation part.
    """
    summary = _summary(run)
    device = choose_device(saved_configs(run)[0]["train_config"].device).device
    autocast = PrecisionChoice(summary["precision"], "as trained").autocast(device)
    best = run_folder.load(run, which="best", device=device).model
    last = run_folder.load(run, which="last", device=device).model
    estimate = nanogpt_loss(best, validation, best.config.block_size, autocast=autocast)
    halves = half_losses(last, validation, last.config.block_size, autocast=autocast)
    curve = learning_curve(run)
    steps = [row["loss"] for row in read_metrics(run) if row["split"] == "train"]
    losses = [loss for loss in steps[-TRAIN_LOSS_STEPS:] if loss is not None]
    return {
        "seconds_to_target": next((e.seconds for e in curve if e.val_loss <= target), None),
        "train_seconds": summary["train_seconds"],
        "eval_seconds": summary["eval_seconds"],
        "steps": summary["steps"],
        "final_val_loss": summary["final_val_loss"],
        "best_val_loss": summary["val_loss"],
        "train_loss": statistics.mean(losses),
        "characters": summary["tokens"],
        "characters_per_second": summary["tokens_per_second"],
        "nanogpt_loss": estimate.loss,
        "nanogpt_standard_error": estimate.standard_error,
        "first_half_loss": halves.first,
        "held_out_loss": halves.last,
    }


# --- all seeds


def summed_up(rows: Sequence[Row]) -> dict[str, Row]:
    """Return ``mean`` and ``standard_error`` of each result over the seeds.

    None stands for a result that some seed lacks, and for the error of a single seed.
    """
    values = {name: [row[name] for row in rows] for name in rows[0] if name != "seed"}
    whole = {name: None not in column for name, column in values.items()}
    return {
        "mean": {n: statistics.mean(column) if whole[n] else None for n, column in values.items()},
        "standard_error": {
            n: standard_error(column) if whole[n] and len(rows) > 1 else None
            for n, column in values.items()
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """Return the results as a markdown table."""
    heads = [head.format(target=results["target"]) for head, _ in COLUMNS.values()]
    lines = [heads, ["---:"] * len(heads), *map(_cells, results["seeds"])]
    mean = _cells(results["mean"] | {"seed": "mean"})
    if results["mean"]["seconds_to_target"] is None:
        mean[list(COLUMNS).index("seconds_to_target")] = "not reached by all"
    # The rows over all seeds leave out its standard error over windows.
    lines += [mean, _cells(results["standard_error"] | {"seed": "standard error"})]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> list[str]:
    cells = {
        name: "–" if row[name] is None else format(row[name], form)
        for name, (_, form) in COLUMNS.items()
    }
    if isinstance(row["seed"], int):
        cells["nanogpt_loss"] += f" ± {row['nanogpt_standard_error']:.4f}"
    return list(cells.values())


def _machine(run: Path) -> dict[str, Any]:
    environment: dict[str, Any] = run_folder.read_config(run).environment
    return environment | {"cpu": cpu_name(), "chargpt": chargpt.__version__}


if __name__ == "__main__":
    main()
