"""Takes other processes' heartbeats to the gManager, many in one message.

Every KV daemon serves this; the gManager names it to some processes where there are many (gmanager/relays.py).
Heartbeats are passed on in their order and not looked at. What a relay cannot deliver it does not keep: when the
gManager is lost to it, or another one leads, it ends all streams, and their senders begin anew with full reports.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import InfiniteLLMError, NotLeaderError, UnavailableError, all_errors
from services.rmanager.gmanager_locator import GManagerLocation
from services.runtime.cancelling import cancel
from services.runtime.grpc_channel import error_from_rpc, make_channel
from services.runtime.tls import MutualTls

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class HeartbeatRelay(gmanager_pb2_grpc.HeartbeatRelayServiceServicer):
    """The relay of one KV daemon.

    Args:
        location: of the gManager.
        interval_s: between two messages to it.
        send_timeout_s: a gManager that takes no message for so long is lost.
        tls: the daemon's own identity.
    """

    def __init__(
        self,
        kvdaemon_id: str,
        location: GManagerLocation,
        interval_s: float = 0.25,
        tls: MutualTls | None = None,
        send_timeout_s: float = 5.0,
    ) -> None:
        self._kvdaemon_id = kvdaemon_id
        self._location = location
        self._interval_s = interval_s
        self._tls = tls
        self._send_timeout_s = send_timeout_s
        self._numbers = itertools.count()
        self._open: set[int] = set()
        self._to_end: dict[int, InfiniteLLMError] = {}  # of the open streams
        self._next = self._empty()
        self._wanted = asyncio.Event()
        self._alone = False  # the gManager has been lost since a message got through
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to pass on. Call once, on the event loop."""
        assert self._task is None
        self._task = asyncio.create_task(self._run(), name="heartbeat relay")

    async def close(self) -> None:
        """Stops passing on; whoever sends afterwards is told that the gManager is lost."""
        if self._task is not None:
            await cancel([self._task])
        self._end_all(UnavailableError("this relay has stopped"))

    async def Heartbeat(
        self, request_iterator: AsyncIterator[gmanager_pb2.HeartbeatRequest], context: Context
    ) -> gmanager_pb2.HeartbeatResponse:
        number = next(self._numbers)
        self._open.add(number)
        self._wanted.set()
        try:
            async for heartbeat in request_iterator:
                error = self._to_end.get(number)
                if error is not None:
                    raise error
                self._next.heartbeats.add(stream=number, heartbeat=heartbeat)
        finally:
            self._open.discard(number)
            self._to_end.pop(number, None)
            self._next.ended_streams.append(number)
        return gmanager_pb2.HeartbeatResponse()

    async def _run(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                await self._pass_on()
            except Exception as exc:
                if not self._alone:
                    expected = isinstance(exc, InfiniteLLMError)
                    logger.warning("the gManager is lost to the relay: %s", exc, exc_info=not expected)
                self._alone = True
                self._end_all(NotLeaderError(f"the relay {self._kvdaemon_id} lost the gManager: {exc}"))
                await asyncio.sleep(self._interval_s)

    async def _pass_on(self) -> None:
        """One call to the gManager, until nobody sends by way of this relay any more."""
        address = await self._location.address()
        if address is None:
            raise UnavailableError("no gManager is known")
        async with make_channel(address, "gmanager", self._tls) as channel:
            call = gmanager_pb2_grpc.GManagerServiceStub(channel).RelayHeartbeats()
            answers = asyncio.create_task(self._take_answers(call), name="heartbeat relay's answers")
            try:
                while self._open or self._next.ended_streams:
                    if await self._location.address() != address:
                        raise UnavailableError("another gManager leads")
                    if answers.done():
                        answers.result()
                        raise UnavailableError("it ended the call")
                    message, self._next = self._next, self._empty()
                    if message.heartbeats or message.ended_streams:
                        async with asyncio.timeout(self._send_timeout_s):
                            await call.write(message)
                        self._alone = False
                    await asyncio.sleep(self._interval_s)
                self._wanted.clear()
            except grpc.aio.AioRpcError as exc:
                raise error_from_rpc(exc) from exc
            except asyncio.InvalidStateError as exc:
                raise UnavailableError("the call is over") from exc
            except TimeoutError as exc:
                raise UnavailableError(f"it took no message for {self._send_timeout_s:g} s") from exc
            finally:
                await cancel([answers])
                call.cancel()

    async def _take_answers(self, call: Any) -> None:
        try:
            async for answer in call:
                if answer.stream in self._open:
                    kind = all_errors().get(answer.reason, InfiniteLLMError)
                    # Of a stream that was ended already, the first answer says why.
                    self._to_end.setdefault(answer.stream, kind(answer.message))
        except grpc.aio.AioRpcError as exc:
            raise error_from_rpc(exc) from exc

    def _end_all(self, why: InfiniteLLMError) -> None:
        """Ends each stream with its next heartbeat."""
        self._next = self._empty()
        for number in self._open:
            self._to_end.setdefault(number, why)

    def _empty(self) -> gmanager_pb2.RelayHeartbeatsRequest:
        return gmanager_pb2.RelayHeartbeatsRequest(kvdaemon_id=self._kvdaemon_id)
