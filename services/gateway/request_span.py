"""A request's span at the gateway: the root of its trace, or the child of its client's.

Attributes are named by OpenTelemetry's semantic conventions for generative AI, as far as they have names.
"""

from __future__ import annotations

from dataclasses import replace

from opentelemetry import context as otel_context
from opentelemetry.trace import NoOpTracer, SpanKind, Status, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from services.gateway.requests import GenerationRequest, Operation
from services.runtime.tracing import context_of, incoming_context


class CallersTrace:
    """ASGI middleware: a request's handler runs in the trace that its headers name (``traceparent``)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = incoming_context(Headers(scope=scope).items()) if scope["type"] == "http" else None
        if caller is None:
            await self._app(scope, receive, send)
            return
        token = otel_context.attach(caller)
        try:
            await self._app(scope, receive, send)
        finally:
            otel_context.detach(token)


class RequestSpan:
    """Begins now, in the current trace if there is one.

    Args:
        operation: of a request that is resumed, what is known of it when its record has been read is told by ``of``.
    """

    def __init__(self, tracer: Tracer, operation: Operation, model: str) -> None:
        self._span = tracer.start_span(f"{operation} {model}", kind=SpanKind.SERVER)
        if self._span.is_recording():
            self._span.set_attributes(
                {
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "infinite_llm",
                    "gen_ai.request.model": model,
                    "gen_ai.response.model": model,
                }
            )

    def of(self, request: GenerationRequest) -> GenerationRequest:
        """The request is admitted; the answer is to be used instead of it, for it names its trace."""
        context = context_of(self._span)
        if context is None:
            return request
        self._span.update_name(f"{request.operation} {request.model}")
        self._span.set_attributes(
            {
                "gen_ai.operation.name": request.operation,
                "gen_ai.response.id": request.request_id,
                "gen_ai.request.max_tokens": request.max_tokens,
                "gen_ai.request.temperature": request.temperature,
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
            }
        )
        return replace(request, traceparent=context.traceparent)

    def placed(self, instance_id: str) -> None:
        """It has been submitted to an instance."""
        self._span.add_event("placed", {"infinite_llm.instance": instance_id})

    def first_token(self, after_s: float) -> None:
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", after_s)

    def lost_instance(self) -> None:
        self._span.add_event("instance lost")

    def answered(self, cached_tokens: int) -> None:
        self._span.set_attribute("gen_ai.usage.cache_read.input_tokens", cached_tokens)

    def ended(self, state: str, refused: bool, output_tokens: int) -> None:
        """Once.

        Args:
            state: "stop", "length", "aborted", or an error's reason.
            refused: it is such a reason.
        """
        self._span.set_attribute("gen_ai.usage.output_tokens", output_tokens)
        if refused:
            self._span.set_attribute("error.type", state)
            self._span.set_status(Status(StatusCode.ERROR, state))
        else:
            self._span.set_attribute("gen_ai.response.finish_reasons", (state,))
        self._span.end()


UNTRACED = RequestSpan(NoOpTracer(), "text_completion", "")
