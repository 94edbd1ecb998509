"""Where in which trace something happens, as W3C's Trace Context writes it. Pure: nothing is recorded here."""

from __future__ import annotations

import re
from typing import NamedTuple

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


class TraceContext(NamedTuple):
    """A span of a trace that is sampled. What is not sampled has no context, and so costs nothing further on.

    Attributes:
        trace_id: 128 bits, not 0.
        span_id: 64 bits, not 0.
    """

    trace_id: int
    span_id: int

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{_SAMPLED:02x}"


def parse_traceparent(text: str) -> TraceContext | None:
    """The context of a ``traceparent``; None where it is none, or its trace is not sampled."""
    match = _TRACEPARENT.fullmatch(text)
    if match is None or not int(match[3], 16) & _SAMPLED:
        return None
    context = TraceContext(int(match[1], 16), int(match[2], 16))
    return context if context.trace_id and context.span_id else None
