"""Spans of what a daemon computes for requests that are traced: one for each segment, from its first query to its last.

An instance names such segments once (TRACE); queries carry nothing more. A span is exported when its segment is
forgotten, when the connection ends, and when no query has come for a while: an instance forgets segments with its next
plan, which may be long in coming. If queries go on after that, they make another span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from opentelemetry.trace import SpanKind, Tracer

from services.core.trace_context import TraceContext
from services.dataplane.transport import Connection
from services.dataplane.wire import PlanSegment, SegmentTrace
from services.runtime.tracing import ns_ago, under

_SILENCE_S = 2.0  # without a query, after which a span is exported
_LOOK_S = 0.5  # between two looks for silent ones


@dataclass(slots=True)
class HostedWork:
    """Queries that one segment had a part in, since its last span. Seconds are the whole queries', Unix times in ns."""

    instance_id: str
    trace: TraceContext
    queries: int = 0
    seconds: float = 0.0
    begun_ns: int = 0
    ended_ns: int = 0

    def add(self, queries: int, compute_s: float, ago_s: float = 0.0) -> None:
        """Queries have been computed, the last one so long ago."""
        self.ended_ns = ns_ago(ago_s)
        if not self.queries:
            self.begun_ns = ns_ago(ago_s + compute_s)
        self.queries += queries
        self.seconds += compute_s


class HostedTraces:
    """Of all connections. Used by the worker thread."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._works: dict[Connection, dict[int, HostedWork]] = {}  # by segment handle
        self._look_at = 0.0  # monotonic

    def begin(self, connection: Connection, instance_id: str, segments: Iterable[SegmentTrace]) -> None:
        """These segments' requests are traced. What is known already stays as it is."""
        works = self._works.setdefault(connection, {})
        for handle, trace in segments:
            works.setdefault(handle, HostedWork(instance_id, trace))

    def of(self, connection: Connection, segments: Iterable[PlanSegment]) -> Sequence[HostedWork]:
        """Those of a plan's segments that are traced."""
        works = self._works.get(connection)
        return () if not works else [works[segment.handle] for segment in segments if segment.handle in works]

    def end(self, connection: Connection, handles: Iterable[int]) -> None:
        """Segments are forgotten."""
        works = self._works.get(connection)
        if works:
            for handle in handles:
                if (work := works.pop(handle, None)) is not None:
                    self._export(work)

    def end_all(self, connection: Connection) -> None:
        """The connection is over."""
        for work in self._works.pop(connection, {}).values():
            self._export(work)

    def tick(self, now: float) -> None:
        """Exports what is silent; called once per round. ``now``: monotonic."""
        if not self._works or now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        silent_ns = ns_ago(_SILENCE_S)
        for works in self._works.values():
            for work in works.values():
                if work.queries and work.ended_ns < silent_ns:
                    self._export(work)

    def close(self) -> None:
        for connection in list(self._works):
            self.end_all(connection)

    def _export(self, work: HostedWork) -> None:
        if not work.queries:
            return
        attributes: dict[str, str | int | float] = {
            "infinite_llm.instance": work.instance_id,
            "infinite_llm.queries": work.queries,
            "infinite_llm.attention_seconds": work.seconds,
        }
        span = self._tracer.start_span(
            "hosted attention", under(work.trace), kind=SpanKind.SERVER, attributes=attributes, start_time=work.begun_ns
        )
        span.end(work.ended_ns)
        work.queries, work.seconds = 0, 0.0
