"""The servicer's protobuf: heartbeats in, views out."""

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
    PeerTransport,
    PlacementEntry,
    Report,
    RunningRequest,
    Timings,
    WaitingRequest,
)
from services.core.sequence import RequestAge
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gmanager.move_book import MoveRecord
from services.gmanager.planning import PlanSummary
from services.gmanager.view import InstanceInfo, KvDaemonInfo, RequestInfo
from services.rmanager.gmanager_client import stats_from_proto, stats_to_proto


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
    starving = report.oldest_starving
    return InstanceReport(
        running=report.running_requests,
        waiting=report.waiting_requests,
        placement=tuple(
            PlacementEntry(entry.request_id, entry.kvdaemon_id, entry.num_blocks, entry.local)
            for entry in report.placement
        ),
        ended=tuple(report.ended_request_ids),
        oldest_starving=RequestAge(starving.arrival_time, starving.request_id)
        if report.HasField("oldest_starving")
        else None,
        max_running=report.max_running,
        progress=tuple(
            RunningRequest(entry.request_id, entry.arrival_time, entry.context_tokens, entry.final_tokens)
            for entry in report.progress
        ),
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


def instance_to_proto(info: InstanceInfo, step_error: float | None = None) -> gmanager_pb2.InstanceView:
    hint = info.hint
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
        hint=None if hint is None else gmanager_pb2.AdmissionHint(room_tokens=hint.room_tokens, gain=hint.gain),
        step_error=step_error,
        transports=[
            gmanager_pb2.PeerTransport(kvdaemon_id=kvdaemon_id, transport=transport)
            for kvdaemon_id, transport in info.transports
        ],
    )


def kvdaemon_to_proto(info: KvDaemonInfo) -> gmanager_pb2.KvDaemonView:
    view = gmanager_pb2.KvDaemonView(
        kvdaemon_id=info.member.member_id, address=info.member.address, heartbeat_age_s=info.heartbeat_age_s
    )
    if info.stats is not None:
        view.stats.CopyFrom(stats_to_proto(info.stats))
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


def move_to_proto(record: MoveRecord) -> gmanager_pb2.MoveView:
    move = record.move
    return gmanager_pb2.MoveView(
        move_id=record.move_id,
        request_id=move.request_id,
        instance_id=move.debtor,
        source_kvdaemon_id=move.source,
        destination_kvdaemon_id=move.creditor,
        kind=move.kind,
        planned_blocks=move.blocks,
        moved_blocks=record.moved_blocks,
        state=record.state,
        seconds=record.seconds,
        predicted_gain=move.gain,
        measured_gain=record.measured_gain,
        reason=move.reason,
    )


def planner_to_proto(summary: PlanSummary | None) -> gmanager_pb2.PlannerView | None:
    if summary is None:
        return None
    return gmanager_pb2.PlannerView(
        plans=summary.plans,
        throughput=summary.throughput,
        planned_throughput=summary.planned_throughput,
        unmet=summary.unmet,
    )
