"""``chargpt novelty``: how much of a model's text is copied from its training text."""

from __future__ import annotations

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from chargpt.base.checks import from_dict
from chargpt.base.errors import UserError
from chargpt.cli import flags, shared
from chargpt.cli.shared import flag
from chargpt.config import SampleConfig

SHOWN = SampleConfig(num_samples=100, max_new_tokens=1000, echo=False)
UNUSED = ("stop", "logit_bias", "echo", "prompt", "unknown")


def make_flags(_: str) -> type:
    """Return the flags of ``novelty`` as a dataclass."""
    samples_help = "A file that `chargpt sample` wrote; without it the model writes now."
    settings = flags.optional_flags(SampleConfig, asdict(SHOWN), without=UNUSED)
    return shared.flags_class(
        "Print how much of a model's text is copied from its training text, and the same for real "
        "text that the model has not seen.",
        [
            shared.RUN,
            ("sampling", settings, field(default_factory=dict)),
            flag("samples", Path | None, None, samples_help, "FILE"),
            flag("encoding", str, "utf-8", "Encoding of the samples. (utf-8)", "NAME"),
            *shared.MODEL_FLAGS,
            shared.JSON_FLAG,
        ],
    )


def run(command: Any) -> int:
    """Print a table or JSON, and return the exit code."""
    config = from_dict(SampleConfig, {**asdict(SHOWN), **command.sampling})

    from chargpt.measure.novelty import novelty_of_run, novelty_table

    samples = () if command.samples is not None else _write_samples(command, config)
    novelty = novelty_of_run(
        command.run,
        command.samples,
        samples=samples,
        encoding=command.encoding,
        report=shared.print_progress,
    )
    if command.json:
        print(json.dumps({**asdict(novelty), "verdict": novelty.verdict}))
    else:
        print(novelty_table(novelty))
    return 0


def _write_samples(command: Any, config: SampleConfig) -> list[str]:
    from chargpt.generate import complete
    from chargpt.measure.novelty import NEEDS_TEXT
    from chargpt.runs.folder import read_config, text_sources

    try:
        text_sources(read_config(command.run))  # before the model writes for seconds
    except UserError as error:
        raise UserError(f"{error}: {NEEDS_TEXT}") from error
    model, tokenizer = shared.load_model(command)
    n, length = config.num_samples, config.max_new_tokens
    shared.print_progress(f"writing {n:,} texts of at most {length:,} characters")
    return [completion.text for completion in complete(model, tokenizer, [""], config)]
