"""Heartbeats, to protobuf; ``gmanager/heartbeat_messages.py`` is the other side."""

from __future__ import annotations

from infinitellm.internal.v1 import gmanager_pb2
from services.core.placement import Heartbeat, InstanceReport, KvDaemonReport
from services.core.timings import HostingTiming, StepTiming
from services.rmanager.pool_messages import geometry_to_proto, stats_to_proto


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
    for number, request_id, arrival_time, final_tokens in report.requests:
        message.requests.add(number=number, request_id=request_id, arrival_time=arrival_time, final_tokens=final_tokens)
    for number, kvdaemon_id, local in report.kvdaemons:
        message.kvdaemons.add(number=number, kvdaemon_id=kvdaemon_id, local=local)
    if report.placement.requests:
        message.placement.requests.extend(report.placement.requests)
        message.placement.kvdaemons.extend(report.placement.kvdaemons)
        message.placement.num_blocks.extend(report.placement.num_blocks)
    if report.progress.requests:
        message.progress.requests.extend(report.progress.requests)
        message.progress.context_tokens.extend(report.progress.context_tokens)
    message.ended_requests.extend(report.ended)
    if report.oldest_starving is not None:
        message.oldest_starving.arrival_time = report.oldest_starving.arrival_time
        message.oldest_starving.request_id = report.oldest_starving.request_id
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
