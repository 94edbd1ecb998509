"""Spans recorded in this process, for tests of what records them."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Tracer

from services.core.trace_context import TraceContext
from services.runtime.otlp import make_provider

CALLER = TraceContext(0xABC, 0xDEF)


class Recorder:
    """A tracer, as a service has it, and the spans that have ended."""

    def __init__(self, sampling_ratio: float = 1.0) -> None:
        self._exporter = InMemorySpanExporter()
        provider = make_provider(sampling_ratio, "test", "test-0", "test")
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]


def parent_of(span: ReadableSpan) -> TraceContext | None:
    return None if span.parent is None else TraceContext(span.parent.trace_id, span.parent.span_id)


def context_of(span: ReadableSpan) -> TraceContext:
    context = span.get_span_context()
    assert context is not None
    return TraceContext(context.trace_id, context.span_id)


def told(span: ReadableSpan) -> dict[str, object]:
    """Its attributes."""
    return dict(span.attributes or {})
