"""An answer as server-sent events.

Where there is a journal, every event has an ``id``, behind which the stream can be resumed at any gateway. Only those
who ask for ``text/event-stream`` by name get them: OpenAI's events are one line of data each, and some of its clients
take whatever else stands there for data, too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

from starlette.datastructures import Headers
from starlette.types import Scope, Send

from services.core.errors import InfiniteLLMError
from services.gateway.choices import ChoiceEvent
from services.gateway.generation import Generation
from services.gateway.openai_errors import api_error
from services.gateway.position import Place
from services.gateway.renderers import Renderers
from services.gateway.rendering import usage_chunk
from services.gateway.requests import Finished, NewTokens, PromptLogprobs, Repeated

_DONE = b"[DONE]"


def generation_headers(generations: Sequence[Generation]) -> dict[str, str]:
    return {"x-request-id": generations[0].request.request_id}


class _Stream:
    """Events on their way to one client.

    Args:
        places: what the client has of each choice.
        has_ids: whether the events have ids.
    """

    def __init__(self, send: Send, places: Sequence[Place], has_ids: bool) -> None:
        self._send_message = send
        self._places = list(places)
        self._id_parts = [str(place) for place in places]
        self._has_ids = has_ids
        self._last_chunks = [0] * len(places)  # of each choice, whether the client had them before or not

    async def send_tokens(self, index: int, ids: Sequence[int], data: bytes) -> None:
        """A chunk with the next tokens of one choice."""
        if self._has_ids:
            place = self._places[index]
            self._move(index, replace(place, position=place.position.after(ids)))
        await self._send_event(data)

    async def send_last(self, indices: Sequence[int], data: bytes) -> None:
        """A chunk behind the last token of these choices, unless the client has it."""
        for index in indices:
            self._last_chunks[index] += 1
        if self._last_chunks[indices[0]] > self._places[indices[0]].last_chunks:
            for index in indices:
                self._move(index, replace(self._places[index], last_chunks=self._last_chunks[index]))
            await self._send_event(data)

    async def send_error(self, error: InfiniteLLMError) -> None:
        await self._send(b"data: " + api_error(error).body() + b"\n\n")

    def _move(self, index: int, place: Place) -> None:
        self._places[index], self._id_parts[index] = place, str(place)

    async def _send_event(self, data: bytes) -> None:
        event_id = f"id: {'.'.join(self._id_parts)}\n".encode() if self._has_ids else b""
        await self._send(event_id + b"data: " + data + b"\n\n")

    async def _send(self, body: bytes) -> None:
        await self._send_message({"type": "http.response.body", "body": body, "more_body": True})


def asks_for_ids(scope: Scope) -> bool:
    """Whether a request's Accept header names ``text/event-stream``."""
    return any("text/event-stream" in value for value in Headers(scope=scope).getlist("accept"))


async def send_stream(
    first: ChoiceEvent,
    rest: AsyncGenerator[ChoiceEvent, None],
    renderers: Renderers,
    generations: Sequence[Generation],
    send: Send,
    has_ids: bool,
    places: Sequence[Place],
) -> None:
    """Sends a whole ASGI response. An error in the middle becomes an event of its own, and no [DONE] follows it.

    Args:
        has_ids: whether the events have ids.
        places: what the client has of each choice.
    """
    headers = generation_headers(generations) | {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-cache",
        "x-accel-buffering": "no",
    }
    raw_headers = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw_headers})
    stream = _Stream(send, places, has_ids)
    ends: dict[int, Finished] = {}
    index, event = first
    try:
        while True:
            renderer = renderers.choices[index]
            if isinstance(event, NewTokens):
                await stream.send_tokens(index, event.ids, renderer.tokens_chunk(event))
            elif isinstance(event, PromptLogprobs):
                renderer.take_prompt(event)
            elif isinstance(event, Repeated):
                renderer.tokens_chunk(NewTokens((), event.texts, ()))  # it may write on from what it has written
            elif isinstance(event, Finished):
                ends[index] = event
                await stream.send_last([index], renderer.last_chunk(event))
            if len(ends) == len(generations):
                break
            index, event = await anext(rest)
        everybody = range(len(generations))
        if renderers.frame.asks_for_usage:
            finished = [ends[index] for index in everybody]
            await stream.send_last(everybody, usage_chunk(renderers.frame, renderers.choices, finished))
        await stream.send_last(everybody, _DONE)
    except InfiniteLLMError as exc:
        await stream.send_error(exc)
    await send({"type": "http.response.body", "body": b"", "more_body": False})
