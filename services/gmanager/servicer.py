"""The gManager's gRPC interface: protobuf in, ClusterView, protobuf out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc
from services.core.errors import InfiniteLLMError
from services.gmanager.heartbeat_messages import geometry_from_proto
from services.gmanager.messages import (
    instance_to_proto,
    kvdaemon_to_proto,
    move_to_proto,
    planner_to_proto,
    request_to_proto,
)
from services.gmanager.office import Office
from services.gmanager.reception import MemberStream, Reception
from services.runtime.grpc_errors import error_message
from services.runtime.membership import Member

Context = grpc.aio.ServicerContext[Any, Any]


class MembershipSignal:
    """Wakes everyone who waits when the set of members changes."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout_s: float) -> None:
        """Returns after the next ``notify``, or after ``timeout_s``."""
        event = self._event
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return


class GManagerServicer(gmanager_pb2_grpc.GManagerServiceServicer):
    """Serves one ClusterView, in office; heartbeats come in at the reception."""

    def __init__(
        self,
        changed: MembershipSignal,
        watch_interval_s: float,
        office: Office,
        reception: Reception,
    ) -> None:
        self._view = reception.view
        self._planning = reception.planning
        self._clock = reception.clock
        self._reception = reception
        self._changed = changed
        self._watch_interval_s = watch_interval_s
        self._office = office

    async def Heartbeat(
        self, request_iterator: AsyncIterator[gmanager_pb2.HeartbeatRequest], context: Context
    ) -> gmanager_pb2.HeartbeatResponse:
        stream = self._reception.stream()
        try:
            async for message in request_iterator:
                self._office.require()
                relay = stream.take(message)
                if relay is not None:
                    return gmanager_pb2.HeartbeatResponse(relay_address=relay)
        finally:
            stream.end()
        return gmanager_pb2.HeartbeatResponse()

    async def RelayHeartbeats(
        self, request_iterator: AsyncIterator[gmanager_pb2.RelayHeartbeatsRequest], context: Context
    ) -> AsyncIterator[gmanager_pb2.RelayHeartbeatsResponse]:
        streams: dict[int, MemberStream] = {}
        try:
            async for message in request_iterator:
                self._office.require()
                for relayed in message.heartbeats:
                    stream = streams.get(relayed.stream)
                    if stream is None:
                        stream = streams[relayed.stream] = self._reception.stream(message.kvdaemon_id)
                    try:
                        stream.take(relayed.heartbeat)
                    except InfiniteLLMError as error:  # of one member; the others go on
                        streams.pop(relayed.stream).end()
                        yield gmanager_pb2.RelayHeartbeatsResponse(
                            stream=relayed.stream, reason=error.reason, message=error_message(error)
                        )
                for number in message.ended_streams:
                    if number in streams:
                        streams.pop(number).end()
        finally:
            for stream in streams.values():
                stream.end()

    async def FindRoom(self, request: gmanager_pb2.FindRoomRequest, context: Context) -> gmanager_pb2.FindRoomResponse:
        self._office.require()
        geometry = geometry_from_proto(request.geometry)
        rooms = self._view.find_room(
            geometry, request.block_bytes or geometry.block_bytes, frozenset(request.exclude_kvdaemon_ids)
        )
        starving = self._view.oldest_starving(self._clock())
        return gmanager_pb2.FindRoomResponse(
            rooms=[
                gmanager_pb2.Room(
                    kvdaemon_id=room.kvdaemon_id,
                    address=room.address,
                    free_blocks=room.free_blocks,
                    total_blocks=room.total_blocks,
                    wanted=room.wanted,
                )
                for room in rooms
            ],
            oldest_starving=gmanager_pb2.RequestAge(arrival_time=starving.arrival_time, request_id=starving.request_id)
            if starving is not None
            else None,
        )

    async def WatchInstances(
        self, request: gmanager_pb2.WatchInstancesRequest, context: Context
    ) -> AsyncIterator[gmanager_pb2.WatchInstancesResponse]:
        sent = -1
        while True:
            self._office.require()
            if self._view.load_version != sent:
                sent = self._view.load_version
                yield gmanager_pb2.WatchInstancesResponse(
                    instances=[instance_to_proto(info) for info in self._view.instances(self._clock())]
                )
            await self._changed.wait(self._watch_interval_s)

    async def GetClusterView(
        self, request: gmanager_pb2.GetClusterViewRequest, context: Context
    ) -> gmanager_pb2.GetClusterViewResponse:
        self._office.require()
        now = self._clock()
        return gmanager_pb2.GetClusterViewResponse(
            instances=[
                instance_to_proto(info, self._planning.step_error(info.member.member_id))
                for info in self._view.instances(now)
            ],
            kvdaemons=[kvdaemon_to_proto(info) for info in self._view.kvdaemons(now)],
            requests=[request_to_proto(info) for info in self._view.requests()],
            gmanagers=[self._gmanager_to_proto(member) for member in self._view.gmanagers()],
            moves=[move_to_proto(record) for record in self._planning.moves],
            planner=planner_to_proto(self._planning.summary),
        )

    def _gmanager_to_proto(self, member: Member) -> gmanager_pb2.GManagerView:
        leads = member.member_id == self._office.member.member_id and self._office.fencing_token is not None
        return gmanager_pb2.GManagerView(gmanager_id=member.member_id, address=member.address, leads=leads)
