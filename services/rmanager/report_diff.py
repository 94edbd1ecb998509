"""The difference between two snapshots of a process: what a heartbeat has to carry.

Pure: no clock, no I/O. One ``ReportDiff`` belongs to one heartbeat stream; a new stream starts with a new one, whose
first report is full.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from services.core.placement import (
    BlockCount,
    Heartbeat,
    InstanceReport,
    InstanceSnapshot,
    KvDaemonReport,
    KvDaemonSnapshot,
    PlacementEntry,
    Report,
    Snapshot,
)

Placement = Mapping[str, Mapping[str, BlockCount]]


class ReportDiff:
    """Turns the snapshots of one member into the heartbeats of one stream."""

    def __init__(self, member: str) -> None:
        self._member = member
        self._sequence = 0
        self._last: Snapshot | None = None

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
            last = self._last if isinstance(self._last, InstanceSnapshot) else None
            report = changes(last, kept)
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


def changes(last: InstanceSnapshot | None, now: InstanceSnapshot) -> InstanceReport:
    """What a receiver that knows ``last`` must be told; all of it where that is None."""
    before: Placement = {} if last is None else last.placement
    known_progress = frozenset() if last is None else frozenset(last.progress)
    known_moves = frozenset() if last is None else frozenset(move.move_id for move in last.moves)
    return InstanceReport(
        now.running,
        now.waiting,
        changed_entries(before, now.placement),
        ended(before, now.placement),
        now.oldest_starving,
        now.max_running,
        tuple(progress for progress in now.progress if progress not in known_progress),
        tuple(move for move in now.moves if move.move_id not in known_moves),
        now.queue if last is None or now.queue != last.queue else None,
        now.transports if last is None or now.transports != last.transports else None,
    )


def changed_entries(before: Placement, after: Placement) -> tuple[PlacementEntry, ...]:
    """Entries of ``after`` that are new or different, and a 0-block entry for each that a living request lost."""
    changed: list[PlacementEntry] = []
    for request_id, where in after.items():
        known = before.get(request_id, {})
        for kvdaemon_id, count in where.items():
            if known.get(kvdaemon_id) != count:
                changed.append(PlacementEntry(request_id, kvdaemon_id, count.num_blocks, count.local))
        for kvdaemon_id in known:
            if kvdaemon_id not in where:
                changed.append(PlacementEntry(request_id, kvdaemon_id, 0, False))
    return tuple(changed)


def ended(before: Placement, after: Placement) -> tuple[str, ...]:
    """Requests that are gone."""
    return tuple(request_id for request_id in before if request_id not in after)
