"""A generation as server-sent events.

Where there is a journal, every event has an ``id``, behind which the stream can be resumed at any gateway.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.types import Send

from services.core.errors import InfiniteLLMError
from services.gateway.generation import Generation
from services.gateway.openai_errors import api_error
from services.gateway.position import EventId
from services.gateway.rendering import Renderer
from services.gateway.requests import Event, Finished, NewTokens, Repeated

_DONE = b"[DONE]"


def generation_headers(generation: Generation) -> dict[str, str]:
    return {"x-request-id": generation.request.request_id}


async def send_stream(
    first: Event,
    rest: AsyncGenerator[Event, None],
    renderer: Renderer,
    generation: Generation,
    send: Send,
    resumable: bool,
    last_chunks: int = 0,
) -> None:
    """Sends a whole ASGI response. An error in the middle becomes an event of its own, and no [DONE] follows it.

    Args:
        last_chunks: how many of the chunks behind the last token the client has.
    """
    headers = generation_headers(generation) | {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})

    async def send_event(data: bytes, sent_last_chunks: int = 0) -> None:
        event_id = f"id: {EventId(generation.position, sent_last_chunks)}\n".encode() if resumable else b""
        await send({"type": "http.response.body", "body": event_id + b"data: " + data + b"\n\n", "more_body": True})

    event = first
    try:
        while not isinstance(event, Finished):
            if isinstance(event, NewTokens):
                await send_event(renderer.tokens_chunk(event))
            elif isinstance(event, Repeated):
                renderer.tokens_chunk(NewTokens((), event.texts, ()))  # it may write on from what it has written
            event = await anext(rest)
        for number, chunk in enumerate([*renderer.last_chunks(event), _DONE], 1):
            if number > last_chunks:
                await send_event(chunk, number)
    except InfiniteLLMError as exc:
        data = api_error(exc).body()
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
