"""Reports of a run: a progress line on stderr, metrics.jsonl, samples.txt, perhaps a tracker.

A terminal gets a moving line. Elsewhere a plain line is printed about every ten seconds.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from chargpt.base.errors import UserError
from chargpt.base.files import write_text
from chargpt.base.progress import progress
from chargpt.base.terminal import visible
from chargpt.base.units import bits_per_char, human_count, human_time
from chargpt.config import Tracker

METRICS, SAMPLES = "metrics.jsonl", "samples.txt"
PLAIN_INTERVAL_SECONDS = 10.0
_HEADER = re.compile(
    r"^--- step (?P<step>\d{1,15}), validation loss (?P<loss>\d{1,9}\.\d{4})\n", re.MULTILINE
)  # of a sample
RATE_STEPS = 20  # the speed is the mean over the last ones


class TrackerClient(Protocol):
    """A service that also receives the metrics."""

    def log(self, values: dict[str, float], step: int) -> None:
        """Send named values of a step."""

    def close(self) -> None:
        """Send the rest."""


class _Terminal(Console):
    """The console of stderr; when its reader is gone, the run continues silently."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # rich would end the program

    def print(self, *objects: Any, **options: Any) -> None:
        try:
            super().print(*objects, **options)
        except OSError:
            self.quiet = True


class SilentReporter:
    """Reports nothing: rank 0 speaks for the other processes of a run."""

    def note(self, text: str) -> None:
        """Print nothing."""

    def step(self, values: dict[str, Any], *, progress: float, log: bool) -> None:
        """Print and write nothing."""

    @contextmanager
    def evaluating(self, n_tokens: int) -> Iterator[Callable[[int], None]]:
        """Yield a function to call with the number of tokens that were just scored."""
        yield lambda n: None

    def evaluation(
        self, *, step: int, val_loss: float, is_best: bool, part: int | None = None
    ) -> None:
        """Print and write nothing."""

    def sample(self, *, step: int, val_loss: float) -> None:
        """Write no sample."""


class Reporter(SilentReporter):
    """Prints the progress of training and, within ``with``, writes it to the run folder.

    Args:
        out: the run folder, which exists.
        quiet: write only to the run folder.
        track: a service that also receives the metrics.
        unit: what a token is.
        write_sample: returns a sample of the current model; None: no samples.
        resumed_step: later steps are removed from metrics.jsonl and samples.txt.
        evaluated_step: the last evaluation in the checkpoint; later ones are removed.
    """

    def __init__(
        self,
        out: Path,
        *,
        quiet: bool = False,
        track: Tracker = "none",
        write_sample: Callable[[], str] | None = None,
        unit: str = "char",
        resumed_step: int = 0,
        evaluated_step: int | None = None,
    ) -> None:
        self.out = out
        self.console: Console = _Terminal(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._write_sample = write_sample
        self._unit = unit
        self._track = track
        self._known = resumed_step, evaluated_step or 0
        self._metrics: TextIO | None = None
        self._tracker: TrackerClient | None = None
        self._bar: Progress | None = None
        self._marks: list[tuple[float, float, float]] = []  # (train seconds, tokens, progress)
        self._last_line = -PLAIN_INTERVAL_SECONDS
        self._val_loss: float | None = None

    def __enter__(self) -> Reporter:
        """Open the files; a UserError if the tracker is not installed."""
        self._tracker = make_tracker(self._track, self.out)
        _remove_after(self.out, *self._known)
        self._metrics = (self.out / METRICS).open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the progress line and close the files."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._metrics is not None:
            self._metrics.close()
        if self._tracker is not None:
            self._tracker.close()

    def note(self, text: str) -> None:
        """Print a line above the progress line."""
        console = self._bar.console if self._bar else self.console
        console.print(visible(text), markup=False, emoji=False)

    def step(self, values: dict[str, Any], *, progress: float, log: bool) -> None:
        """Print a step; with `log`, also write it to metrics.jsonl.

        `values` are step, loss, tokens, train_seconds and more, by name; `progress` is the share
        of the budget spent, 0 to 1.
        """
        self._marks.append((values["train_seconds"], values["tokens"], progress))
        del self._marks[:-RATE_STEPS]
        line, rate = self._progress_line(values, progress)
        if log:
            self._record(values | {"tokens_per_second": rate and round(rate)}, "train")
        if self.console.is_terminal and not self.console.quiet:
            self._show(line, progress)
        elif time.monotonic() - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"{progress:4.0%}  {line}", markup=False, emoji=False)

    @contextmanager
    def evaluating(self, n_tokens: int) -> Iterator[Callable[[int], None]]:
        """Yield a function that shows progress, if it takes long."""
        quiet = self.console.quiet or self._bar is not None
        with progress("evaluating", n_tokens, unit="tokens", quiet=quiet) as advance:
            yield self._advance_evaluation(n_tokens) if self._bar else advance

    def _advance_evaluation(self, n_tokens: int) -> Callable[[int], None]:
        """Return a function that shows the share of an evaluation beside the moving line."""
        assert self._bar is not None
        bar, task, done = self._bar, self._bar.task_ids[0], 0
        line = bar.tasks[0].description

        def advance(n: int) -> None:
            nonlocal done
            done += n
            bar.update(task, description=f"{line}  evaluating {done / n_tokens:.0%}")

        return advance

    def evaluation(
        self, *, step: int, val_loss: float, is_best: bool, part: int | None = None
    ) -> None:
        """Print and write a validation loss; `part` is the number of tokens if not all of them."""
        self._val_loss = val_loss
        on = {} if part is None else {"val_tokens": part}
        self._record({"step": step, "val_loss": val_loss, **on}, "validation")
        best = "  (best so far)" if is_best else ""
        spread = "" if part is None else f" on {part:,} tokens"
        self.note(
            f"step {step:,}: validation loss{spread} {val_loss:.4f} = "
            f"{bits_per_char(val_loss):.3f} bits/{self._unit}{best}"
        )

    def sample(self, *, step: int, val_loss: float) -> None:
        """Print and write a sample, unless samples are off."""
        if self._write_sample is not None:
            sample = self._write_sample()
            with (self.out / SAMPLES).open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"--- step {step}, validation loss {val_loss:.4f}\n{sample}\n")
            self.note("    " + visible(sample).strip().replace("\n", "\n    "))

    def _progress_line(self, values: dict[str, Any], progress: float) -> tuple[str, float | None]:
        seconds, tokens, before = self._marks[0]
        passed = values["train_seconds"] - seconds
        rate = (values["tokens"] - tokens) / passed if passed > 0 else None
        parts = [f"step {values['step']:,}"]
        if values["loss"] is not None:
            parts.append(f"loss {values['loss']:.3f}")
        if self._val_loss is not None:
            parts.append(f"val {self._val_loss:.3f}")
        if rate is not None:
            parts.append(f"{human_count(rate)} tokens/s")
        if passed > 0 and progress > before:
            left = max(0.0, 1 - progress) * passed / (progress - before)
            parts.append(f"{human_time(left)} left")
        return "  ".join(parts), rate

    def _show(self, line: str, progress: float) -> None:
        if self._bar is None:
            text = TextColumn("{task.percentage:3.0f}%  {task.description}")
            self._bar = Progress(BarColumn(20), text, console=self.console, transient=True)
            self._bar.add_task("", total=1.0)
            self._bar.start()
        task = self._bar.task_ids[0]
        self._bar.update(task, description=line, completed=min(progress, 1.0))

    def _record(self, values: dict[str, Any], split: str) -> None:
        assert self._metrics is not None, "within `with`"
        self._metrics.write(json.dumps({"split": split} | values) + "\n")
        self._metrics.flush()
        if self._tracker is not None:
            given = {k: v for k, v in values.items() if k != "step" and v is not None}
            numbers = {f"{split}/{name}": value for name, value in given.items()}
            try:
                self._tracker.log(numbers, values["step"])
            except Exception as error:  # a failing service must not end the run
                self.note(f"track      {self._track} failed, continuing without it: {error!r:.200}")
                self._tracker = None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl up to a damaged one: a crash may cut the last one short."""
    if not (run / METRICS).is_file():
        return []
    with (run / METRICS).open(encoding="utf-8", errors="replace") as file:
        return list(takewhile(bool, map(_parse_row, file)))


class Sample(NamedTuple):
    """A text that the model wrote during training."""

    step: int
    val_loss: float
    text: str


def read_samples(run: Path) -> list[Sample]:
    """Return the samples of samples.txt, in order of their steps; a damaged file has fewer."""
    if not (run / SAMPLES).is_file():
        return []
    text = (run / SAMPLES).read_text(encoding="utf-8", errors="replace")
    headers: list[re.Match[str]] = []
    for header in _HEADER.finditer(text):  # a sample may contain such a line: steps must increase
        if not headers or int(header["step"]) > int(headers[-1]["step"]):
            headers.append(header)
    ends = [header.start() - 1 for header in headers[1:]] + [len(text.removesuffix("\n"))]
    return [
        Sample(int(header["step"]), float(header["loss"]), text[header.end() : end])
        for header, end in zip(headers, ends, strict=True)
    ]


def _parse_row(line: str) -> dict[str, Any]:
    """Return a line of metrics.jsonl as an object; {}: it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return {}
    kind = {"train": "loss", "validation": "val_loss"}.get(str(row.get("split")), "")
    return row if kind in row and isinstance(row[kind], int | float | None) else {}


def _remove_after(out: Path, step: int, evaluated_step: int) -> None:
    """Remove later steps and evaluations than those that the run resumes from."""
    known = {"train": step, "validation": evaluated_step}
    rows = [row for row in read_metrics(out) if row["step"] <= known[row["split"]]]
    write_text(out / METRICS, "".join(json.dumps(row) + "\n" for row in rows))
    if (out / SAMPLES).is_file():
        text = (out / SAMPLES).read_text(encoding="utf-8", errors="replace")
        headers = _HEADER.finditer(text)
        end = next((h.start() for h in headers if int(h["step"]) > step), len(text))
        write_text(out / SAMPLES, text[:end])


def make_tracker(track: Tracker, out: Path) -> TrackerClient | None:
    """Return a client for the tracker; a UserError if its package is missing or fails to start."""
    if track == "none":
        return None
    try:
        return _TensorBoard(out) if track == "tensorboard" else _WandB(out)
    except ImportError as error:
        raise UserError(
            f"track is {track!r}, which is not installed: pip install 'chargpt[{track}]'"
        ) from error
    except Exception as error:  # no account, no network: each package has its own errors
        raise UserError(
            f"track is {track!r}, which does not start ({error!r:.200}): fix it, or omit --track"
        ) from error


class _TensorBoard:
    """Event files in the run folder's ``tensorboard/``."""

    def __init__(self, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A Weights & Biases run with the name of the run folder."""

    def __init__(self, out: Path) -> None:
        import wandb

        self._run: Any = wandb.init(project="chargpt", name=out.name, dir=str(out))

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
