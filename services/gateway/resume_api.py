"""``GET /v1/streams/{request_id}``: the rest of a request's events, from any gateway.

The header ``Last-Event-ID`` names the last event that the client has (an EventSource sends it by itself); without it
the stream comes from its beginning. The events are those of the request's own API, even if it had asked for no stream.
"""

from __future__ import annotations

import logging
from contextlib import aclosing

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
        last = EventId.parse(request.headers.get("last-event-id", ""))
        async with (
            self._service.resume(
                request.path_params["request_id"], request.scope.get(KEY_NAME, ""), last.position
            ) as generation,
            aclosing(events_of([generation])) as events,
        ):
            service = self._service
            renderers = await Renderers.of([generation.request], service.checkpoint.name, service.tokenizer)
            # An error before the first event still gets its own status.
            first = await anext(events)
            await send_stream(first, events, renderers, [generation], send, service.resumable, last.last_chunks)
