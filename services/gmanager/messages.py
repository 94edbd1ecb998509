"""The servicer's protobuf: views out."""

from __future__ import annotations

from infinitellm.internal.v1 import gmanager_pb2
from services.gmanager.move_book import MoveRecord
from services.gmanager.planning import PlanSummary
from services.gmanager.view import InstanceInfo, KvDaemonInfo, RequestInfo
from services.rmanager.pool_messages import stats_to_proto


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
