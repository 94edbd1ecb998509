"""The difference between two snapshots of a process: what a heartbeat has to carry.

Pure: no clock, no I/O. One ``ReportDiff`` belongs to one heartbeat stream; a new stream starts with a new one, whose
first report is full.
"""

from __future__ import annotations

from collections.abc import Mapping

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
        if isinstance(snapshot, KvDaemonSnapshot):
            if snapshot == self._last:
                return None
            report = KvDaemonReport(snapshot.stats, snapshot.geometry)
            kept: Snapshot = snapshot
        else:
            # A deep copy: the caller may go on changing its own mappings.
            kept = InstanceSnapshot(
                snapshot.running,
                snapshot.waiting,
                {rid: dict(where) for rid, where in snapshot.placement.items()},
                snapshot.oldest_starving,
            )
            if kept == self._last:
                return None
            before: Placement = self._last.placement if isinstance(self._last, InstanceSnapshot) else {}
            report = InstanceReport(
                kept.running,
                kept.waiting,
                changed_entries(before, kept.placement),
                ended(before, kept.placement),
                kept.oldest_starving,
            )
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
