"""Counters for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from chargpt.serve.models import Served

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """All counters of one server, in a registry of its own."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "chargpt_requests",
            "Answers, by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self.prompt_characters = Counter(
            "chargpt_prompt_characters", "Characters of prompts.", ["model"], registry=self.registry
        )
        self.characters = Counter(
            "chargpt_characters",
            "Characters written and answered.",
            ["model"],
            registry=self.registry,
        )
        self.first = Histogram(
            "chargpt_first_character_seconds",
            "From the request to its first character.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "chargpt_request_seconds",
            "From the request to its last character.",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_Queues(served))


class _Queues(Collector):
    """What the workers do now."""

    def __init__(self, served: Mapping[str, Served]) -> None:
        self._served = served

    def collect(self) -> list[GaugeMetricFamily]:
        running = GaugeMetricFamily(
            "chargpt_texts_running", "Texts being written.", labels=["model"]
        )
        waiting = GaugeMetricFamily(
            "chargpt_texts_waiting", "Texts in the queue.", labels=["model"]
        )
        for name, served in [*self._served.items()]:
            running.add_metric([name], served.worker.n_running)
            waiting.add_metric([name], served.worker.n_waiting)
        return [running, waiting]
