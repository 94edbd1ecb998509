"""What the planner is told, made from what heartbeats say. Pure.

Gaps are filled here. An instance that has not computed yet is taken to be as fast as another one of the same model; if
there is none, it is left alone. A daemon that has not computed for anybody is as fast as its instance, or, without one,
as any instance. And a pool that nobody has formatted counts as one of the cluster's geometry, if there is only one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from services.core.blocks import PoolGeometry
from services.core.placement import KvDaemonReport
from services.gmanager.cost_model import DaemonCosts, InstanceCosts
from services.gmanager.learning import GUESSED_DAEMON, GUESSED_INSTANCE, KnownCosts, like_instance
from services.gmanager.planner.load import (
    ClusterLoad,
    DaemonLoad,
    InstanceLoad,
    RemoteShare,
    RequestLoad,
    WaitingLoad,
)
from services.gmanager.planner.plan import Move, apply
from services.gmanager.view import InstanceFacts, KvDaemonFacts, room_in


def cluster_geometry(kvdaemons: Iterable[KvDaemonFacts]) -> PoolGeometry | None:
    """The geometry of all formatted pools; None where there are several, or none."""
    found = {facts.report.geometry for facts in kvdaemons if facts.report is not None and facts.report.geometry}
    return found.pop() if len(found) == 1 else None


def make_load(
    instances: Sequence[InstanceFacts],
    kvdaemons: Sequence[KvDaemonFacts],
    known: KnownCosts,
    moved_at: Mapping[str, float],
) -> ClusterLoad:
    """The cluster without regard to moves under way.

    Args:
        known: what has been learned.
        moved_at: by request id, when blocks of it were moved last, or were to be.
    """
    costs = _instance_costs(instances, known)
    owners = {facts.member.local_kvdaemon_id: facts.member.member_id for facts in instances}
    only = cluster_geometry(kvdaemons)
    daemons = []
    for facts in kvdaemons:
        geometry = None if facts.report is None else facts.report.geometry or only
        if facts.report is not None and geometry is not None:
            alike = costs.get(owners.get(facts.member.member_id, "")) or next(iter(costs.values()), None)
            guess = GUESSED_DAEMON if alike is None else like_instance(alike, geometry.layers)
            daemons.append(_daemon(facts, facts.report, geometry, known.kvdaemons.get(facts.member.member_id, guess)))
    sizes = {daemon.kvdaemon_id: daemon.geometry.block_tokens for daemon in daemons}
    return ClusterLoad(
        tuple(
            _instance(facts, costs.get(facts.member.member_id), sizes[facts.member.local_kvdaemon_id], moved_at)
            for facts in instances
            if facts.member.local_kvdaemon_id in sizes
        ),
        tuple(daemons),
    )


def _instance_costs(instances: Sequence[InstanceFacts], known: KnownCosts) -> dict[str, InstanceCosts]:
    """By instance id; those of which nothing is known, nor of another one of their model, are left out."""
    by_model: dict[str, InstanceCosts] = {}
    for facts in instances:
        own = known.instances.get(facts.member.member_id)
        if own is not None:
            by_model.setdefault(facts.member.model, own)
    answer = {}
    for facts in instances:
        costs = known.instances.get(facts.member.member_id) or by_model.get(facts.member.model)
        if costs is not None:
            answer[facts.member.member_id] = costs
    return answer


def with_moves(load: ClusterLoad, moves: Sequence[Move], now: float) -> ClusterLoad:
    """The load once moves under way have ended.

    Args:
        moves: accepted, each with the blocks that have not moved yet: the destination has reserved room for them.
    """
    requests = {(i.instance_id, request.request_id) for i in load.instances for request in i.requests}
    daemons = {daemon.kvdaemon_id for daemon in load.kvdaemons}
    real = [
        move
        for move in moves
        if move.blocks and (move.debtor, move.request_id) in requests and {move.source, move.creditor} <= daemons
    ]
    reserved: dict[str, int] = {}
    for move in real:
        reserved[move.creditor] = reserved.get(move.creditor, 0) + move.blocks
    planned = apply(load, real, now)
    return ClusterLoad(
        planned.instances,
        # ``apply`` takes from the free blocks what is not among them any more.
        tuple(replace(d, free_blocks=d.free_blocks + reserved.get(d.kvdaemon_id, 0)) for d in planned.kvdaemons),
    )


def _daemon(facts: KvDaemonFacts, report: KvDaemonReport, geometry: PoolGeometry, costs: DaemonCosts) -> DaemonLoad:
    free, total = room_in(report, geometry, geometry.block_bytes)
    return DaemonLoad(facts.member.member_id, geometry, total, free, costs, facts.heard_at)


def _instance(
    facts: InstanceFacts, costs: InstanceCosts | None, block_tokens: int, moved_at: Mapping[str, float]
) -> InstanceLoad:
    home = facts.member.local_kvdaemon_id
    requests = []
    for progress, where in facts.running:
        local = where[home].num_blocks if home in where else 0
        remote = tuple(RemoteShare(kvdaemon_id, at.num_blocks) for kvdaemon_id, at in where.items() if not at.local)
        full = progress.context_tokens // block_tokens
        requests.append(
            RequestLoad(
                progress.request_id,
                progress.context_tokens,
                max(0, progress.final_tokens - progress.context_tokens),
                local,
                max(0, min(local, full - sum(share.blocks for share in remote))),
                remote,
                moved_at.get(progress.request_id, -math.inf),
            )
        )
    waiting = tuple(WaitingLoad(entry.context_tokens, entry.remaining_tokens) for entry in facts.queue)
    return InstanceLoad(
        facts.member.member_id,
        home,
        facts.max_running,
        costs or GUESSED_INSTANCE,
        facts.heard_at if costs is not None else -math.inf,
        tuple(requests),
        waiting,
    )
