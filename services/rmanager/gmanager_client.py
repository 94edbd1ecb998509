"""The gManager as instances and KV daemons see it: heartbeats to it, "where is room" from it.

The gManager is a cache and may be away; nothing here is needed to keep a running request alive.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection

import grpc
import grpc.aio

from infinitellm.internal.v1 import gmanager_pb2, gmanager_pb2_grpc, pool_pb2
from services.core.blocks import PoolGeometry
from services.core.errors import UnavailableError
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    PoolStats,
    Room,
    RoomView,
)
from services.core.sequence import RequestAge
from services.core.timings import HostingTiming, StepTiming
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


def heartbeat_to_proto(heartbeat: Heartbeat) -> gmanager_pb2.HeartbeatRequest:
    message = gmanager_pb2.HeartbeatRequest(
        member=heartbeat.member,
        sequence=heartbeat.sequence,
        full=heartbeat.full,
        lost_relay_address=heartbeat.lost_relay,
    )
    report = heartbeat.report
    if isinstance(report, InstanceReport):
        _write_instance_report(message.instance, report)
    elif isinstance(report, KvDaemonReport):
        message.kvdaemon.stats.CopyFrom(stats_to_proto(report.stats))
        if report.geometry is not None:
            message.kvdaemon.geometry.CopyFrom(geometry_to_proto(report.geometry))
    for timing in heartbeat.timings:
        if isinstance(timing, StepTiming):
            _write_step(message.steps.add(), timing)
        else:
            _write_hosting(message.hosting, timing)
    return message


def _write_instance_report(message: gmanager_pb2.InstanceReport, report: InstanceReport) -> None:
    message.running_requests = report.running
    message.waiting_requests = report.waiting
    message.max_running = report.max_running
    for entry in report.placement:
        message.placement.add(
            request_id=entry.request_id,
            kvdaemon_id=entry.kvdaemon_id,
            num_blocks=entry.num_blocks,
            local=entry.local,
        )
    message.ended_request_ids.extend(report.ended)
    if report.oldest_starving is not None:
        message.oldest_starving.arrival_time = report.oldest_starving.arrival_time
        message.oldest_starving.request_id = report.oldest_starving.request_id
    for progress in report.progress:
        message.progress.add(
            request_id=progress.request_id,
            arrival_time=progress.arrival_time,
            context_tokens=progress.context_tokens,
            final_tokens=progress.final_tokens,
        )
    for move in report.moves:
        message.moves.add(
            move_id=move.move_id,
            request_id=move.request_id,
            source_kvdaemon_id=move.source_kvdaemon_id,
            destination_kvdaemon_id=move.destination_kvdaemon_id,
            moved_blocks=move.moved_blocks,
            seconds=move.seconds,
            end=move.end,
        )
    if report.queue is not None:
        message.queue.SetInParent()  # present, even if empty
        for waiting in report.queue:
            message.queue.requests.add(context_tokens=waiting.context_tokens, remaining_tokens=waiting.remaining_tokens)
    if report.transports is not None:
        message.transports.SetInParent()
        for kvdaemon_id, transport in report.transports:
            message.transports.peers.add(kvdaemon_id=kvdaemon_id, transport=transport)


def _write_step(message: gmanager_pb2.StepTiming, timing: StepTiming) -> None:
    message.steps = timing.steps
    message.batch_tokens = timing.batch_tokens
    message.prefill_tokens = timing.prefill_tokens
    message.local_context_tokens = timing.local_context_tokens
    message.step_s = timing.step_s
    message.attention_s = timing.attention_s
    message.local_attention_s = timing.local_attention_s
    for part in timing.remotes:
        message.remotes.add(
            kvdaemon_id=part.kvdaemon_id,
            messages=part.messages,
            rows=part.rows,
            context_tokens=part.context_tokens,
            answer_s=part.answer_s,
            late=part.late,
        )


def _write_hosting(message: gmanager_pb2.HostingTiming, timing: HostingTiming) -> None:
    message.messages = timing.messages
    message.context_tokens = timing.context_tokens
    message.compute_s = timing.compute_s


def geometry_to_proto(geometry: PoolGeometry) -> pool_pb2.PoolGeometry:
    return pool_pb2.PoolGeometry(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        block_tokens=geometry.block_tokens,
        head_dim=geometry.head_dim,
        dtype=geometry.dtype,
    )


def stats_from_proto(stats: pool_pb2.PoolStats) -> PoolStats:
    return PoolStats(
        stats.pool_bytes,
        stats.block_bytes,
        stats.total,
        stats.free,
        stats.cached,
        stats.workspace,
        stats.reserved,
        stats.in_use,
    )


def stats_to_proto(stats: PoolStats) -> pool_pb2.PoolStats:
    return pool_pb2.PoolStats(
        pool_bytes=stats.pool_bytes,
        block_bytes=stats.block_bytes,
        total=stats.total,
        free=stats.free,
        cached=stats.cached,
        workspace=stats.workspace,
        reserved=stats.reserved,
        in_use=stats.in_use,
    )
