"""The cluster view: what instances and KV daemons said of themselves, put together.

Pure: no I/O and no clock; ``now`` (seconds of any monotonic clock) is passed in. The view is a cache and may be stale.

Two sources feed it. Membership (etcd) says who exists; heartbeats say what they hold. Either may come first, so reports
of a process that is not a member yet are kept aside and not shown. A member goes when both have gone, its entry and its
heartbeat stream: leases are lost when etcd hangs, all at once, and the processes that held them are as well as before.

Cost: ``apply`` touches the changed entries of one member only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from services.core.blocks import PoolGeometry
from services.core.errors import ResyncRequiredError
from services.core.placement import (
    AdmissionHint,
    BlockCount,
    Heartbeat,
    KvDaemonReport,
    PeerTransport,
    PlacementEntry,
    PoolStats,
    Room,
    RunningRequest,
    WaitingRequest,
)
from services.core.sequence import RequestAge
from services.gmanager.reporter import Reporter
from services.runtime.membership import Member

STARVING_HEARTBEAT_AGE_S = 5.0  # heartbeats come every second at least


@dataclass(frozen=True, slots=True)
class InstanceInfo:
    """One instance, as gateways see it. ``heartbeat_age_s`` counts from its membership where none has come; ``hint`` is
    None where a new request would do better elsewhere, and where nobody plans; ``transports`` are of the daemons that
    it is connected to."""

    member: Member
    running: int
    waiting: int
    local_free_blocks: int
    heartbeat_age_s: float
    hint: AdmissionHint | None = None
    transports: tuple[PeerTransport, ...] = ()


@dataclass(frozen=True, slots=True)
class KvDaemonInfo:
    """One KV daemon; ``stats`` is None where no heartbeat has come."""

    member: Member
    stats: PoolStats | None
    heartbeat_age_s: float


@dataclass(frozen=True, slots=True)
class RequestInfo:
    """Where the blocks of one request lie; only daemons that are members are named."""

    request_id: str
    instance_id: str
    placement: tuple[PlacementEntry, ...]


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """One instance, as the planner needs it.

    Attributes:
        heard_at: time of its last heartbeat; -inf if none has come.
        max_running: requests that it can run at the same time; 0 if it has not said so.
        running: progress and placement (daemon id -> blocks) of the running requests, oldest first.
        queue: waiting ones, oldest first.
    """

    member: Member
    heard_at: float
    max_running: int
    running: tuple[tuple[RunningRequest, Mapping[str, BlockCount]], ...]
    queue: tuple[WaitingRequest, ...]


@dataclass(frozen=True, slots=True)
class KvDaemonFacts:
    """One KV daemon, as the planner needs it; ``heard_at`` as for instances."""

    member: Member
    heard_at: float
    report: KvDaemonReport | None


class ClusterView:
    """Membership and heartbeats in, answers out. Used from one thread."""

    def __init__(self) -> None:
        self._instances: dict[str, Member] = {}
        self._kvdaemons: dict[str, Member] = {}
        self._gmanagers: dict[str, Member] = {}
        self._entered: dict[str, frozenset[str]] = {}  # by kind: ids that stand in etcd now
        # By heartbeat identity, "instance/<id>" or "kvdaemon/<id>".
        self._reporters: dict[str, Reporter] = {}
        # When each member was first seen, by the same identity.
        self._member_since: dict[str, float] = {}
        self._hints: Mapping[str, AdmissionHint] = {}
        self._load_version = 0

    @property
    def load_version(self) -> int:
        """Grows whenever an answer of ``instances`` may have changed (ages aside)."""
        return self._load_version

    def set_instances(self, members: Mapping[str, Member], now: float) -> None:
        """The instances that stand in etcd now."""
        self._update("instance", self._instances, members, now)

    def set_kvdaemons(self, members: Mapping[str, Member], now: float) -> None:
        """The KV daemons that stand in etcd now."""
        self._update("kvdaemon", self._kvdaemons, members, now)

    def set_gmanagers(self, members: Mapping[str, Member], now: float) -> None:
        """The gManagers that stand in etcd now; they send no heartbeats."""
        self._gmanagers = dict(members)

    def set_hints(self, hints: Mapping[str, AdmissionHint]) -> None:
        """By instance id, what the latest plan says."""
        if hints != self._hints:
            self._hints = dict(hints)
            self._load_version += 1

    def _update(self, kind: str, known: dict[str, Member], entered: Mapping[str, Member], now: float) -> None:
        for member_id in known.keys() - entered.keys():
            reporter = self._reporters.get(f"{kind}/{member_id}")
            if reporter is None or not reporter.open:
                self._forget(known, kind, member_id)
        for member_id in entered.keys() - known.keys():
            self._member_since[f"{kind}/{member_id}"] = now
        known.update(entered)
        self._entered[kind] = frozenset(entered)
        self._load_version += 1

    def _forget(self, known: dict[str, Member], kind: str, member_id: str) -> None:
        known.pop(member_id, None)
        self._reporters.pop(f"{kind}/{member_id}", None)
        self._member_since.pop(f"{kind}/{member_id}", None)
        self._load_version += 1

    def apply(self, stream: int, heartbeat: Heartbeat, now: float) -> None:
        """Takes in one heartbeat.

        Args:
            stream: number of the heartbeat stream it came by; a full report makes its stream the member's only one.
        Raises: ResyncRequiredError when the stream did not start with a full report, has a gap, or is not the member's
            newest, and when the member was forgotten meanwhile.
        """
        if heartbeat.full:
            if heartbeat.sequence != 0 or heartbeat.report is None:
                raise ResyncRequiredError(f"{heartbeat.member}: a full report must be the stream's first message")
            reporter = Reporter(stream, 0, now)
            self._reporters[heartbeat.member] = reporter
        else:
            known = self._reporters.get(heartbeat.member)
            if known is None or known.stream != stream:
                raise ResyncRequiredError(f"{heartbeat.member}: not known; open a stream with a full report")
            reporter = known
        if heartbeat.sequence != reporter.next_sequence:
            raise ResyncRequiredError(
                f"{heartbeat.member}: got message {heartbeat.sequence} instead of {reporter.next_sequence}; "
                "open a new stream with a full report"
            )
        reporter.next_sequence += 1
        reporter.last_heartbeat = now
        if heartbeat.report is None:
            return
        self._load_version += 1
        reporter.apply(heartbeat.report)

    def stream_ended(self, member: str, stream: int) -> None:
        """Forgets a process that does not stand in etcd; the report of one that does stays until it leaves."""
        reporter = self._reporters.get(member)
        if reporter is None or reporter.stream != stream:
            return
        reporter.open = False
        kind, _, member_id = member.partition("/")
        if member_id not in self._entered.get(kind, ()):
            self._forget(self._instances if kind == "instance" else self._kvdaemons, kind, member_id)

    def forget_reports(self) -> None:
        """Another gManager gets the heartbeats from now on. Who stands in etcd stays known, without what it said."""
        self._reporters.clear()
        self._hints = {}
        for kind, known in (("instance", self._instances), ("kvdaemon", self._kvdaemons)):
            for member_id in known.keys() - self._entered.get(kind, frozenset()):
                self._forget(known, kind, member_id)
        self._load_version += 1

    def instances(self, now: float) -> tuple[InstanceInfo, ...]:
        """All instances, by id."""
        return tuple(self._instance_info(self._instances[key], now) for key in sorted(self._instances))

    def kvdaemons(self, now: float) -> tuple[KvDaemonInfo, ...]:
        """All KV daemons, by id."""
        answer = []
        for member_id in sorted(self._kvdaemons):
            reporter = self._reporters.get(f"kvdaemon/{member_id}")
            stats = reporter.kvdaemon.stats if reporter and reporter.kvdaemon else None
            age_s = self._age(f"kvdaemon/{member_id}", now)
            answer.append(KvDaemonInfo(self._kvdaemons[member_id], stats, age_s))
        return tuple(answer)

    def kvdaemon_address(self, member_id: str) -> str | None:
        """Of its control server; None where it is no member."""
        member = self._kvdaemons.get(member_id)
        return None if member is None else member.address

    def gmanagers(self) -> tuple[Member, ...]:
        """All gManagers, by id."""
        return tuple(self._gmanagers[member_id] for member_id in sorted(self._gmanagers))

    def requests(self) -> tuple[RequestInfo, ...]:
        """The request placement map, by instance and request."""
        answer = []
        for instance_id in sorted(self._instances):
            reporter = self._reporters.get(f"instance/{instance_id}")
            for request_id, where in reporter.placement.items() if reporter else ():
                entries = tuple(
                    PlacementEntry(request_id, kvdaemon_id, count.num_blocks, count.local)
                    for kvdaemon_id, count in where.items()
                    if kvdaemon_id in self._kvdaemons
                )
                answer.append(RequestInfo(request_id, instance_id, entries))
        return tuple(answer)

    def instance_facts(self) -> tuple[InstanceFacts, ...]:
        """All instances, by id, as of now: what is answered does not change with later heartbeats."""
        answer = []
        for member_id in sorted(self._instances):
            reporter = self._reporters.get(f"instance/{member_id}")
            if reporter is None or reporter.instance is None:
                answer.append(InstanceFacts(self._instances[member_id], -math.inf, 0, (), ()))
                continue
            placement = reporter.placement
            answer.append(
                InstanceFacts(
                    self._instances[member_id],
                    reporter.last_heartbeat,
                    reporter.instance.max_running,
                    tuple((running, placement.get(running.request_id, {})) for running in reporter.progress),
                    reporter.queue,
                )
            )
        return tuple(answer)

    def kvdaemon_facts(self) -> tuple[KvDaemonFacts, ...]:
        """All KV daemons, by id."""
        answer = []
        for member_id in sorted(self._kvdaemons):
            reporter = self._reporters.get(f"kvdaemon/{member_id}")
            heard_at = reporter.last_heartbeat if reporter is not None else -math.inf
            report = reporter.kvdaemon if reporter is not None else None
            answer.append(KvDaemonFacts(self._kvdaemons[member_id], heard_at, report))
        return tuple(answer)

    def find_room(self, geometry: PoolGeometry, block_bytes: int, exclude: Collection[str] = ()) -> tuple[Room, ...]:
        """Daemons that can hold blocks of this geometry, the one with the most room first, full ones last."""
        rooms = []
        wanted = {
            member.local_kvdaemon_id for member_id, member in self._instances.items() if self._has_waiting(member_id)
        }
        for member_id, member in self._kvdaemons.items():
            reporter = self._reporters.get(f"kvdaemon/{member_id}")
            if member_id in exclude or reporter is None or reporter.kvdaemon is None:
                continue
            free, total = room_in(reporter.kvdaemon, geometry, block_bytes)
            if total > 0:
                rooms.append(Room(member_id, member.address, free, total, member_id in wanted))
        return tuple(sorted(rooms, key=lambda room: (-room.free_blocks, room.kvdaemon_id)))

    def _has_waiting(self, instance_id: str) -> bool:
        reporter = self._reporters.get(f"instance/{instance_id}")
        return reporter is not None and reporter.instance is not None and reporter.instance.waiting > 0

    def oldest_starving(self, now: float) -> RequestAge | None:
        """The oldest request of the cluster that cannot go on for want of blocks.

        Everybody younger waits for it, so who has not been heard of lately does not count: its requests may be gone.
        """
        reporters = (self._reporters.get(f"instance/{member_id}") for member_id in self._instances)
        reports = (
            reporter.instance
            for reporter in reporters
            if reporter is not None and now - reporter.last_heartbeat <= STARVING_HEARTBEAT_AGE_S
        )
        return min(
            (r.oldest_starving for r in reports if r is not None and r.oldest_starving is not None), default=None
        )

    def _instance_info(self, member: Member, now: float) -> InstanceInfo:
        reporter = self._reporters.get(f"instance/{member.member_id}")
        report = reporter.instance if reporter else None
        daemon = self._reporters.get(f"kvdaemon/{member.local_kvdaemon_id}")
        return InstanceInfo(
            member=member,
            running=report.running if report else 0,
            waiting=report.waiting if report else 0,
            local_free_blocks=daemon.kvdaemon.stats.available if daemon and daemon.kvdaemon else 0,
            heartbeat_age_s=self._age(f"instance/{member.member_id}", now),
            hint=self._hints.get(member.member_id),
            transports=reporter.transports if reporter else (),
        )

    def _age(self, member: str, now: float) -> float:
        reporter = self._reporters.get(member)
        return now - (reporter.last_heartbeat if reporter else self._member_since[member])


def room_in(daemon: KvDaemonReport, geometry: PoolGeometry, block_bytes: int) -> tuple[int, int]:
    """Blocks of ``geometry`` that one pool can take now, and that it could hold for requests in all.

    A workspace is never lent. A pool without a geometry, and one of another geometry that nobody uses, can be formatted
    anew.
    """
    stats = daemon.stats
    if stats.block_bytes and daemon.geometry == geometry:
        return stats.available, stats.total - stats.workspace
    if stats.block_bytes and not stats.unused:
        return 0, 0
    fitting = stats.pool_bytes // block_bytes if block_bytes else 0
    return fitting, fitting
