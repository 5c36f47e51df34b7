"""``chargpt train``: trains a model on text and leaves a run folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any, Literal

from chargpt.base.errors import UserError
from chargpt.cli import flags, shared
from chargpt.cli.sample import print_samples
from chargpt.cli.shared import flag, is_first_process
from chargpt.config import SampleConfig


def make_flags(shown_preset: str) -> type:
    """Return the flags of ``train`` as a dataclass; help shows the values of a preset."""
    from_help = (
        "Start from the best model of another run, with its shape. The vocabulary grows with the "
        "text; dropout may differ."
    )
    out_help = "The run folder (a new one below runs/)."
    resume_help = (
        "Resume the run in --out. --resume auto starts a run if the folder has none, so that the "
        "same command can be repeated."
    )
    return shared.flags_class(
        "Train a model on text and leave a run folder. Settings come from a preset; a file "
        "(--config) wins over it, a flag over both.",
        [
            flag("texts", shared.Texts, (), shared.TEXTS_HELP, "[TEXT ...]"),
            *shared.settings_flags(shown_preset),
            flag("start_from", Path | None, None, from_help, "RUN", name="from"),
            flag("out", Path | None, None, out_help, "FOLDER"),
            flag("resume", Literal["no", "yes", "auto"], "no", resume_help, "[auto]"),
        ],
    )


def run(command: Any) -> int:
    """Train, print the verdict and a sample, and return the exit code."""
    file, given = shared.given_settings(command)
    chosen = command.preset or file.pop("preset", None)
    chosen = None if chosen == flags.AUTO else chosen
    start, texts = _start(command, chosen)
    if start:
        configs = flags.merge_settings(start, file, given)
    else:
        data_config, settings = flags.split_settings(file, given)
        configs = {"data_config": data_config, "settings": settings}

    from chargpt.train import train

    resume: Any = {"no": False, "yes": True, "auto": "auto"}[command.resume]
    result = train(texts, **configs, out=command.out, resume=resume, start_from=command.start_from)
    codes = {"interrupted": shared.EXIT_INTERRUPTED, "terminated": shared.EXIT_TERMINATED}
    code = codes.get(result.summary.stop_reason, 0)
    if not is_first_process():
        return code
    print(result.summary.verdict)
    folder = shlex.quote(str(result.run))
    if code:
        shared.print_progress(f"saved in {folder}; resume with --out {folder} --resume")
        return code
    print()
    print_samples(result.model, result.tokenizer, SampleConfig(), "auto", sys.stdout)
    shared.print_progress(f"more: chargpt sample {folder} --prompt '…'")
    return 0


def _start(command: Any, chosen: str | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the configurations to start from, a preset's or a saved run's, and the texts.

    There are none if neither is given: they are chosen once the text is known.
    """
    if command.resume != "no" and command.out is None:
        raise UserError("--resume needs to know which run: give --out FOLDER")
    if command.resume == "no" or not (command.out / "config.json").is_file():
        configs = flags.preset_configs(chosen) if chosen else {}
        if configs and command.start_from and is_first_process():  # others get rank 0's settings
            shape = flags.saved_configs(command.start_from)[0]["model_config"]
            configs |= {"model_config": shape}
        return configs, command.texts or ("tiny-shakespeare",)
    # The command that started the run may resume it; train() later refuses what differs, by name.
    configs, sources = flags.saved_configs(command.out)
    return flags.preset_configs(chosen) if chosen else configs, command.texts or sources
