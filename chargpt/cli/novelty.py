"""``chargpt novelty``: how much of what a model writes is copied from its training text."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from chargpt.base.checks import from_dict
from chargpt.cli import flags
from chargpt.cli.shared import RunFolder, arg
from chargpt.config import CheckpointName, Device, SampleConfig

SHOWN = SampleConfig(num_samples=100, max_new_tokens=1000, echo=False)
UNUSED = ("stop", "logit_bias", "echo", "prompt", "unknown")


def make_flags(_: str) -> type:
    """Return the flags of ``novelty`` as a dataclass."""
    samples_help = "What the model wrote, a file of `chargpt sample`; without it the model writes."
    encoding_help = "Of the samples. (utf-8)"
    settings = flags.optional_flags(SampleConfig, asdict(SHOWN), without=UNUSED)
    command = make_dataclass(
        "Novelty",
        [
            ("run", RunFolder),
            ("sampling", settings, field(default_factory=dict)),
            ("samples", Annotated[Path | None, arg(samples_help, "FILE")], None),
            ("encoding", Annotated[str, arg(encoding_help, "NAME")], "utf-8"),
            ("which", Annotated[CheckpointName, tyro.conf.arg(help="Which checkpoint.")], "best"),
            ("device", Annotated[Device, tyro.conf.arg(help="Where to compute.")], "auto"),
            ("json", Annotated[bool, arg("Print one JSON object instead of a table.")], False),
        ],
        frozen=True,
    )
    command.__doc__ = (
        "Tell how much of a model's text is copied from its training text, beside how much of real "
        "text that it has not seen is."
    )
    return command


def run(command: Any) -> int:
    """Print a table or JSON, and return the exit code."""
    config = from_dict(SampleConfig, {**asdict(SHOWN), **command.sampling})

    from chargpt.measure.novelty import novelty_of_run, novelty_table

    samples = () if command.samples is not None else _written(command, config)
    novelty = novelty_of_run(
        command.run, command.samples, samples=samples, encoding=command.encoding
    )
    if command.json:
        print(json.dumps({**asdict(novelty), "verdict": novelty.verdict}))
    else:
        print(novelty_table(novelty))
    return 0


def _written(command: Any, config: SampleConfig) -> list[str]:
    from chargpt.compute.device import choose_device
    from chargpt.generate import complete
    from chargpt.runs.folder import load

    device = choose_device(command.device).device
    model, tokenizer = load(command.run, which=command.which, device=device)
    n, length = config.num_samples, config.max_new_tokens
    print(f"writing {n:,} texts of at most {length:,} characters", file=sys.stderr)
    return [completion.text for completion in complete(model, tokenizer, [""], config)]
