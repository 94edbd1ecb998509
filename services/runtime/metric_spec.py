"""What a metric is declared with, and how a process makes series of it.

There are two ways. What happens is counted when it happens, by an instrument of prometheus_client in the process's
registry. What is, is read when somebody asks: a ``Collector`` in the registry answers with families made here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from services.runtime.membership import Kind as Service

MetricKind = Literal["counter", "gauge", "histogram", "summary"]
Labels = Sequence[str]  # values, in the order of the declared names

UNITS = ("seconds", "bytes", "ratio", "tokens_per_second", "tokens", "blocks")


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """One declared metric.

    Attributes:
        name: as it is exposed; a counter's ends in "_total".
        services: the kinds of processes that serve it.
        labels: names; whatever the values, there are few: members of the cluster, or words of a short list.
        buckets: upper bounds of a histogram's buckets, in the unit.
    """

    name: str
    kind: MetricKind
    help: str
    services: tuple[Service, ...]
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """The one that the name ends with; empty where things are counted that have none."""
        base = self.name.removesuffix("_total")
        return next((unit for unit in UNITS if base.endswith(f"_{unit}")), "")

    def counter(self, registry: CollectorRegistry) -> Counter:
        """An instrument."""
        assert self.kind == "counter"
        return Counter(self.name, self.help, self.labels, unit=self.unit, registry=registry)

    def histogram(self, registry: CollectorRegistry) -> Histogram:
        """An instrument."""
        assert self.kind == "histogram"
        return Histogram(self.name, self.help, self.labels, unit=self.unit, registry=registry, buckets=self.buckets)

    def value(self, value: float) -> Metric:
        """The family of a gauge or counter without labels."""
        return self.family([((), value)])

    def family(self, samples: Iterable[tuple[Labels, float]]) -> Metric:
        """The family of a gauge or counter."""
        assert self.kind in ("counter", "gauge")
        family: CounterMetricFamily | GaugeMetricFamily
        if self.kind == "counter":
            family = CounterMetricFamily(self.name, self.help, labels=self.labels, unit=self.unit)
        else:
            family = GaugeMetricFamily(self.name, self.help, labels=self.labels, unit=self.unit)
        for labels, value in samples:
            family.add_metric(labels, value)
        return family

    def summary(self, samples: Iterable[tuple[Labels, int, float]]) -> Metric:
        """The family of a summary: for each labels, how many were observed and their sum."""
        assert self.kind == "summary"
        family = SummaryMetricFamily(self.name, self.help, labels=self.labels, unit=self.unit)
        for labels, count, total in samples:
            family.add_metric(labels, count, total)
        return family
