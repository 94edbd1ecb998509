"""Spans over OTLP: recorded in memory, exported by a thread of its own, dropped where nobody takes them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from services.runtime.tracing import Tracing, TracingConfig
from services.runtime.version import version

log = logging.getLogger(__name__)

_QUEUED_SPANS = 4096  # that wait to be exported; more push out the oldest
_BATCH_SPANS = 512
_EXPORT_INTERVAL_S = 1.0
_EXPORT_TIMEOUT_S = 2.0  # of a batch; also bounds how long ``close`` waits for a target that hangs
# What warns again and again of a target that is away; ``_OneWarning`` does so once.
_TALKATIVE = ("opentelemetry.exporter.otlp.proto.grpc.exporter", "opentelemetry.sdk._shared_internal")


class OtlpTracing(Tracing):
    """Exports to ``config.endpoint``. A target that is away costs the spans, and nothing else."""

    def __init__(self, config: TracingConfig, service: str, member_id: str, cluster: str) -> None:
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        insecure = urlsplit(config.endpoint).scheme == "http"
        target = OTLPSpanExporter(endpoint=config.endpoint, insecure=insecure, timeout=_EXPORT_TIMEOUT_S)
        self._exporter = _OneWarning(target, config.endpoint)
        self._provider = make_provider(config.sampling_ratio, service, member_id, cluster)
        self._provider.add_span_processor(
            BatchSpanProcessor(
                self._exporter,
                max_queue_size=_QUEUED_SPANS,
                schedule_delay_millis=_EXPORT_INTERVAL_S * 1e3,
                max_export_batch_size=_BATCH_SPANS,
            )
        )
        self.tracer = self._provider.get_tracer("infinite-llm", version())

    def close(self) -> None:
        self._exporter.closing.set()
        self._provider.shutdown()


def make_provider(sampling_ratio: float, service: str, member_id: str, cluster: str) -> TracerProvider:
    """A provider whose spans say which process they come from; a parent decides whether its children are sampled."""
    resource = Resource.create(
        {
            "service.namespace": "infinite-llm",
            "service.name": service,
            "service.instance.id": member_id,
            "service.version": version(),
            "infinite_llm.cluster": cluster,
        }
    )
    sampler = ParentBased(TraceIdRatioBased(sampling_ratio))
    return TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)


class _OneWarning(SpanExporter):
    """Says once that the target is away, and once that it is back.

    Attributes:
        closing: nothing is tried any more at a target that is known to be away.
    """

    def __init__(self, target: SpanExporter, endpoint: str) -> None:
        self.closing = threading.Event()
        self._target = target
        self._endpoint = endpoint
        self._dropped = 0  # spans, since the target is away

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._dropped and self.closing.is_set():
            return SpanExportResult.FAILURE
        result = self._target.export(spans)
        if result is not SpanExportResult.SUCCESS:
            if not self._dropped:
                log.warning("no spans are exported until the target answers", extra={"endpoint": self._endpoint})
            self._dropped += len(spans)
        elif self._dropped:
            log.info("spans are exported again", extra={"endpoint": self._endpoint, "dropped": self._dropped})
            self._dropped = 0
        return result

    def shutdown(self) -> None:
        self._target.shutdown()
