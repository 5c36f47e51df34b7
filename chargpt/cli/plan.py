"""``chargpt plan``: what training will cost, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from chargpt.cli import flags, shared
from chargpt.cli.shared import flag
from chargpt.compute.cost import GPU_SHARE, GPUS, Cluster
from chargpt.config import GPT2Config, TrainConfig

if TYPE_CHECKING:
    from chargpt.data.corpus import Corpus

ASSUMPTIONS = (
    "devices that share a step: a ring all-reduce of the gradients over links of {link:.0f} GB/s "
    "in a machine of {per_machine} and {network:.1f} GB/s between machines, {latency:.0f} µs a "
    "message; all but the last 25 MB travel during the backward pass (docs/scaling.md)"
)


def make_flags(shown_preset: str) -> type:
    """Return the flags of ``plan`` as a dataclass; help shows the values of a preset."""
    names, cluster = tuple(GPUS), Cluster()
    link, network = cluster.link / 1e9, cluster.network / 1e9
    gpu_help = "Plan for a GPU that is not at hand, by its name. (this machine, measured)"
    share_help = f"Share of the GPU's speed to assume. ({GPU_SHARE})"
    machine_help = f"Devices in a machine. ({cluster.per_machine})"
    link_help = f"Gigabytes a second between two devices of a machine. ({link:g})"
    network_help = f"Gigabytes a second between two machines. ({network:g})"
    return shared.flags_class(
        "Print what training will cost: parameters, memory, characters per second, time; and how "
        "it grows with devices, from a formula. Settings are those of train.",
        [
            flag("texts", shared.Texts, (), shared.TEXTS_HELP, "[TEXT ...]"),
            *shared.settings_flags(shown_preset),
            flag("gpu", Literal[names] | None, None, gpu_help, "|".join(names)),
            flag("gpu_share", float, GPU_SHARE, share_help),
            flag("per_machine", int, cluster.per_machine, machine_help),
            flag("link", float, link, link_help),
            flag("network", float, network, network_help),
            shared.JSON_FLAG,
        ],
    )


def run(command: Any) -> int:
    """Measure, print a table or JSON, and return the exit code."""
    shared.check_positive(
        per_machine=command.per_machine, link=command.link, network=command.network
    )
    cluster = Cluster(
        per_machine=command.per_machine, link=1e9 * command.link, network=1e9 * command.network
    )

    from chargpt.measure.forecast import forecast, table

    gpu, share = command.gpu, command.gpu_share
    figures = forecast(*_subject(command), gpu=gpu, gpu_share=share, cluster=cluster)
    if command.json:
        values = asdict(figures)
        values["memory"]["total"] = figures.memory.total
        values["devices"] = [shared_step._asdict() for shared_step in figures.devices]
        print(json.dumps(values))
        return 0
    print(table(figures))
    print(
        ASSUMPTIONS.format(
            link=command.link,
            network=command.network,
            per_machine=command.per_machine,
            latency=1e6 * cluster.latency,
        )
    )
    return 0


def _subject(command: Any) -> tuple[Corpus, GPT2Config, TrainConfig]:
    """Return the text and the configurations to plan for."""
    from chargpt.data.corpus import load_corpus
    from chargpt.measure.forecast import assumed_rates
    from chargpt.training.probe import choose_for

    file, given = shared.given_settings(command)
    preset = command.preset or file.pop("preset", None) or flags.AUTO
    data_config, settings = flags.split_settings(file, given)
    texts = command.texts or ("tiny-shakespeare",)
    corpus = load_corpus(texts, data_config, quiet=False, report=shared.print_progress)
    if preset != flags.AUTO:
        configs = flags.merge_settings(flags.preset_configs(preset), file, given)
        return corpus, configs["model_config"], configs["train_config"]
    rates = assumed_rates(command.gpu, command.gpu_share) if command.gpu else None
    choice = choose_for(corpus, settings, rates=rates, report=shared.print_progress)
    for line in choice.reasons:
        shared.print_progress(f"auto       {line}")
    return corpus, choice.model_config, choice.train_config
