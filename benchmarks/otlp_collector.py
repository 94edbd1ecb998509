"""A small OTLP collector: takes spans over gRPC as a real one does, and keeps them in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

Value = str | bool | int | float | tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class CollectedSpan:
    """One span as it came. Ids are hexadecimal; a root's ``parent_id`` is empty. Times are Unix times in ns.

    Attributes:
        service, member: of the process that recorded it.
        events: their names and attributes.
        error: its status says so.
    """

    service: str
    member: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    begun_ns: int
    ended_ns: int
    attributes: dict[str, Value]
    events: tuple[tuple[str, dict[str, Value]], ...]
    error: bool


class OtlpCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Listens on loopback from construction to ``close``.

    Args:
        port: 0 takes a free one.
    """

    def __init__(self, port: int = 0) -> None:
        self._spans: list[CollectedSpan] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(max_workers=2), options=(("grpc.so_reuseport", 0),))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> tuple[CollectedSpan, ...]:
        """So far, in the order of their coming."""
        with self._lock:
            return tuple(self._spans)

    def trace(self, trace_id: str) -> tuple[CollectedSpan, ...]:
        """Those of one trace."""
        return tuple(span for span in self.spans if span.trace_id == trace_id)

    def close(self) -> None:
        self._server.stop(grace=None).wait()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        spans = []
        for of_resource in request.resource_spans:
            resource = _attributes(of_resource.resource.attributes)
            service, member = str(resource["service.name"]), str(resource["service.instance.id"])
            spans += [_span(service, member, span) for scope in of_resource.scope_spans for span in scope.spans]
        with self._lock:
            self._spans += spans
        return trace_service_pb2.ExportTraceServiceResponse()


def _span(service: str, member: str, span: Any) -> CollectedSpan:
    return CollectedSpan(
        service,
        member,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        tuple((event.name, _attributes(event.attributes)) for event in span.events),
        span.status.code == span.status.STATUS_CODE_ERROR,
    )


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return tuple(_value(item) for item in value.array_value.values)
    return "" if kind is None else getattr(value, kind)
