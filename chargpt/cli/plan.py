"""``chargpt plan``: what training will cost, before it starts."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Literal

from chargpt.cli import flags, shared
from chargpt.cli.shared import flag
from chargpt.compute.cost import GPU_SHARE, GPUS, Cluster

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
    file, given = shared.given_settings(command)
    chosen = command.preset or file.pop("preset", None) or flags.AUTO
    data_config, settings = flags.split_settings(file, given)
    shared.check_positive(
        per_machine=command.per_machine, link=command.link, network=command.network
    )

    from chargpt.data.corpus import load_corpus
    from chargpt.measure.forecast import assumed_rates, forecast, table
    from chargpt.training.probe import choose_for

    texts = command.texts or ("tiny-shakespeare",)
    corpus = load_corpus(texts, data_config, quiet=False, report=shared.print_progress)
    if chosen == flags.AUTO:
        rates = assumed_rates(command.gpu, command.gpu_share) if command.gpu else None
        choice = choose_for(corpus, settings, rates=rates, report=shared.print_progress)
        model_config, train_config = choice.model_config, choice.train_config
        for line in choice.reasons:
            shared.print_progress(f"auto       {line}")
    else:
        configs = flags.merge_settings(flags.preset_configs(chosen), file, given)
        model_config, train_config = configs["model_config"], configs["train_config"]
    cluster = Cluster(
        per_machine=command.per_machine, link=1e9 * command.link, network=1e9 * command.network
    )
    figures = forecast(
        corpus,
        model_config,
        train_config,
        gpu=command.gpu,
        gpu_share=command.gpu_share,
        cluster=cluster,
    )
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
