"""Declared metrics: their names follow Prometheus' conventions, and their series stay few."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from scraped import scraped

from services.runtime import metrics
from services.runtime.metric_spec import MetricSpec
from services.runtime.vllm_names import VLLM_NAMES, with_vllm_names

SUFFIXES = ("_total", "_count", "_sum", "_bucket", "_created")
# Whatever these hold is a member of the cluster, a transport, the version, or a word of the code.
BOUNDED = {"instance_id", "kvdaemon_id", "peer", "transport", "version"}
BOUNDED |= {"outcome", "reason", "phase", "part", "state", "kind", "end", "moves", "way"}


def test_each_is_declared_once() -> None:
    assert len(metrics.ALL) > 40
    assert len({spec.name for spec in metrics.ALL}) == len(metrics.ALL)


@pytest.mark.parametrize("spec", metrics.ALL, ids=lambda spec: spec.name)
def test_conventions(spec: MetricSpec) -> None:
    assert re.fullmatch(r"infinite_llm_[a-z]+(_[a-z]+)*", spec.name)
    base = spec.name.removesuffix("_total")
    assert (base != spec.name) == (spec.kind == "counter")
    assert not base.endswith(SUFFIXES)
    assert not re.search(r"_(ms|us|millis|kib|mib|percent|perc)(_|$)", spec.name)
    assert spec.help.endswith(".")
    assert "\n" not in spec.help
    assert spec.services
    assert set(spec.labels) <= BOUNDED
    assert list(spec.buckets) == sorted(set(spec.buckets))
    assert bool(spec.buckets) == (spec.kind == "histogram")


def test_units_are_the_ends_of_names() -> None:
    units = {spec.name: spec.unit for spec in metrics.ALL}
    assert units["infinite_llm_step_part_seconds_total"] == "seconds"
    assert units["infinite_llm_pool_bytes"] == "bytes"
    assert units["infinite_llm_planned_throughput_tokens_per_second"] == "tokens_per_second"
    assert units["infinite_llm_requests_total"] == ""


@pytest.mark.parametrize("spec", metrics.ALL, ids=lambda spec: spec.name)
def test_what_is_exposed_is_what_is_declared(spec: MetricSpec) -> None:
    registry, values = CollectorRegistry(), [f"a {label}" for label in spec.labels]
    if spec.kind == "histogram":
        histogram = spec.histogram(registry)
        (histogram.labels(*values) if values else histogram).observe(spec.buckets[0])
    elif spec.kind == "counter":
        counter = spec.counter(registry)
        (counter.labels(*values) if values else counter).inc(3)
    else:
        registry.register(_Fixed(spec.summary([(values, 2, 3.0)]) if spec.kind == "summary" else _family(spec, values)))
    (family,) = scraped(registry).families.values()
    assert family.name == spec.name.removesuffix("_total")
    assert (family.type, family.documentation) == (spec.kind, spec.help)
    labels = [set(sample.labels) - {"le"} for sample in family.samples if not sample.name.endswith("_created")]
    assert labels
    assert all(names == set(spec.labels) for names in labels)


def _family(spec: MetricSpec, values: list[str]) -> Metric:
    return spec.family([(values, 3.0)]) if values else spec.value(3.0)


class _Fixed(Collector):
    def __init__(self, *families: Metric) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def test_vllm_names() -> None:
    registry = CollectorRegistry()
    first, outcomes = metrics.TIME_TO_FIRST_TOKEN.histogram(registry), metrics.REQUESTS.counter(registry)
    first.observe(0.2)
    metrics.INTER_TOKEN_LATENCY.histogram(registry).observe(0.02)
    metrics.PREEMPTIONS.counter(registry).labels("memory").inc(4)
    for outcome, count in (("stop", 1), ("length", 2), ("aborted", 3), ("refused", 4)):
        outcomes.labels(outcome).inc(count)
    registry.register(_Fixed(metrics.REQUESTS_RUNNING.value(7), metrics.MOVES_IN_PROGRESS.value(5)))
    told = scraped(with_vllm_names(registry, "m"))
    assert told.value("vllm:num_requests_running", model_name="m") == 7
    assert told.value("infinite_llm_moves_in_progress") == 5
    assert told.value("vllm:time_to_first_token_seconds_count", model_name="m") == 1
    assert told.value("vllm:time_to_first_token_seconds_bucket", model_name="m", le="0.25") == 1
    for name in ("time_per_output_token", "inter_token_latency"):
        assert told.value(f"vllm:{name}_seconds_sum", model_name="m") == 0.02
    assert told.value("vllm:num_preemptions_total", model_name="m", reason="memory") == 4
    reasons = told.by("finished_reason", "vllm:request_success_total")
    assert reasons == {"stop": 1, "length": 2, "abort": 3}
    assert told.value("infinite_llm_requests_total", outcome="refused") == 4  # our own names stay
    assert told.families["vllm:request_success"].type == "counter"


def test_vllm_names_are_of_declared_metrics() -> None:
    names = [name for several in VLLM_NAMES.values() for name in several]
    assert len(set(names)) == len(names)
    for spec, several in VLLM_NAMES.items():
        assert all(name.endswith("_total") == (spec.kind == "counter") for name in several)
