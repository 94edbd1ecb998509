"""Traces: what becomes of a request on its way through the services, exported over OTLP.

A process makes a ``Tracing`` once, from its configuration; without one every span is a no-op and nothing is exported.
Sampling is decided once, where a trace begins: at the gateway, or before it at its client. The other services record
what comes with a sampled context (``TraceContext``) and nothing else.

    gateway --SubmitRequest.traceparent--> instance --metadata--> gManager (FindRoom), kvdaemon (Reserve)
                                           instance --TRACE, once for each segment--> kvdaemon's worker
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import (
    NonRecordingSpan,
    NoOpTracer,
    Span,
    SpanContext,
    SpanKind,
    TraceFlags,
    Tracer,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.core.errors import ConfigError
from services.core.trace_context import TraceContext

_TRACEPARENT = "traceparent"
_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class TracingConfig:
    """Where spans go, and of how many requests.

    Attributes:
        endpoint: of an OTLP receiver over gRPC, such as an OpenTelemetry collector: "http://host:4317", or https for
            TLS; OTEL_EXPORTER_OTLP_CERTIFICATE and OTEL_EXPORTER_OTLP_HEADERS say more.
        sampling_ratio: share of the requests that are traced, of those whose client has not decided it; 0 to 1. Only a
            gateway decides.
    """

    endpoint: str
    sampling_ratio: float = 1.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"endpoint must be http://HOST:PORT or https://HOST:PORT, got {self.endpoint!r}")
        if not 0 <= self.sampling_ratio <= 1:
            raise ConfigError(f"sampling_ratio must be between 0 and 1, got {self.sampling_ratio}")


class Tracing:
    """A process's traces; this class records none."""

    tracer: Tracer = NoOpTracer()

    def close(self) -> None:
        """Exports what is left, for a few seconds at most."""


def make_tracing(config: TracingConfig | None, service: str, member_id: str, cluster: str) -> Tracing:
    """As configured; None: none. Whoever makes it closes it."""
    if config is None:
        return Tracing()
    from services.runtime.otlp import OtlpTracing  # here: a process without traces is spared its time and memory

    return OtlpTracing(config, service, member_id, cluster)


# ---------------------------------------------------------------- contexts


def under(context: TraceContext) -> Context:
    """For ``Tracer.start_span``: a new span is the context's child."""
    flags = TraceFlags(TraceFlags.SAMPLED)
    return set_span_in_context(
        NonRecordingSpan(SpanContext(context.trace_id, context.span_id, is_remote=True, trace_flags=flags)), Context()
    )


def context_of(span: Span) -> TraceContext | None:
    """None where the span is not sampled."""
    context = span.get_span_context()
    return TraceContext(context.trace_id, context.span_id) if context.trace_flags.sampled else None


@contextmanager
def entered(context: TraceContext | None) -> Iterator[None]:
    """Calls that are made inside, in this task, carry the context where they are made ``with outgoing_metadata()``."""
    if context is None:
        yield
        return
    token = otel_context.attach(under(context))
    try:
        yield
    finally:
        otel_context.detach(token)


def outgoing_metadata() -> tuple[tuple[str, str], ...] | None:
    """gRPC metadata of a call that is made for a request that is traced."""
    context = context_of(get_current_span())
    return None if context is None else ((_TRACEPARENT, context.traceparent),)


def incoming_context(metadata: Iterable[tuple[str, str | bytes]]) -> Context | None:
    """For ``Tracer.start_span``: what a call's metadata, or a request's headers, say of the caller's trace, sampled or
    not; None where they say nothing."""
    texts = {key: value for key, value in metadata if isinstance(value, str)}
    return _PROPAGATOR.extract(texts, Context()) if _TRACEPARENT in texts else None


@contextmanager
def call_span(tracer: Tracer, method: str, caller: Context | None) -> Iterator[None]:
    """Around the handler of a gRPC call, ``/package.Service/Method``, that is made for a traced request. An error that
    leaves it is the span's as well."""
    if caller is None or context_of(get_current_span(caller)) is None:
        yield
        return
    service, _, name = method.strip("/").partition("/")
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    with tracer.start_as_current_span(f"{service}/{name}", caller, kind=SpanKind.SERVER, attributes=attributes):
        yield


def ns_ago(seconds: float) -> int:
    """Unix time in nanoseconds, as spans have it, so many seconds before now."""
    return time.time_ns() - int(seconds * 1e9)
