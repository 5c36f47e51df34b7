"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from chargpt.base.files import write_bytes
from chargpt.runs.report import read_metrics


def plot_loss(run: Path) -> Path:
    """Draw training and validation loss into the run's ``loss.png``, and return its path."""
    from matplotlib.figure import Figure  # no pyplot: no windows, no global state

    rows = read_metrics(run)
    train = _series(rows, "train", "loss")
    validation = _series(rows, "validation", "val_loss")
    figure = Figure(figsize=(7, 4), dpi=120)
    figure.set_layout_engine("none")  # independent of the user's matplotlib settings
    axes = figure.add_axes((0.1, 0.13, 0.87, 0.79))
    axes.plot(*train, color="0.75", linewidth=1, label="training (with dropout)")
    axes.plot(*validation, color="C0", marker="o", markersize=4, label="validation")
    if validation[0]:
        lowest = min(zip(*validation, strict=True), key=lambda point: point[1])
        place: Any = {"xy": lowest, "xytext": (0, 10), "textcoords": "offset points"}
        axes.annotate(f"{lowest[1]:.4f}", **place, ha="center", color="C0")
    axes.set(xlabel="step", ylabel="loss (nats per character)", title=run.name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    picture, path = io.BytesIO(), run / "loss.png"
    figure.savefig(picture)
    write_bytes(path, picture.getvalue())
    return path


def _series(rows: list[dict[str, Any]], split: str, name: str) -> tuple[list[int], list[float]]:
    rows = [row for row in rows if row["split"] == split and row[name] is not None]
    return [row["step"] for row in rows], [row[name] for row in rows]
