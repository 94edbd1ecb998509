"""What the planner answers, and the state of the cluster that it leads to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from services.gmanager.planner.load import ClusterLoad, InstanceLoad, RemoteShare, RequestLoad

MoveKind = Literal["lend", "relieve", "home", "spread"]


@dataclass(frozen=True, slots=True)
class Move:
    """Sealed blocks of one request are to move from one daemon to another.

    Attributes:
        kind: "lend": from the debtor's own daemon to a creditor; "relieve": from a creditor that is short of memory
            itself to another one, or home; "home": from a creditor back to the debtor's own daemon; "spread": from the
            debtor's own daemon to one that lends memory only, not for room but for attention on both at once.
        debtor: instance that the request runs on.
        source, creditor: daemons that the blocks lie on now and are to lie on; coming home, ``creditor`` is the
            debtor's own.
        blocks: how many; which ones is up to the debtor's rManager, as is whether.
        gain: output tokens per second of the whole cluster, as modelled, once the move is done.
        reason: for people.
    """

    kind: MoveKind
    request_id: str
    debtor: str
    source: str
    creditor: str
    blocks: int
    gain: float
    reason: str


@dataclass(frozen=True, slots=True)
class AdmissionHint:
    """An instance where a new request should start.

    Attributes:
        room_blocks: free in its own pool, beyond what its requests, running and waiting, are expected to need.
        gain: output tokens per second that one more request of median length adds to the cluster, as modelled.
    """

    instance_id: str
    room_blocks: int
    gain: float


@dataclass(frozen=True, slots=True)
class Unmet:
    """An instance that stays short of memory, and why nothing is moved for it."""

    instance_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now.

    Attributes:
        moves: in the order in which they were chosen; one for each request, source and creditor at most.
        hints: best first, by model; instances without room for a request of median length are left out.
        unmet: by instance.
        throughput: output tokens per second of the cluster now, as modelled.
        planned_throughput: the same once all moves are done.
    """

    made_at: float
    moves: tuple[Move, ...]
    hints: tuple[AdmissionHint, ...]
    unmet: tuple[Unmet, ...]
    throughput: float
    planned_throughput: float


def apply(load: ClusterLoad, moves: Iterable[Move], now: float) -> ClusterLoad:
    """The load that moves ordered at ``now`` lead to; they count as under way at both daemons."""
    instances = {instance.instance_id: instance for instance in load.instances}
    daemons = {daemon.kvdaemon_id: daemon for daemon in load.kvdaemons}
    for move in moves:
        debtor = instances[move.debtor]
        requests = tuple(
            _moved(request, move, debtor, now) if request.request_id == move.request_id else request
            for request in debtor.requests
        )
        instances[move.debtor] = replace(debtor, requests=requests)
        source, creditor = daemons[move.source], daemons[move.creditor]
        daemons[move.source] = replace(
            source,
            free_blocks=source.free_blocks + move.blocks,
            leaving_blocks=source.leaving_blocks + move.blocks,
            releasing=source.releasing
            if move.source == debtor.kvdaemon_id
            else tuple(sorted({*source.releasing, move.debtor})),
        )
        daemons[move.creditor] = replace(
            creditor,
            free_blocks=creditor.free_blocks - move.blocks,
            coming_blocks=creditor.coming_blocks + move.blocks,
        )
    return ClusterLoad(tuple(instances.values()), tuple(daemons.values()))


def _moved(request: RequestLoad, move: Move, debtor: InstanceLoad, now: float) -> RequestLoad:
    shares = dict(request.remote)
    local = 0
    for kvdaemon_id, blocks in ((move.source, -move.blocks), (move.creditor, move.blocks)):
        if kvdaemon_id == debtor.kvdaemon_id:
            local += blocks
        else:
            shares[kvdaemon_id] = shares.get(kvdaemon_id, 0) + blocks
    return replace(
        request,
        local_blocks=request.local_blocks + local,
        movable_blocks=request.movable_blocks + local,
        remote=tuple(RemoteShare(kvdaemon_id, blocks) for kvdaemon_id, blocks in shares.items() if blocks),
        moved_at=now,
    )
