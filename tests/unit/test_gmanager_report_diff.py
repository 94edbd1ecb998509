"""What a heartbeat carries: applied in order, the reports always rebuild the snapshot."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from services.core.placement import (
    BlockCount,
    InstanceReport,
    InstanceSnapshot,
    KvDaemonSnapshot,
    MoveEnd,
    MoveReport,
    PeerTransport,
    PlacementEntry,
    PoolStats,
    RunningRequest,
    WaitingRequest,
)
from services.gmanager.view import ClusterView
from services.rmanager.report_diff import ReportDiff
from services.runtime.membership import Member


def test_changed_entries_only() -> None:
    diff = ReportDiff("instance/a")
    where = {"r": {"k0": BlockCount(1, True), "k1": BlockCount(2, False)}, "s": {"k0": BlockCount(3, True)}}
    first = diff.next(InstanceSnapshot(2, 0, where))
    assert first is not None
    assert (first.sequence, first.full) == (0, True)
    assert isinstance(first.report, InstanceReport)
    assert len(first.report.placement) == 3

    assert diff.next(InstanceSnapshot(2, 0, where)) is None
    # The caller's own mapping changes in place.
    where["r"]["k0"] = BlockCount(5, True)
    del where["r"]["k1"]
    del where["s"]
    second = diff.next(InstanceSnapshot(1, 0, where))
    assert second is not None
    assert (second.sequence, second.full) == (1, False)
    assert second.report == InstanceReport(
        1, 0, (PlacementEntry("r", "k0", 5, True), PlacementEntry("r", "k1", 0, False)), ("s",)
    )
    alive = diff.keep_alive()
    assert (alive.sequence, alive.full, alive.report) == (2, False, None)


def test_a_daemon_sends_its_pool_when_it_changed() -> None:
    diff = ReportDiff("kvdaemon/k")
    assert diff.next(KvDaemonSnapshot(PoolStats(100))) is not None
    assert diff.next(KvDaemonSnapshot(PoolStats(100))) is None
    changed = diff.next(KvDaemonSnapshot(PoolStats(100, 10, 10, free=10)))
    assert changed is not None
    assert changed.sequence == 1


counts = st.builds(BlockCount, st.integers(1, 9), st.booleans())
placements = st.dictionaries(
    st.sampled_from("rst"), st.dictionaries(st.sampled_from(["k0", "k1", "k2"]), counts, min_size=1)
)


@given(st.lists(placements, min_size=1, max_size=6))
def test_the_view_ends_up_with_the_snapshot(history: list[dict[str, dict[str, BlockCount]]]) -> None:
    view, diff = ClusterView(), ReportDiff("instance/a")
    view.set_instances({"a": Member("instance", "a", "a:1")}, 0.0)
    view.set_kvdaemons({name: Member("kvdaemon", name, "k:1") for name in ("k0", "k1", "k2")}, 0.0)
    for where in history:
        heartbeat = diff.next(InstanceSnapshot(len(where), 0, where))
        view.apply(0, heartbeat or diff.keep_alive(), 0.0)
        seen = {
            info.request_id: {e.kvdaemon_id: BlockCount(e.num_blocks, e.local) for e in info.placement}
            for info in view.requests()
        }
        assert seen == where


def test_progress_moves_queue_and_transports_travel_when_they_changed() -> None:
    diff = ReportDiff("instance/a")
    slow, fast = RunningRequest("slow", 1.0, 64, 500), RunningRequest("fast", 2.0, 64, 500)
    old, new = (MoveReport(name, "slow", "k0", "k1", 1, 0.1, MoveEnd.DONE) for name in ("old", "new"))
    where = {name: {"k0": BlockCount(1, True)} for name in ("slow", "fast")}
    queue = (WaitingRequest(5, 6),)
    over = (PeerTransport("k1", "tcp"),)
    now = InstanceSnapshot(2, 1, where, None, (old,), 8, (slow, fast), queue, over)
    told = diff.next(now)
    assert told is not None
    entries = tuple(PlacementEntry(name, "k0", 1, True) for name in where)
    assert told.report == InstanceReport(2, 1, entries, (), None, 8, (slow, fast), (old,), queue, over)
    assert diff.next(replace(now)) is None
    further = fast._replace(context_tokens=128)
    told = diff.next(replace(now, progress=(slow, further), moves=(old, new)))
    assert told is not None
    assert told.report == InstanceReport(2, 1, max_running=8, progress=(further,), moves=(new,), queue=None)
    told = diff.next(replace(now, progress=(slow, further), moves=(new,), queue=(), transports=()))
    assert told is not None
    assert told.report == InstanceReport(2, 1, max_running=8, queue=(), transports=())
    # A new stream starts with everything that is remembered.
    told = ReportDiff("instance/a").next(replace(now, moves=(old, new)))
    assert told is not None
    assert isinstance(told.report, InstanceReport)
    assert told.report.moves == (old, new)
