"""The gManager's gRPC interface: protobuf in, ClusterView, protobuf out."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc, pool_pb2
from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, InvalidRequestError, ResyncRequiredError
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    PlacementEntry,
    PoolStats,
    Report,
)
from services.core.sequence import RequestAge
from services.gmanager.view import ClusterView, InstanceInfo, KvDaemonInfo, RequestInfo

logger = logging.getLogger(__name__)

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
    """Serves one ClusterView. ``clock`` answers monotonic seconds, the ``now`` of the view."""

    def __init__(
        self, view: ClusterView, changed: MembershipSignal, clock: Callable[[], float], watch_interval_s: float
    ) -> None:
        self._view = view
        self._changed = changed
        self._clock = clock
        self._watch_interval_s = watch_interval_s
        self._streams = itertools.count()

    async def Heartbeat(
        self, request_iterator: AsyncIterator[gmanager_pb2.HeartbeatRequest], context: Context
    ) -> gmanager_pb2.HeartbeatResponse:
        stream = next(self._streams)
        member = ""
        try:
            async for message in request_iterator:
                if not member:
                    if message.WhichOneof("report") != message.member.partition("/")[0]:
                        raise ResyncRequiredError(
                            f"the first heartbeat of {message.member!r} must be a full report of its own kind"
                        )
                    member = message.member
                    logger.info("heartbeats begin", extra={"reporter": member})
                elif message.member != member:
                    raise InvalidRequestError(f"a heartbeat of {message.member!r} in the stream of {member!r}")
                self._view.apply(stream, heartbeat_from_proto(message), self._clock())
        finally:
            if member:
                self._view.stream_ended(member, stream)
                logger.info("heartbeats end", extra={"reporter": member})
        return gmanager_pb2.HeartbeatResponse()

    async def FindRoom(self, request: gmanager_pb2.FindRoomRequest, context: Context) -> gmanager_pb2.FindRoomResponse:
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
            if self._view.load_version != sent:
                sent = self._view.load_version
                yield gmanager_pb2.WatchInstancesResponse(
                    instances=[instance_to_proto(info) for info in self._view.instances(self._clock())]
                )
            await self._changed.wait(self._watch_interval_s)

    async def GetClusterView(
        self, request: gmanager_pb2.GetClusterViewRequest, context: Context
    ) -> gmanager_pb2.GetClusterViewResponse:
        now = self._clock()
        return gmanager_pb2.GetClusterViewResponse(
            instances=[instance_to_proto(info) for info in self._view.instances(now)],
            kvdaemons=[kvdaemon_to_proto(info) for info in self._view.kvdaemons(now)],
            requests=[request_to_proto(info) for info in self._view.requests()],
        )


def heartbeat_from_proto(message: gmanager_pb2.HeartbeatRequest) -> Heartbeat:
    kind = message.WhichOneof("report")
    report: Report | None = None
    if kind == "instance":
        report = InstanceReport(
            running=message.instance.running_requests,
            waiting=message.instance.waiting_requests,
            placement=tuple(
                PlacementEntry(entry.request_id, entry.kvdaemon_id, entry.num_blocks, entry.local)
                for entry in message.instance.placement
            ),
            ended=tuple(message.instance.ended_request_ids),
            oldest_starving=RequestAge(
                message.instance.oldest_starving.arrival_time, message.instance.oldest_starving.request_id
            )
            if message.instance.HasField("oldest_starving")
            else None,
        )
    elif kind == "kvdaemon":
        stats = message.kvdaemon.stats
        report = KvDaemonReport(
            PoolStats(
                pool_bytes=stats.pool_bytes,
                block_bytes=stats.block_bytes,
                total=stats.total,
                free=stats.free,
                cached=stats.cached,
                workspace=stats.workspace,
                reserved=stats.reserved,
                in_use=stats.in_use,
            ),
            geometry_from_proto(message.kvdaemon.geometry) if message.kvdaemon.HasField("geometry") else None,
        )
    return Heartbeat(message.member, message.sequence, message.full, report)


def geometry_from_proto(geometry: pool_pb2.PoolGeometry) -> PoolGeometry:
    try:
        return PoolGeometry(
            geometry.layers, geometry.kv_heads, geometry.block_tokens, geometry.head_dim, geometry.dtype
        )
    except ConfigError as exc:
        raise InvalidRequestError(str(exc)) from exc


def instance_to_proto(info: InstanceInfo) -> gmanager_pb2.InstanceView:
    return gmanager_pb2.InstanceView(
        instance_id=info.member.member_id,
        address=info.member.address,
        model=info.member.model,
        max_model_len=info.member.max_model_len,
        local_kvdaemon_id=info.member.local_kvdaemon_id,
        running_requests=info.running,
        waiting_requests=info.waiting,
        local_free_blocks=info.local_free_blocks,
        heartbeat_age_s=info.heartbeat_age_s,
    )


def kvdaemon_to_proto(info: KvDaemonInfo) -> gmanager_pb2.KvDaemonView:
    view = gmanager_pb2.KvDaemonView(
        kvdaemon_id=info.member.member_id, address=info.member.address, heartbeat_age_s=info.heartbeat_age_s
    )
    if info.stats is not None:
        view.stats.CopyFrom(
            pool_pb2.PoolStats(
                pool_bytes=info.stats.pool_bytes,
                block_bytes=info.stats.block_bytes,
                total=info.stats.total,
                free=info.stats.free,
                cached=info.stats.cached,
                workspace=info.stats.workspace,
                reserved=info.stats.reserved,
                in_use=info.stats.in_use,
            )
        )
    return view


def request_to_proto(info: RequestInfo) -> gmanager_pb2.RequestView:
    return gmanager_pb2.RequestView(
        request_id=info.request_id,
        instance_id=info.instance_id,
        placement=[
            gmanager_pb2.RequestPlacementEntry(
                request_id=entry.request_id,
                kvdaemon_id=entry.kvdaemon_id,
                num_blocks=entry.num_blocks,
                local=entry.local,
            )
            for entry in info.placement
        ],
    )
