"""Where blocks lie: the pure types shared by those who report placement and the gManager who collects it.

A *snapshot* is the whole truth of one process at one moment; a *report* is the part of it that changed since the last
report of the same stream. Reports are small when little happens, and a stream of them always starts with a full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from services.core.blocks import PoolGeometry
from services.core.sequence import RequestAge
from services.core.timings import HostingTiming, StepTiming


class PoolStats(NamedTuple):
    """A pool's use, in blocks: ``total = free + cached + workspace + reserved + in_use``.

    Attributes:
        pool_bytes: bytes of the pool.
        block_bytes: bytes of one block; 0 as long as no session has formatted the pool (all counts are 0 then).
        cached: sealed, without users; evicted when room is needed.
        workspace: open blocks of the mapped instance that belong to no request.
        reserved: promised to a request and not sealed.
        in_use: sealed, with users.
    """

    pool_bytes: int
    block_bytes: int = 0
    total: int = 0
    free: int = 0
    cached: int = 0
    workspace: int = 0
    reserved: int = 0
    in_use: int = 0

    @property
    def available(self) -> int:
        """Blocks a reservation can get."""
        return self.free + self.cached

    @property
    def unused(self) -> bool:
        """Nobody holds a block: the pool could be formatted anew."""
        return self.workspace == self.reserved == self.in_use == 0


class BlockCount(NamedTuple):
    """How many blocks of one request lie on one daemon; ``local``: its pool is the one the instance maps."""

    num_blocks: int
    local: bool


class PlacementEntry(NamedTuple):
    """Blocks of a request on one daemon; ``local`` as in ``BlockCount``."""

    request_id: str
    kvdaemon_id: str
    num_blocks: int
    local: bool


class MoveEnd(StrEnum):
    """How a move of blocks ended, or why it did not begin; the values are what travels."""

    DONE = "DONE"  # all accepted blocks have moved
    # Refusals: nothing has moved.
    STALE_LEADER = "STALE_LEADER"  # a later leader has given instructions already
    UNKNOWN_REQUEST = "UNKNOWN_REQUEST"  # it is not running at this instance
    NOTHING_TO_MOVE = "NOTHING_TO_MOVE"  # no sealed block there that is not on its way already
    DESTINATION_FULL = "DESTINATION_FULL"
    DESTINATION_UNREACHABLE = "DESTINATION_UNREACHABLE"
    TOO_MANY_MOVES = "TOO_MANY_MOVES"
    # Ended early: blocks that had not moved stay where they were.
    REQUEST_ENDED = "REQUEST_ENDED"  # finished, aborted, or preempted
    SOURCE_LOST = "SOURCE_LOST"
    DESTINATION_LOST = "DESTINATION_LOST"
    COPY_FAILED = "COPY_FAILED"
    EXPIRED = "EXPIRED"  # the room was not used in time


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What became of a move that had been accepted.

    Attributes:
        moved_blocks: that lie at the destination now.
        seconds: from the instruction to the end.
    """

    move_id: str
    request_id: str
    source_kvdaemon_id: str
    destination_kvdaemon_id: str
    moved_blocks: int
    seconds: float
    end: MoveEnd


class RunningRequest(NamedTuple):
    """A running request, as planning sees it.

    Attributes:
        arrival_time: Unix seconds; the earlier, the older.
        context_tokens: that have been computed, in whole blocks: so an entry changes once in a block.
        final_tokens: length of the context when all of its output has been generated.
    """

    request_id: str
    arrival_time: float
    context_tokens: int
    final_tokens: int


class WaitingRequest(NamedTuple):
    """A request without blocks: tokens that are there already, and output still to come at most."""

    context_tokens: int
    remaining_tokens: int


MOST_WAITING_TOLD = 100


class PeerTransport(NamedTuple):
    """How an instance reaches a daemon: "shm", "rdma", "tcp", ..."""

    kvdaemon_id: str
    transport: str


@dataclass(frozen=True, slots=True)
class InstanceSnapshot:
    """All an instance says of itself.

    Attributes:
        placement: request id -> daemon id -> blocks.
        oldest_starving: the oldest request that cannot go on for want of blocks.
        moves: the latest moves that have ended, oldest first; each stays for a while, so that none is missed.
        max_running: requests that can run at the same time.
        progress: of the running requests.
        queue: the waiting requests, oldest first, MOST_WAITING_TOLD of them.
        transports: of the daemons that it is connected to.
    """

    running: int
    waiting: int
    placement: Mapping[str, Mapping[str, BlockCount]]
    oldest_starving: RequestAge | None = None
    moves: tuple[MoveReport, ...] = ()
    max_running: int = 0
    progress: tuple[RunningRequest, ...] = ()
    queue: tuple[WaitingRequest, ...] = ()
    transports: tuple[PeerTransport, ...] = ()


@dataclass(frozen=True, slots=True)
class KvDaemonSnapshot:
    """All a KV daemon says of itself; ``geometry`` is None as long as the pool is unformatted."""

    stats: PoolStats
    geometry: PoolGeometry | None = None


Snapshot = InstanceSnapshot | KvDaemonSnapshot


class NamedRequest(NamedTuple):
    """What stands for a request from then on in its stream: a number, never used for another one.

    Attributes:
        arrival_time, final_tokens: as of ``RunningRequest``; 0 until it runs.
    """

    number: int
    request_id: str
    arrival_time: float = 0.0
    final_tokens: int = 0


class NamedKvDaemon(NamedTuple):
    """Likewise for a daemon; ``local``: its pool is the one the instance maps."""

    number: int
    kvdaemon_id: str
    local: bool


class PlacementColumns(NamedTuple):
    """``[req_id, inst_id, num_blocks, local]`` of the paper's placement map, an entry in each column; requests and
    daemons by their numbers, the instance is the reporting one. 0 blocks remove the entry."""

    requests: tuple[int, ...] = ()
    kvdaemons: tuple[int, ...] = ()
    num_blocks: tuple[int, ...] = ()


class ProgressColumns(NamedTuple):
    """Context of running requests in tokens, an entry in each column; requests by their numbers."""

    requests: tuple[int, ...] = ()
    context_tokens: tuple[int, ...] = ()


class InstanceReport(NamedTuple):
    """What changed at an instance; a full report tells everything, and nothing has ended.

    Requests and daemons have numbers: an instance with a hundred requests has news of dozens in every heartbeat, and
    what is known of them lies close together at the receiver.

    Attributes:
        requests: not named before in this stream, or with another final length.
        kvdaemons: not named before in this stream.
        placement, progress: entries that changed.
        ended: numbers that stand for nothing any more.
        moves: that have ended since the last report.
        queue, transports: None if they have not changed.
    """

    running: int
    waiting: int
    requests: tuple[NamedRequest, ...] = ()
    kvdaemons: tuple[NamedKvDaemon, ...] = ()
    placement: PlacementColumns = PlacementColumns()
    progress: ProgressColumns = ProgressColumns()
    ended: tuple[int, ...] = ()
    oldest_starving: RequestAge | None = None
    max_running: int = 0
    moves: tuple[MoveReport, ...] = ()
    queue: tuple[WaitingRequest, ...] | None = None
    transports: tuple[PeerTransport, ...] | None = None


class KvDaemonReport(NamedTuple):
    """A KV daemon's pool. It is small and therefore always complete."""

    stats: PoolStats
    geometry: PoolGeometry | None = None


Report = InstanceReport | KvDaemonReport
Timings = tuple[StepTiming | HostingTiming, ...]


class Heartbeat(NamedTuple):
    """One message of a heartbeat stream.

    Attributes:
        member: "instance/..." or "kvdaemon/...".
        sequence: 0, 1, 2, ... within the stream.
        full: the report contains everything; what was known of the member before is forgotten.
        report: None says "alive, nothing changed" (never with ``full``).
        timings: what was measured since the last message of any stream; lost with a stream that breaks.
        lost_relay: address of the relay that the member had been sent to and could not use.
    """

    member: str
    sequence: int
    full: bool
    report: Report | None
    timings: Timings = ()
    lost_relay: str = ""


@dataclass(frozen=True, slots=True)
class Room:
    """A daemon that can hold blocks of the geometry asked for.

    Attributes:
        address: its control server, host:port.
        free_blocks: that a reservation could get now.
        total_blocks: that requests could have there if nobody else had any (the workspace is not among them).
        wanted: requests of the instance that maps the pool wait.
    """

    kvdaemon_id: str
    address: str
    free_blocks: int
    total_blocks: int
    wanted: bool = False


@dataclass(frozen=True, slots=True)
class AdmissionHint:
    """What the planner says of an instance where a new request would do well to start.

    Attributes:
        room_tokens: that its own pool has room for, beyond what its requests are expected to need.
        gain: output tokens per second that one more request of median length adds to the cluster, as modelled.
    """

    room_tokens: int
    gain: float


@dataclass(frozen=True, slots=True)
class RoomView:
    """Where room is, emptiest first, and the oldest request of the cluster that cannot go on for want of it."""

    rooms: tuple[Room, ...] = ()
    oldest_starving: RequestAge | None = None
