"""An answer as server-sent events.

Where there is a journal, every event of an answer with one choice has an ``id``, behind which the stream can be resumed
at any gateway.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from starlette.types import Send

from services.core.errors import InfiniteLLMError
from services.gateway.choices import ChoiceEvent
from services.gateway.generation import Generation
from services.gateway.openai_errors import api_error
from services.gateway.position import EventId
from services.gateway.renderers import Renderers
from services.gateway.rendering import usage_chunk
from services.gateway.requests import Finished, NewTokens, PromptLogprobs, Repeated

_DONE = b"[DONE]"


def generation_headers(generations: Sequence[Generation]) -> dict[str, str]:
    return {"x-request-id": generations[0].request.request_id}


async def send_stream(
    first: ChoiceEvent,
    rest: AsyncGenerator[ChoiceEvent, None],
    renderers: Renderers,
    generations: Sequence[Generation],
    send: Send,
    resumable: bool,
    last_chunks: int = 0,
) -> None:
    """Sends a whole ASGI response. An error in the middle becomes an event of its own, and no [DONE] follows it.

    Args:
        last_chunks: how many of the chunks behind the last token the client has.
    """
    headers = generation_headers(generations) | {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
    resumable = resumable and len(generations) == 1

    async def send_event(data: bytes, sent_last_chunks: int = 0) -> None:
        event_id = b""
        if resumable:
            event_id = f"id: {EventId(generations[0].position, sent_last_chunks)}\n".encode()
        await send({"type": "http.response.body", "body": event_id + b"data: " + data + b"\n\n", "more_body": True})

    ends: dict[int, Finished] = {}
    sent_last = 0  # of the chunks behind the last token

    async def send_last(data: bytes) -> None:
        nonlocal sent_last
        sent_last += 1
        if sent_last > last_chunks:
            await send_event(data, sent_last)

    index, event = first
    try:
        while True:
            renderer = renderers.choices[index]
            if isinstance(event, NewTokens):
                await send_event(renderer.tokens_chunk(event))
            elif isinstance(event, PromptLogprobs):
                renderer.take_prompt(event)
            elif isinstance(event, Repeated):
                renderer.tokens_chunk(NewTokens((), event.texts, ()))  # it may write on from what it has written
            elif isinstance(event, Finished):
                ends[index] = event
                await send_last(renderer.last_chunk(event))
            if len(ends) == len(generations):
                break
            index, event = await anext(rest)
        if renderers.frame.asks_for_usage:
            finished = [ends[index] for index in range(len(ends))]
            await send_last(usage_chunk(renderers.frame, renderers.choices, finished))
        await send_last(_DONE)
    except InfiniteLLMError as exc:
        data = api_error(exc).body()
        await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
