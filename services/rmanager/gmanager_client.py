"""The gManager as instances and KV daemons see it: heartbeats to it, "where is room" from it.

The gManager is a cache and may be away; nothing here is needed to keep a running request alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import grpc
import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.blocks import PoolGeometry
from services.core.errors import UnavailableError
from services.core.placement import Heartbeat, Room, RoomView
from services.core.sequence import RequestAge
from services.rmanager.heartbeat_messages import heartbeat_to_proto
from services.rmanager.pool_messages import geometry_to_proto
from services.runtime.grpc_channel import call_was_given_up, error_from_rpc, make_channel
from services.runtime.tls import MutualTls
from services.runtime.tracing import outgoing_metadata

AddressSource = Callable[[], Awaitable[str | None]]


class HeartbeatStream:
    """One open Heartbeat call. Every method raises an error of the project's tree when the call is over.

    Args:
        address: of the gManager, or of a relay if ``relay``.
    """

    def __init__(self, address: str, tls: MutualTls | None = None, relay: bool = False) -> None:
        self._channel = make_channel(address, "kvdaemon" if relay else "gmanager", tls)
        stubs = gmanager_pb2_grpc.HeartbeatRelayServiceStub if relay else gmanager_pb2_grpc.GManagerServiceStub
        self._call = stubs(self._channel).Heartbeat()

    async def send(self, heartbeat: Heartbeat, timeout_s: float) -> None:
        """Sends one heartbeat; where nobody takes it for ``timeout_s``, the other side counts as away."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._call.write(heartbeat_to_proto(heartbeat))
        except grpc.aio.AioRpcError as exc:
            raise error_from_rpc(exc) from exc
        except asyncio.InvalidStateError:
            return  # it is over: ``sent_to`` says why
        except TimeoutError as exc:
            raise UnavailableError(f"nobody took a heartbeat for {timeout_s:g} s") from exc

    async def sent_to(self) -> str | None:
        """Address of the relay that the gManager ended the stream with; None while the stream is open."""
        if not self._call.done():
            return None
        try:
            response = await self._call
        except grpc.aio.AioRpcError as exc:
            raise error_from_rpc(exc) from exc
        if not response.relay_address:
            raise UnavailableError("the other side ended the heartbeat stream")
        return response.relay_address

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()


class GManagerClient:
    """Unary questions to whoever is gManager now; the channel is kept until the address changes or a call fails."""

    def __init__(self, address_of_gmanager: AddressSource, tls: MutualTls | None = None) -> None:
        self._tls = tls
        self._address_of_gmanager = address_of_gmanager
        self._address: str | None = None
        self._channel: grpc.aio.Channel | None = None

    async def find_room(
        self, geometry: PoolGeometry, exclude: Collection[str] = (), timeout_s: float = 2.0
    ) -> RoomView:
        """Daemons that can hold blocks of this geometry, emptiest first; a hint, not a reservation.

        Args:
            exclude: ids of daemons that are not wanted in the answer.
        Raises: UnavailableError where there is no gManager or it does not answer in time.
        """
        request = gmanager_pb2.FindRoomRequest(
            geometry=geometry_to_proto(geometry), block_bytes=geometry.block_bytes, exclude_kvdaemon_ids=list(exclude)
        )
        try:
            async with asyncio.timeout(timeout_s):
                stub = gmanager_pb2_grpc.GManagerServiceStub(await self._connected())
                response = await stub.FindRoom(request, timeout=timeout_s, metadata=outgoing_metadata())
        except grpc.aio.AioRpcError as exc:
            await self.close()
            raise error_from_rpc(exc) from exc
        except TimeoutError as exc:
            await self.close()
            raise UnavailableError(f"the gManager did not say within {timeout_s:g} s where room is") from exc
        except asyncio.CancelledError:
            if call_was_given_up():  # another question failed, and closed the channel that all share
                raise UnavailableError("the connection to the gManager was given up") from None
            raise
        rooms = (
            Room(room.kvdaemon_id, room.address, room.free_blocks, room.total_blocks, room.wanted)
            for room in response.rooms
        )
        starving = response.oldest_starving if response.HasField("oldest_starving") else None
        return RoomView(tuple(rooms), starving and RequestAge(starving.arrival_time, starving.request_id))

    async def close(self) -> None:
        channel, self._channel, self._address = self._channel, None, None
        if channel is not None:
            await channel.close()

    async def _connected(self) -> grpc.aio.Channel:
        address = await self._address_of_gmanager()
        if address is None:
            raise UnavailableError("no gManager is known; is one registered in etcd?")
        if self._channel is None or address != self._address:
            await self.close()
            self._address, self._channel = address, make_channel(address, "gmanager", self._tls)
        return self._channel
