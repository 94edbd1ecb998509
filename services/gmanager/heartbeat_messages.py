"""Heartbeats, from protobuf; ``rmanager/heartbeat_messages.py`` is the other side."""

from __future__ import annotations

import functools

from infinitellm.internal.v1 import gmanager_pb2, pool_pb2
from services.core.blocks import PoolGeometry
from services.core.errors import ConfigError, InvalidRequestError
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    MoveEnd,
    MoveReport,
    NamedKvDaemon,
    NamedRequest,
    PeerTransport,
    PlacementColumns,
    ProgressColumns,
    Report,
    Timings,
    WaitingRequest,
)
from services.core.sequence import RequestAge
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.rmanager.pool_messages import stats_from_proto


def heartbeat_from_proto(message: gmanager_pb2.HeartbeatRequest) -> Heartbeat:
    """
    Raises:
        InvalidRequestError: a value that cannot be.
    """
    kind = message.WhichOneof("report")
    report: Report | None = None
    if kind == "instance":
        report = _instance_report(message.instance)
    elif kind == "kvdaemon":
        pool = message.kvdaemon
        geometry = geometry_from_proto(pool.geometry) if pool.HasField("geometry") else None
        report = KvDaemonReport(stats_from_proto(pool.stats), geometry)
    timings, lost_relay = _timings(message), message.lost_relay_address
    return Heartbeat(message.member, message.sequence, message.full, report, timings, lost_relay)


def geometry_from_proto(geometry: pool_pb2.PoolGeometry) -> PoolGeometry:
    """
    Raises:
        InvalidRequestError: no pool has this shape.
    """
    try:
        return _geometry(geometry.layers, geometry.kv_heads, geometry.block_tokens, geometry.head_dim, geometry.dtype)
    except ConfigError as exc:
        raise InvalidRequestError(str(exc)) from exc


# Every daemon's every report has one, and all of a cluster are the same few.
_geometry = functools.lru_cache(maxsize=64)(PoolGeometry)


def _instance_report(report: gmanager_pb2.InstanceReport) -> InstanceReport:
    starving, placement, progress = report.oldest_starving, report.placement, report.progress
    return InstanceReport(
        running=report.running_requests,
        waiting=report.waiting_requests,
        requests=tuple(
            NamedRequest(named.number, named.request_id, named.arrival_time, named.final_tokens)
            for named in report.requests
        ),
        kvdaemons=tuple(NamedKvDaemon(named.number, named.kvdaemon_id, named.local) for named in report.kvdaemons),
        placement=PlacementColumns(tuple(placement.requests), tuple(placement.kvdaemons), tuple(placement.num_blocks)),
        progress=ProgressColumns(tuple(progress.requests), tuple(progress.context_tokens)),
        ended=tuple(report.ended_requests),
        oldest_starving=RequestAge(starving.arrival_time, starving.request_id)
        if report.HasField("oldest_starving")
        else None,
        max_running=report.max_running,
        moves=tuple(_move(move) for move in report.moves),
        queue=tuple(WaitingRequest(entry.context_tokens, entry.remaining_tokens) for entry in report.queue.requests)
        if report.HasField("queue")
        else None,
        transports=tuple(PeerTransport(peer.kvdaemon_id, peer.transport) for peer in report.transports.peers)
        if report.HasField("transports")
        else None,
    )


def _move(move: gmanager_pb2.MoveReport) -> MoveReport:
    try:
        end = MoveEnd(move.end)
    except ValueError as exc:
        raise InvalidRequestError(f"a move cannot end as {move.end!r}") from exc
    return MoveReport(
        move.move_id,
        move.request_id,
        move.source_kvdaemon_id,
        move.destination_kvdaemon_id,
        move.moved_blocks,
        move.seconds,
        end,
    )


def _timings(message: gmanager_pb2.HeartbeatRequest) -> Timings:
    if message.HasField("hosting"):
        hosting = message.hosting
        return (HostingTiming(hosting.messages, hosting.context_tokens, hosting.compute_s),)
    return tuple(
        StepTiming(
            step.batch_tokens,
            step.prefill_tokens,
            step.local_context_tokens,
            step.step_s,
            step.attention_s,
            step.local_attention_s,
            tuple(
                RemoteTiming(part.kvdaemon_id, part.messages, part.rows, part.context_tokens, part.answer_s, part.late)
                for part in step.remotes
            ),
            step.steps,
        )
        for step in message.steps
    )
