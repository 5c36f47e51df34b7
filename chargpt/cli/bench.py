"""``chargpt bench``: how fast this machine trains or writes text."""

from __future__ import annotations

import json
from typing import Any

import tyro

from chargpt.base.errors import UserError
from chargpt.cli import flags, shared
from chargpt.cli.shared import flag


def make_flags(shown_preset: str) -> type:
    """Return the flags of ``bench`` as a dataclass; help shows the values of a preset."""
    texts_help = f"The text for --loss. {shared.TEXTS_HELP}"
    loss_help = (
        "Also train on TEXT with the whole budget, and report after how many seconds of training "
        "the validation loss reached this value, in nats per character."
    )
    peer_help = "Also measure a local clone, unchanged, in a copy. May be given several times."
    generate_help = "Measure writing instead of training: one text, and 32 at a time."
    peers = tyro.conf.UseAppendAction[tuple[str, ...]]
    return shared.flags_class(
        "Measure this machine: matrix products, training on random text in characters per second, "
        "its share of the speed of the products, its parts, the same model without the kernels, "
        "Hugging Face's GPT-2 of the same shape; or, with --generate, writing. Settings are those "
        "of train.",
        [
            flag("texts", shared.Texts, (), texts_help, "[TEXT ...]"),
            *shared.settings_flags(shown_preset, auto=False),
            flag("rounds", int, 3, "Measurements of each contender. (3)"),
            flag("seconds", float, 5.0, "Duration of one measurement. (5.0)"),
            flag("peer", peers, (), peer_help, "nanogpt=FOLDER"),
            flag("generate", bool, False, generate_help),
            flag("loss", float | None, None, loss_help, "FLOAT"),
            shared.JSON_FLAG,
        ],
    )


def run(command: Any) -> int:
    """Measure, print a table or JSON, and return the exit code."""
    file, given = shared.given_settings(command)
    chosen = command.preset or file.pop("preset", None) or "tiny"
    configs = flags.merge_settings(flags.preset_configs(chosen), file, given)
    if command.texts and command.loss is None:
        raise UserError(f"{command.texts[0]} is read only for --loss: give --loss, too")
    if command.generate and command.loss is not None:
        raise UserError("--generate does not train, so --loss has no use: leave out --loss")

    from chargpt.measure.bench import BenchConfig, bench, table
    from chargpt.measure.bench_writing import bench_generation, generation_table

    config = BenchConfig(
        rounds=command.rounds, seconds=command.seconds, peers=command.peer, loss=command.loss
    )
    if command.generate:
        show = generation_table
        figures = bench_generation(
            model_config=configs["model_config"],
            device=configs["train_config"].device,
            kernels=configs["train_config"].kernels,
            config=config,
            report=shared.print_progress,
        )
    else:
        show = table
        texts = command.texts or ("tiny-shakespeare",)
        figures = bench(texts, **configs, config=config, report=shared.print_progress)
    print(json.dumps(figures) if command.json else show(figures))
    return 0
