"""The HTTP API: OpenAI's /v1/completions, /v1/chat/completions and /v1/models, and what is beside it.

/openapi.json describes it.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from services.core.errors import InfiniteLLMError, UnauthenticatedError
from services.gateway.chat_template import ChatTemplate, render_chat
from services.gateway.choices import ChoiceEvent, events_of
from services.gateway.disconnect import ClientDisconnected, unless_disconnected
from services.gateway.generation_service import Asker, GenerationService
from services.gateway.openai_chat import ChatRequest
from services.gateway.openai_errors import ApiError, api_error
from services.gateway.openai_types import CompletionRequest, parse_request
from services.gateway.openapi import openapi
from services.gateway.position import EventId
from services.gateway.renderers import Renderers, rendering_of
from services.gateway.rendering import whole_answer
from services.gateway.request_span import CallersTrace
from services.gateway.requests import Finished, NewTokens, Operation, Prompt, PromptLogprobs, Sampling
from services.gateway.resume_api import KEY_NAME, Resumption
from services.gateway.sse import asks_for_ids, generation_headers, send_stream
from services.gateway.tokenize_api import answer_detokenize, answer_tokenize
from services.runtime.api_keys import ApiKeys

logger = logging.getLogger(__name__)
_OPEN_PATHS = frozenset({"/health", "/version", "/metrics"})
_DEFAULT_TOKENS = 16  # OpenAI's for completions
# Of a chat's answer. OpenAI's goes on to the end of the context; here that would ask for the memory of all of it.
_DEFAULT_CHAT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Readiness:
    """What /health tells. ``missing`` is empty when all is there."""

    instances: int
    kvdaemons: int
    missing: tuple[str, ...]


def make_app(
    service: GenerationService,
    chat_template: ChatTemplate | None,
    keys: ApiKeys | None,
    readiness: Callable[[], Readiness],
    version: str,
    max_body_bytes: int,
    further: Sequence[Route],
) -> Starlette:
    """The ASGI application.

    Args:
        keys: of those who may use it; None: everybody may.
        further: routes that are served beside the API's.
    """
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

    async def tokenize(request: Request) -> Response:
        return JSONResponse(await answer_tokenize(service, chat_template, await read_body(request, max_body_bytes)))

    async def detokenize(request: Request) -> Response:
        return JSONResponse(await answer_detokenize(service, await read_body(request, max_body_bytes)))

    async def version_of(request: Request) -> Response:
        return JSONResponse({"version": version})

    document = openapi(version)

    async def openapi_document(request: Request) -> Response:
        return JSONResponse(document)

    return Starlette(
        routes=[
            Route("/openapi.json", openapi_document),
            Route("/v1/completions", _Completions(service, max_body_bytes), methods=["POST"]),
            Route("/v1/chat/completions", _Chats(service, max_body_bytes, chat_template), methods=["POST"]),
            Route("/v1/streams/{request_id}", Resumption(service), methods=["GET"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/detokenize", detokenize, methods=["POST"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/version", version_of),
            *further,
        ],
        middleware=[Middleware(CallersTrace), *([] if keys is None else [Middleware(_KeyGuard, keys=keys)])],
        exception_handlers={
            InfiniteLLMError: _on_error,
            ApiError: _on_error,
            HTTPException: _on_error,
            Exception: _on_error,
        },
    )


class _KeyGuard:
    """Lets in who has a key, and everybody to what tells nothing of anybody's requests."""

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            try:
                scope[KEY_NAME] = self._keys.name_of(Request(scope).headers.get("authorization"))
            except UnauthenticatedError as exc:
                error = api_error(exc)
                response = Response(error.body(), error.status, error.headers(), media_type="application/json")
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One request of the API, ready to be started."""

    body: CompletionRequest | ChatRequest
    prompt: Prompt
    sampling: Sampling


class _Endpoint(ABC):
    """An ASGI application of its own: the request's life spans the sending of the answer."""

    operation: Operation

    def __init__(self, service: GenerationService, max_body_bytes: int) -> None:
        self.service = service
        self._max_body_bytes = max_body_bytes

    @abstractmethod
    async def ask(self, body: bytes) -> _Asked:
        """Raises ApiError, InfiniteLLMError."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            asked = await self.ask(await read_body(Request(scope, receive), self._max_body_bytes))
            await unless_disconnected(receive, self._answer(asked, scope, receive, send))
        except (ClientDisconnected, ClientDisconnect):
            # The generation has been ended on the way out, and there is nobody to tell.
            logger.info("client disconnected")

    async def _answer(self, asked: _Asked, scope: Scope, receive: Receive, send: Send) -> None:
        service, count = self.service, asked.body.n or 1
        asker = Asker(scope.get(KEY_NAME, ""), rendering_of(asked.body), self.operation, count)
        async with AsyncExitStack() as stack:
            starting = service.start(asked.body.model or "", asked.prompt, asked.sampling, asker=asker)
            generations = [await stack.enter_async_context(starting)]
            for index in range(1, count):
                starting = service.start_choice(generations[0].request, index)
                generations.append(await stack.enter_async_context(starting))
            requests = [generation.request for generation in generations]
            renderers = await Renderers.of(requests, service.checkpoint.name, service.tokenizer)
            events = await stack.enter_async_context(aclosing(events_of(generations)))
            # An error before the first event still gets its own status.
            first = await anext(events)
            if asked.body.stream:
                has_ids, places = service.resumable and asks_for_ids(scope), EventId().of_choices(count)
                await send_stream(first, events, renderers, generations, send, has_ids, places)
            else:
                response = await _collect(first, events, renderers, generation_headers(generations))
                await response(scope, receive, send)


class _Completions(_Endpoint):
    """POST /v1/completions."""

    operation = "text_completion"

    async def ask(self, body: bytes) -> _Asked:
        asked = parse_request(CompletionRequest, body)
        return _Asked(asked, asked.the_prompt(), asked.sampling(_DEFAULT_TOKENS, asked.logprobs))


class _Chats(_Endpoint):
    """POST /v1/chat/completions."""

    operation = "chat"

    def __init__(self, service: GenerationService, max_body_bytes: int, template: ChatTemplate | None) -> None:
        super().__init__(service, max_body_bytes)
        self._template = template

    async def ask(self, body: bytes) -> _Asked:
        asked = parse_request(ChatRequest, body)
        self.service.check_model(asked.model or "")
        logprobs = asked.shown_logprobs
        tools = asked.offered_tools
        text = render_chat(self._template, asked.messages, tools)
        prompt = await self.service.tokenizer.encode(text, add_special_tokens=False)  # the template writes them
        room = max(1, self.service.max_model_len - len(prompt))
        return _Asked(asked, prompt, asked.sampling(min(_DEFAULT_CHAT_TOKENS, room), logprobs))


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Raises ApiError 413 as soon as it is too long."""
    too_long = ApiError(413, f"the body is longer than {max_bytes} bytes", code="body_too_long")
    if int(request.headers.get("content-length", "0")) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body)


async def _collect(
    first: ChoiceEvent,
    rest: AsyncGenerator[ChoiceEvent, None],
    renderers: Renderers,
    headers: dict[str, str],
) -> Response:
    """The whole answer in one JSON object."""
    tokens: list[list[NewTokens]] = [[] for _ in renderers.choices]
    ends: dict[int, Finished] = {}
    index, event = first
    while True:
        if isinstance(event, NewTokens):
            tokens[index].append(event)
        elif isinstance(event, PromptLogprobs):
            renderers.choices[index].take_prompt(event)
        elif isinstance(event, Finished):
            ends[index] = event
        if len(ends) == len(renderers.choices):
            break
        index, event = await anext(rest)
    body = whole_answer(renderers.frame, renderers.choices, tokens, [ends[index] for index in range(len(ends))])
    return Response(body, media_type="application/json", headers=headers)


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
