"""``chargpt bench``: how fast this machine trains or writes, beside what it could do."""

from __future__ import annotations

import json
import sys
from dataclasses import make_dataclass
from typing import Annotated, Any

import tyro

from chargpt.base.errors import UserError
from chargpt.cli import flags
from chargpt.cli.shared import TEXTS_HELP, Texts, arg, given_settings, origins, settings


def make_flags(shown_preset: str) -> type:
    """Return the flags of ``bench`` as a dataclass; help shows the values of a preset."""
    texts_help = f"What to reach --loss on. {TEXTS_HELP}"
    loss_help = (
        "Train on TEXT, too, with the whole budget, and tell after how many seconds of training "
        "the validation loss was this low, in nats a character."
    )
    peer_help = "Measure a local clone beside it, run as it is in a copy. May be given repeatedly."
    generate_help = "Measure writing instead of training: one text, and 32 at a time."
    peers = tyro.conf.UseAppendAction[tuple[str, ...]]
    command = make_dataclass(
        "Bench",
        [
            ("texts", Annotated[Texts, arg(texts_help, "[TEXT ...]")], ()),
            *origins(shown_preset),
            ("rounds", Annotated[int, arg("Turns that each contender takes. (3)")], 3),
            ("seconds", Annotated[float, arg("Of a turn. (5.0)")], 5.0),
            ("peer", Annotated[peers, arg(peer_help, "nanogpt=FOLDER")], ()),
            ("generate", Annotated[bool, arg(generate_help)], False),
            ("loss", Annotated[float | None, arg(loss_help, "FLOAT")], None),
            ("json", Annotated[bool, arg("Print one JSON object instead of a table.")], False),
            *settings(shown_preset),
        ],
        frozen=True,
    )
    command.__doc__ = (
        "Measure this machine: products of matrices, training in characters a second on random "
        "text, its share of the products' speed, its parts, and Hugging Face's GPT-2 of the same "
        "shape; or, with --generate, writing. Settings are those of train."
    )
    return command


def run(command: Any) -> int:
    """Measure, print a table or JSON, and return the exit code."""
    file, given = given_settings(command)
    chosen = command.preset or file.pop("preset", None) or "tiny"
    configs = flags.resolve(flags.preset(chosen), file, given)
    if command.texts and command.loss is None:
        raise UserError(f"{command.texts[0]} is only read to reach a loss: give --loss, too")

    if command.generate and command.loss is not None:
        raise UserError("--generate measures no training: leave out --loss")

    from chargpt.measure.bench import BenchConfig, bench, table
    from chargpt.measure.bench_writing import bench_generation, generation_table

    model, training = configs["model_config"], configs["train_config"]
    config = BenchConfig(
        rounds=command.rounds, seconds=command.seconds, peers=command.peer, loss=command.loss
    )
    if command.generate:
        report = bench_generation(
            model_config=model,
            device=training.device,
            kernels=training.kernels,
            config=config,
            report=_tell,
        )
        print(json.dumps(report) if command.json else generation_table(report))
        return 0
    report = bench(
        command.texts or ("tiny-shakespeare",),
        model_config=model,
        train_config=training,
        data_config=configs["data_config"],
        config=config,
        report=_tell,
    )
    print(json.dumps(report) if command.json else table(report))
    return 0


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
