"""A request's span at the gateway."""

from __future__ import annotations

from spans import Recorder, told

from services.gateway.request_span import RequestSpan
from services.gateway.requests import GenerationRequest


def test_of_a_resumed_request_the_span_learns_what_it_is() -> None:
    recorder = Recorder()
    span = RequestSpan(recorder.tracer, "text_completion", "m")
    request = GenerationRequest("cmpl-1", (1, 2), 8, 0.5, 7, (3,), 0, False, 12.25, model="m", operation="chat")
    assert span.of(request).traceparent
    span.ended("stop", refused=False, output_tokens=3)
    (recorded,) = recorder.spans
    assert recorded.name == "chat m"
    assert told(recorded)["gen_ai.operation.name"] == "chat"
    assert told(recorded)["gen_ai.response.id"] == "cmpl-1"
