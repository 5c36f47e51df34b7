"""Is `auto` as good as the best of a sweep over sizes and dropouts, and as each preset?

Run it from anywhere: ``python benchmarks/sizes.py my.txt other.txt --minutes 1 3 --out FOLDER``.
All runs have the same minutes of training, one after another; OMP_NUM_THREADS says on how many
threads. The sweep takes the choice's neighbours in width, and dropouts around its own; each run is
an ordinary one in ``FOLDER/TEXT-MINUTES-NAME``, and the same command resumes after an interruption.
The table has the lowest validation loss of each.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chargpt.cli.flags import preset_configs
from chargpt.runs.folder import read_config
from chargpt.train import train
from chargpt.training.size import LAYERS
from chargpt.training.summary import SUMMARY

PRESETS = ("tiny", "speedrun", "best")
DROPOUT_STEP = 0.1


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", nargs="+", help="as for chargpt train; each is a text of its own")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0], help="(1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--no-sweep", action="store_true", help="only auto and the presets")
    given = parser.parse_args(arguments)
    print(f"threads: {os.environ.get('OMP_NUM_THREADS', 'all')}")
    print("| text | minutes | auto | loss | " + " | ".join(PRESETS) + " | best of sweep | loss |")
    print("|---|---|---|---|" + "---|" * (len(PRESETS) + 2))
    for text in given.texts:
        for minutes in given.minutes:
            print(row(text, minutes, given.out, sweep=not given.no_sweep), flush=True)


def row(text: str, minutes: float, out: Path, *, sweep: bool) -> str:
    """Train what is missing for a text and some minutes, and return a line of the table."""

    def loss(name: str, **configs: Any) -> float:
        run = out / f"{Path(text).stem}-{minutes:g}-{name}"
        if not (run / SUMMARY).exists():
            train(text, **configs, out=run, resume="auto", quiet=True)
        value: float = json.loads((run / SUMMARY).read_text("utf-8"))["val_loss"]
        return value

    auto = loss("auto", settings={"minutes": minutes})
    chosen = read_config(out / f"{Path(text).stem}-{minutes:g}-auto").model_config
    presets = []
    for name in PRESETS:
        configs = preset_configs(name)
        configs["train_config"] = configs["train_config"].replace(minutes=minutes)
        presets.append(loss(name, **configs))
    others = {
        name: loss(name, settings={"minutes": minutes, **settings})
        for name, settings in (neighbours(chosen.d_model, chosen.dropout) if sweep else ())
    }
    name, lowest = min({"auto": auto, **others}.items(), key=lambda item: item[1])
    shape = f"{chosen.n_layer} × {chosen.d_model}, dropout {chosen.dropout:g}"
    cells = [text, f"{minutes:g}", shape, f"{auto:.4f}", *(f"{x:.4f}" for x in presets)]
    return "| " + " | ".join([*cells, name if sweep else "", f"{lowest:.4f}"]) + " |"


def neighbours(d_model: int, dropout: float) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield a name and the settings of each run of the sweep, but the choice itself."""
    widths = list(LAYERS)
    at = widths.index(d_model)
    for width in widths[max(0, at - 1) : at + 2]:
        for p in sorted({max(0.0, dropout - DROPOUT_STEP), dropout, dropout + DROPOUT_STEP}):
            if (width, p) != (d_model, dropout):
                yield f"{width}-{p:g}", {"d_model": width, "dropout": round(p, 2)}


if __name__ == "__main__":
    main()
