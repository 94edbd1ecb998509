"""What a daemon tells of traced requests whose segments it holds: one span for all their queries."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvdaemon_rig import DEADLINE_S, GEOMETRY, Rig, segment
from spans import CALLER, Recorder, parent_of, told

from services.core.trace_context import TraceContext
from services.dataplane import wire
from services.dataplane.transport import Connection
from services.dataplane.wire import Header, Kind, SegmentTrace
from services.kvdaemon.hosted_traces import HostedTraces

OTHER = TraceContext(0x123, 0x456)


class Asking:
    """A client with two segments of one block each; the first one's request is traced."""

    def __init__(self, rig: Rig, traced: list[SegmentTrace]) -> None:
        self._rig = rig
        session = rig.open()
        self._blocks = rig.sealed(session, range(2))
        self.connection: Connection = rig.connect(session)
        rig.send(self.connection, Header(Kind.TRACE, rows=len(traced)), wire.pack_traces(traced))

    def ask(self, step: int, *handles: int, known: int = 0) -> None:
        """A step of these segments: one query for each layer."""
        segments = [segment(h, 1, 8, [(self._blocks[h], 0)][known:], known=known) for h in handles]
        self._rig.send_plan(self.connection, step, *segments)
        for layer in range(GEOMETRY.layers):
            q = self._rig.random(len(handles), 4, GEOMETRY.head_dim)
            self._rig.send_query(self.connection, q, step=step, layer=layer)
            self._rig.partial(self.connection)

    def forget(self, *handles: int) -> None:
        self._rig.send(self.connection, Header(Kind.FORGET, rows=len(handles)), wire.pack_handles(handles))


def until(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_queries_are_summed_up_until_the_segment_is_forgotten() -> None:
    recorder = Recorder()
    with Rig(traces=HostedTraces(recorder.tracer)) as rig:
        client = Asking(rig, [SegmentTrace(0, CALLER)])
        client.ask(1, 0, 1)
        client.ask(2, 1, known=1)  # the other one alone
        client.ask(3, 0, 1, known=1)
        assert recorder.spans == []
        client.forget(0)
        until(lambda: recorder.spans)
        client.ask(4, 1, known=1)
    (span,) = recorder.spans
    assert (span.name, parent_of(span)) == ("hosted attention", CALLER)
    assert told(span)["infinite_llm.queries"] == 2 * GEOMETRY.layers
    assert told(span)["infinite_llm.instance"] == "a"
    assert span.start_time is not None
    assert span.end_time is not None
    seconds = float(str(told(span)["infinite_llm.attention_seconds"]))
    assert 0 < seconds * 1e9 <= span.end_time - span.start_time


def test_a_silent_segment_and_a_lost_connection_are_told_of() -> None:
    recorder = Recorder()
    with Rig(traces=HostedTraces(recorder.tracer)) as rig:
        client = Asking(rig, [SegmentTrace(0, CALLER), SegmentTrace(1, OTHER)])
        client.ask(1, 0)
        until(lambda: recorder.spans)  # nothing ends it but time
        client.ask(2, 0, known=1)
        client.ask(3, 1)
        client.connection.close()
        until(lambda: len(recorder.spans) == 3)
    assert [parent_of(span) for span in recorder.spans] == [CALLER, CALLER, OTHER]
    assert [told(span)["infinite_llm.queries"] for span in recorder.spans] == [GEOMETRY.layers] * 3


def test_a_daemon_without_tracing_serves_traced_requests() -> None:
    with Rig() as rig:
        client = Asking(rig, [SegmentTrace(0, CALLER)])
        client.ask(1, 0, 1)
        client.forget(0)
        client.ask(2, 1, known=1)
