"""The core metrics under vLLM's names as well, so that dashboards made for vLLM show them.

Each process answers for the metrics that it has: a gateway for latencies, tokens and outcomes, an instance for queues,
memory and preemptions. Values are those of our own metrics; a label ``model_name`` is added.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from services.runtime import metrics
from services.runtime.metric_spec import MetricSpec

VLLM_NAMES: Mapping[MetricSpec, tuple[str, ...]] = {
    metrics.REQUESTS_RUNNING: ("vllm:num_requests_running",),
    metrics.REQUESTS_WAITING: ("vllm:num_requests_waiting",),
    metrics.KV_CACHE_USAGE: ("vllm:kv_cache_usage_perc",),
    metrics.TIME_TO_FIRST_TOKEN: ("vllm:time_to_first_token_seconds",),
    # The former is what older versions of vLLM call the latter.
    metrics.INTER_TOKEN_LATENCY: ("vllm:time_per_output_token_seconds", "vllm:inter_token_latency_seconds"),
    metrics.REQUEST_DURATION: ("vllm:e2e_request_latency_seconds",),
    metrics.PROMPT_TOKENS: ("vllm:prompt_tokens_total",),
    metrics.GENERATION_TOKENS: ("vllm:generation_tokens_total",),
    metrics.PREEMPTIONS: ("vllm:num_preemptions_total",),
    metrics.REQUESTS: ("vllm:request_success_total",),
}
_FINISHED_REASONS = {"stop": "stop", "length": "length", "aborted": "abort"}


def with_vllm_names(registry: CollectorRegistry, model: str) -> CollectorRegistry:
    """A registry that answers with all of ``registry``, and again by vLLM's names."""
    both = CollectorRegistry()
    both.register(_BothNames(registry, model))
    return both


class _BothNames(Collector):
    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        self._registry = registry
        self._model = model
        self._names = {spec.name.removesuffix("_total"): names for spec, names in VLLM_NAMES.items()}

    def collect(self) -> Iterable[Metric]:
        for family in self._registry.collect():
            yield family
            for name in self._names.get(family.name, ()):
                yield self._renamed(family, name.removesuffix("_total"))

    def _renamed(self, family: Metric, name: str) -> Metric:
        renamed = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            labels = {**sample.labels, "model_name": self._model}
            if (outcome := labels.pop("outcome", None)) is not None:
                if outcome not in _FINISHED_REASONS:
                    continue
                labels["finished_reason"] = _FINISHED_REASONS[outcome]
            renamed.samples.append(Sample(name + sample.name.removeprefix(family.name), labels, sample.value))
        return renamed
