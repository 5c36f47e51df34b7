"""Is `auto` as good as the best of a sweep over sizes and dropouts, and as each preset?

Run it from anywhere: ``python benchmarks/sizes.py my.txt other.txt --minutes 1 3 --out FOLDER``.
All runs of a line have the minutes that are named, at the speed that was measured at the start, or
that ``--rates`` gives: of another machine, for example. They are converted to steps, so that
neither other programs nor an interruption change a run; the same command resumes. The sweep
changes the width that was chosen to its neighbours, then its dropout. Each run is an ordinary one
in ``FOLDER/RATES-TEXT-MINUTES-NAME``. The table has the lowest validation loss of each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from chargpt.base.errors import UserError
from chargpt.base.interrupts import Interruption
from chargpt.cli.flags import preset_configs
from chargpt.compute.counts import training_flops_per_token
from chargpt.config import DataConfig, GPT2Config, TrainConfig
from chargpt.data.corpus import load_corpus
from chargpt.train import train
from chargpt.training.probe import measure_rates, text_size
from chargpt.training.size import LAYERS, Rates, TextSize, choose
from chargpt.training.summary import SUMMARY

PRESETS = ("tiny", "speedrun", "best")
DROPOUT_STEP = 0.1
Configs = tuple[GPT2Config, TrainConfig]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", help="as for chargpt train; each is a text of its own")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0], help="(1)")
    rates_help = "operations a second at widths 128 and 256 (measured)"
    parser.add_argument("--rates", type=float, nargs=2, help=rates_help, metavar="N")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--no-sweep", action="store_true", help="only auto and the presets")
    given = parser.parse_args(arguments)
    if min(given.minutes + (given.rates or [])) <= 0:
        parser.error("--minutes, --rates: give positive numbers")
    try:
        print_table(given)
    except UserError as error:
        parser.error(str(error))


def print_table(given: argparse.Namespace) -> None:
    """Train what is missing and print a line for each text and number of minutes."""
    rates = Rates(*given.rates) if given.rates else measure_rates(TrainConfig())
    print(f"rates: {rates.narrow:g} {rates.wide:g}")
    print("| text | minutes | auto | loss | " + " | ".join(PRESETS) + " | best of sweep | loss |")
    print("|---|---|---|---|" + "---|" * (len(PRESETS) + 2))
    for text in given.texts:
        for minutes in given.minutes:
            print(row(text, minutes, rates, given.out, sweep=not given.no_sweep), flush=True)


def row(text: str, minutes: float, rates: Rates, out: Path, *, sweep: bool) -> str:
    """Train what is missing for a text and some minutes, and return a line of the table."""
    corpus = load_corpus([text], DataConfig(), quiet=True)
    size = text_size(corpus)

    def loss(name: str, configs: Configs) -> float:
        run = out / f"{rates.narrow:.0e}-{Path(text).stem}-{minutes:g}-{name}"
        ended = (run / SUMMARY).exists() and json.loads((run / SUMMARY).read_text("utf-8"))
        if not ended or ended["stop_reason"] in get_args(Interruption):
            model_config, train_config = of_minutes(configs, minutes, rates, size)
            options: Any = {"out": run, "resume": "auto", "quiet": True}
            result = train(text, model_config=model_config, train_config=train_config, **options)
            ended = asdict(result.summary)
        value: float = ended["val_loss"]
        return value

    def chosen(**settings: Any) -> Configs:
        choice = choose(size, rates, {"minutes": minutes, **settings})
        return choice.model_config, choice.train_config

    model_config, _ = chosen()
    auto = loss("auto", chosen())
    presets = []
    for name in PRESETS:
        configs = preset_configs(name)
        presets.append(loss(name, (configs["model_config"], configs["train_config"])))
    others = {}
    for width, p in neighbours(model_config.d_model, model_config.dropout) if sweep else ():
        others[f"{width}-{p:g}"] = loss(f"{width}-{p:g}", chosen(d_model=width, dropout=p))
    name, lowest = min({"auto": auto, **others}.items(), key=lambda item: item[1])
    shape = f"{model_config.n_layer} × {model_config.d_model}, dropout {model_config.dropout:g}"
    cells = [text, f"{minutes:g}", shape, f"{auto:.4f}", *(f"{x:.4f}" for x in presets)]
    return "| " + " | ".join([*cells, name if sweep else "", f"{lowest:.4f}"]) + " |"


def of_minutes(configs: Configs, minutes: float, rates: Rates, text: TextSize) -> Configs:
    """Return configurations with as many steps as fit into some minutes."""
    model_config, train_config = configs
    shape = model_config.replace(vocab_size=text.vocab_size)
    seen = 60 * minutes * rates.at(shape.d_model) / training_flops_per_token(shape)
    if train_config.epochs:
        seen = min(seen, train_config.epochs * text.n_tokens)
    tokens = train_config.batch_size * shape.block_size
    return model_config, train_config.replace(steps=max(1, round(seen / tokens)))


def neighbours(d_model: int, dropout: float) -> Iterator[tuple[int, float]]:
    """Yield width and dropout of each run of the sweep, but the choice itself."""
    widths = list(LAYERS)
    at = widths.index(d_model)
    for width in widths[max(0, at - 1) : at + 2]:
        if width != d_model:
            yield width, dropout
    for p in sorted({max(0.0, round(dropout - DROPOUT_STEP, 2)), round(dropout + DROPOUT_STEP, 2)}):
        if p != dropout:
            yield d_model, p


if __name__ == "__main__":
    main()
