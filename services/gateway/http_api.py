"""The OpenAI HTTP API: /v1/completions, /v1/models, /health, /version; and what whoever makes it adds."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from services.core.errors import InfiniteLLMError
from services.gateway.completion import CompletionRenderer
from services.gateway.disconnect import ClientDisconnected, unless_disconnected
from services.gateway.generation import Generation, GenerationService
from services.gateway.openai_errors import ApiError, api_error
from services.gateway.openai_types import CompletionRequest, parse_completion_request
from services.gateway.requests import Event, Finished, NewTokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Readiness:
    """What /health tells. ``missing`` is empty when all is there."""

    instances: int
    kvdaemons: int
    missing: tuple[str, ...]


def make_app(
    service: GenerationService,
    readiness: Callable[[], Readiness],
    version: str,
    max_body_bytes: int,
    further: Sequence[Route],
) -> Starlette:
    """The ASGI application; ``further`` routes are served beside the API's."""
    created = int(time.time())

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, created)]})

    async def model(request: Request) -> Response:
        service.check_model(request.path_params["name"])
        return JSONResponse(_model(service, created))

    async def health(request: Request) -> Response:
        state = readiness()
        body = {
            "status": "unavailable" if state.missing else "ok",
            "missing": list(state.missing),
            "instances": state.instances,
            "kvdaemons": state.kvdaemons,
        }
        return JSONResponse(body, status_code=503 if state.missing else 200)

    async def version_of(request: Request) -> Response:
        return JSONResponse({"version": version})

    return Starlette(
        routes=[
            Route("/v1/completions", _Completions(service, max_body_bytes), methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/version", version_of),
            *further,
        ],
        exception_handlers={
            InfiniteLLMError: _on_error,
            ApiError: _on_error,
            HTTPException: _on_error,
            Exception: _on_error,
        },
    )


class _Completions:
    """POST /v1/completions, as an ASGI application of its own: the request's life spans the sending of the answer."""

    def __init__(self, service: GenerationService, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            asked = parse_completion_request(await self._read_body(Request(scope, receive)))
            await unless_disconnected(receive, self._answer(asked, scope, receive, send))
        except (ClientDisconnected, ClientDisconnect):
            # The generation has been ended on the way out, and there is nobody to tell.
            logger.info("client disconnected")

    async def _read_body(self, request: Request) -> bytes:
        too_long = ApiError(413, f"the body is longer than {self._max_body_bytes} bytes", code="body_too_long")
        if int(request.headers.get("content-length", "0")) > self._max_body_bytes:
            raise too_long
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise too_long
        return bytes(body)

    async def _answer(self, asked: CompletionRequest, scope: Scope, receive: Receive, send: Send) -> None:
        async with (
            self._service.start(asked.model or "", asked.the_prompt(), asked.sampling()) as generation,
            aclosing(generation.events()) as events,
        ):
            renderer = CompletionRenderer(
                asked, generation.request, self._service.checkpoint.name, self._service.tokenizer
            )
            # An error before the first event still gets its own status.
            first = await anext(events)
            if asked.stream:
                await _stream(first, events, renderer, generation, send)
            else:
                response = await _collect(first, events, renderer, generation)
                await response(scope, receive, send)


async def _collect(
    first: Event, rest: AsyncGenerator[Event, None], renderer: CompletionRenderer, generation: Generation
) -> Response:
    """The whole answer in one JSON object."""
    tokens: list[NewTokens] = []
    event = first
    while not isinstance(event, Finished):
        if isinstance(event, NewTokens):
            tokens.append(event)
        event = await anext(rest)
    return Response(renderer.whole(tokens, event), media_type="application/json", headers=_headers(generation))


async def _stream(
    first: Event,
    rest: AsyncGenerator[Event, None],
    renderer: CompletionRenderer,
    generation: Generation,
    send: Send,
) -> None:
    """Server-sent events. An error in the middle becomes an event of its own, and no [DONE] follows it."""
    headers = _headers(generation) | {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
    event = first
    try:
        while not isinstance(event, Finished):
            if isinstance(event, NewTokens):
                await _send_event(send, renderer.tokens_chunk(event))
            event = await anext(rest)
        for chunk in renderer.last_chunks(event):
            await _send_event(send, chunk)
        await _send_event(send, b"[DONE]")
    except InfiniteLLMError as exc:
        await _send_event(send, api_error(exc).body())
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


def _headers(generation: Generation) -> dict[str, str]:
    return {"x-request-id": generation.request.request_id}


def _model(service: GenerationService, created: int) -> dict[str, Any]:
    return {
        "id": service.checkpoint.name,
        "object": "model",
        "created": created,
        "owned_by": "infinite-llm",
        "max_model_len": service.max_model_len,
    }


async def _on_error(request: Request, exc: Exception) -> Response:
    if isinstance(exc, InfiniteLLMError):
        error = api_error(exc)
    elif isinstance(exc, ApiError):
        error = exc
    elif isinstance(exc, HTTPException):
        error = ApiError(exc.status_code, f"{request.method} {request.url.path}: {exc.detail}")
    else:
        error = ApiError(500, "internal error; see the gateway's log")
    return Response(error.body(), error.status, error.headers(), media_type="application/json")
