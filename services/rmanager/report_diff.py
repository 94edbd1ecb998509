"""The difference between two snapshots of a process: what a heartbeat has to carry.

Pure: no clock, no I/O. One ``ReportDiff`` belongs to one heartbeat stream; a new stream starts with a new one, whose
first report is full.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from services.core.placement import (
    BlockCount,
    Heartbeat,
    InstanceReport,
    InstanceSnapshot,
    KvDaemonReport,
    KvDaemonSnapshot,
    NamedKvDaemon,
    NamedRequest,
    PlacementColumns,
    PlacementEntry,
    ProgressColumns,
    Report,
    RunningRequest,
    Snapshot,
)

Placement = Mapping[str, Mapping[str, BlockCount]]
_NOTHING = InstanceSnapshot(0, 0, {})


class ReportDiff:
    """Turns the snapshots of one member into the heartbeats of one stream."""

    def __init__(self, member: str) -> None:
        self._member = member
        self._sequence = 0
        self._last: Snapshot | None = None
        self._names = _Names()

    def next(self, snapshot: Snapshot) -> Heartbeat | None:
        """The heartbeat that tells the receiver what changed; None where nothing did.

        The caller must send what it gets, in order: the receiver is assumed to have it from now on.
        """
        report: Report
        if snapshot == self._last:
            return None
        if isinstance(snapshot, KvDaemonSnapshot):
            report = KvDaemonReport(snapshot.stats, snapshot.geometry)
            self._last = snapshot
        else:
            # A deep copy: the caller may go on changing its own mappings.
            kept = replace(snapshot, placement={rid: dict(where) for rid, where in snapshot.placement.items()})
            last = self._last if isinstance(self._last, InstanceSnapshot) else _NOTHING
            report = _changes(last, kept, self._names)
            self._last = kept
        return self._stamp(report)

    def keep_alive(self) -> Heartbeat:
        """A heartbeat that says no more than that the member is alive. Only after a first ``next``."""
        assert self._last is not None, "a stream starts with a full report"
        return self._stamp(None)

    def _stamp(self, report: Report | None) -> Heartbeat:
        heartbeat = Heartbeat(self._member, self._sequence, full=self._sequence == 0, report=report)
        self._sequence += 1
        return heartbeat


class _Names:
    """Numbers of one stream's requests and daemons, and those that the report under way has to name."""

    def __init__(self) -> None:
        self.new_requests: list[NamedRequest] = []
        self.new_kvdaemons: list[NamedKvDaemon] = []
        self._requests: dict[str, NamedRequest] = {}
        self._kvdaemons: dict[tuple[str, bool], int] = {}
        self._next_request = 0

    def request(self, request_id: str) -> int:
        known = self._requests.get(request_id)
        return known.number if known is not None else self._name(NamedRequest(self._number(), request_id))

    def running(self, progress: RunningRequest) -> int:
        known = self._requests.get(progress.request_id)
        number = self._number() if known is None else known.number
        named = NamedRequest(number, progress.request_id, progress.arrival_time, progress.final_tokens)
        return number if named == known else self._name(named)

    def kvdaemon(self, kvdaemon_id: str, local: bool) -> int:
        number = self._kvdaemons.get((kvdaemon_id, local))
        if number is None:
            number = self._kvdaemons[kvdaemon_id, local] = len(self._kvdaemons)
            self.new_kvdaemons.append(NamedKvDaemon(number, kvdaemon_id, local))
        return number

    def end(self, request_id: str) -> int:
        return self._requests.pop(request_id).number

    def _number(self) -> int:
        self._next_request += 1
        return self._next_request - 1

    def _name(self, named: NamedRequest) -> int:
        self._requests[named.request_id] = named
        self.new_requests.append(named)
        return named.number


def _changes(last: InstanceSnapshot, now: InstanceSnapshot, names: _Names) -> InstanceReport:
    """What a receiver that knows ``last`` must be told."""
    names.new_requests, names.new_kvdaemons = [], []
    known_progress, known_moves = frozenset(last.progress), frozenset(move.move_id for move in last.moves)
    further = [progress for progress in now.progress if progress not in known_progress]
    progress = [(names.running(running), running.context_tokens) for running in further]
    placement = [
        (names.request(request_id), names.kvdaemon(kvdaemon_id, local), num_blocks)
        for request_id, kvdaemon_id, num_blocks, local in _changed_entries(last.placement, now.placement)
    ]
    return InstanceReport(
        now.running,
        now.waiting,
        tuple(names.new_requests),
        tuple(names.new_kvdaemons),
        PlacementColumns(*zip(*placement, strict=True)),
        ProgressColumns(*zip(*progress, strict=True)),
        tuple(names.end(request_id) for request_id in last.placement if request_id not in now.placement),
        now.oldest_starving,
        now.max_running,
        tuple(move for move in now.moves if move.move_id not in known_moves),
        now.queue if now.queue != last.queue else None,
        now.transports if now.transports != last.transports else None,
    )


def _changed_entries(before: Placement, after: Placement) -> Iterator[PlacementEntry]:
    """Entries of ``after`` that are new or different, and a 0-block entry for each that a living request lost."""
    for request_id, where in after.items():
        known = before.get(request_id, {})
        for kvdaemon_id, count in where.items():
            if known.get(kvdaemon_id) != count:
                yield PlacementEntry(request_id, kvdaemon_id, count.num_blocks, count.local)
        for kvdaemon_id, count in known.items():
            if kvdaemon_id not in where:
                yield PlacementEntry(request_id, kvdaemon_id, 0, count.local)
