"""``GET /v1/streams/{request_id}``: the rest of a request's events, from any gateway.

The header ``Last-Event-ID`` names the last event that the client has (an EventSource sends it by itself); without it
the stream comes from its beginning. The events are those of the request's own API, even if it had asked for no stream.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, aclosing

from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from services.gateway.choices import events_of
from services.gateway.disconnect import ClientDisconnected, unless_disconnected
from services.gateway.generation_service import GenerationService
from services.gateway.position import EventId
from services.gateway.renderers import Renderers
from services.gateway.sse import send_stream

logger = logging.getLogger(__name__)
# Where the name of a request's API key lies in its ASGI scope.
KEY_NAME = "infinite_llm.key_name"


class Resumption:
    """The endpoint, an ASGI application: the request's life spans the sending of the answer."""

    def __init__(self, service: GenerationService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_disconnected(receive, self._answer(Request(scope), send))
        except (ClientDisconnected, ClientDisconnect):
            # The generation has been ended on the way out, and there is nobody to tell.
            logger.info("client disconnected")

    async def _answer(self, request: Request, send: Send) -> None:
        service, last = self._service, EventId.parse(request.headers.get("last-event-id", ""))
        request_id, key_name = request.path_params["request_id"], request.scope.get(KEY_NAME, "")
        async with AsyncExitStack() as stack:
            resuming = service.resume(request_id, key_name, last.of_first.position)
            generations = [await stack.enter_async_context(resuming)]
            places = last.of_choices(generations[0].request.choices)
            for index, place in enumerate(places[1:], 1):
                resuming = service.resume_choice(generations[0].request, index, place.position)
                generations.append(await stack.enter_async_context(resuming))
            requests = [generation.request for generation in generations]
            renderers = await Renderers.of(requests, service.checkpoint.name, service.tokenizer)
            events = await stack.enter_async_context(aclosing(events_of(generations)))
            # An error before the first event still gets its own status.
            first = await anext(events)
            await send_stream(first, events, renderers, generations, send, service.resumable, places)
