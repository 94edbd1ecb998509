"""Metrics as Prometheus reads them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

disable_created_metrics()  # as every process does: services/runtime/metrics_port.py


class Scraped:
    """One answer to ``GET /metrics``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def value(self, name: str, **labels: str) -> float:
        """Of the one series with this name and exactly these labels."""
        found = [sample.value for sample in self._samples if sample.name == name and sample.labels == labels]
        assert len(found) == 1, f"{len(found)} series are {name} {labels}:\n{self.text}"
        return found[0]

    def by(self, label: str, name: str) -> dict[str, float]:
        """The sums of a metric's series, by the value of one label."""
        sums: dict[str, float] = {}
        for sample in self._samples:
            if sample.name == name:
                sums[sample.labels[label]] = sums.get(sample.labels[label], 0.0) + sample.value
        return sums


def scraped(registry: CollectorRegistry) -> Scraped:
    return Scraped(generate_latest(registry).decode())
