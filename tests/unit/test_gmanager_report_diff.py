"""What a heartbeat carries: applied in order, the reports always rebuild the snapshot."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from infinitellm.internal.v1 import gmanager_pb2
from services.core.placement import (
    BlockCount,
    InstanceReport,
    InstanceSnapshot,
    KvDaemonSnapshot,
    MoveEnd,
    MoveReport,
    NamedKvDaemon,
    NamedRequest,
    PeerTransport,
    PlacementColumns,
    PoolStats,
    ProgressColumns,
    RunningRequest,
    WaitingRequest,
)
from services.gmanager.heartbeat_messages import heartbeat_from_proto
from services.gmanager.view import ClusterView
from services.rmanager.heartbeat_messages import heartbeat_to_proto
from services.rmanager.report_diff import ReportDiff
from services.runtime.membership import Member


def test_changed_entries_only() -> None:
    diff = ReportDiff("instance/a")
    where = {"r": {"k0": BlockCount(1, True), "k1": BlockCount(2, False)}, "s": {"k0": BlockCount(3, True)}}
    first = diff.next(InstanceSnapshot(2, 0, where))
    assert first is not None
    assert (first.sequence, first.full) == (0, True)
    assert isinstance(first.report, InstanceReport)
    assert first.report.placement == PlacementColumns((0, 0, 1), (0, 1, 0), (1, 2, 3))

    assert diff.next(InstanceSnapshot(2, 0, where)) is None
    # The caller's own mapping changes in place.
    where["r"]["k0"] = BlockCount(5, True)
    del where["r"]["k1"]
    del where["s"]
    second = diff.next(InstanceSnapshot(1, 0, where))
    assert second is not None
    assert (second.sequence, second.full) == (1, False)
    # The requests are 0 and 1 since the first report, the daemons as well.
    assert [named.request_id for named in first.report.requests] == ["r", "s"]
    assert second.report == InstanceReport(1, 0, placement=PlacementColumns((0, 0), (0, 1), (5, 0)), ended=(1,))
    alive = diff.keep_alive()
    assert (alive.sequence, alive.full, alive.report) == (2, False, None)


def test_a_daemon_sends_its_pool_when_it_changed() -> None:
    diff = ReportDiff("kvdaemon/k")
    assert diff.next(KvDaemonSnapshot(PoolStats(100))) is not None
    assert diff.next(KvDaemonSnapshot(PoolStats(100))) is None
    changed = diff.next(KvDaemonSnapshot(PoolStats(100, 10, 10, free=10)))
    assert changed is not None
    assert changed.sequence == 1


counts = st.integers(1, 9)
placements = st.dictionaries(
    st.sampled_from("rst"), st.dictionaries(st.sampled_from(["k0", "k1", "k2"]), counts, min_size=1)
)
LOCAL = "k1"


@given(st.lists(st.tuples(placements, st.integers(1, 3)), min_size=1, max_size=6))
def test_the_view_ends_up_with_the_snapshot(history: list[tuple[dict[str, dict[str, int]], int]]) -> None:
    """By way of the wire. Requests come back under their old ids, and with other lengths."""
    view, diff = ClusterView(), ReportDiff("instance/a")
    view.set_instances({"a": Member("instance", "a", "a:1")}, 0.0)
    view.set_kvdaemons({name: Member("kvdaemon", name, "k:1") for name in ("k0", "k1", "k2")}, 0.0)
    for blocks, final in history:
        where = {
            name: {kvdaemon: BlockCount(count, kvdaemon == LOCAL) for kvdaemon, count in placed.items()}
            for name, placed in blocks.items()
        }
        # "t" waits and holds blocks.
        running = tuple(
            RunningRequest(name, ord(name), sum(placed.values()), 10 * final)
            for name, placed in sorted(blocks.items())
            if name != "t"
        )
        heartbeat = diff.next(InstanceSnapshot(len(where), 0, where, progress=running)) or diff.keep_alive()
        wire = heartbeat_to_proto(heartbeat).SerializeToString()
        view.apply(0, heartbeat_from_proto(gmanager_pb2.HeartbeatRequest.FromString(wire)), 0.0)
        (facts,) = view.instance_facts()
        assert [progress for progress, _ in facts.running] == list(running)
        assert {progress.request_id: placed for progress, placed in facts.running} == {
            progress.request_id: where[progress.request_id] for progress in running
        }
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
    assert told.report == InstanceReport(
        2,
        1,
        (NamedRequest(0, "slow", 1.0, 500), NamedRequest(1, "fast", 2.0, 500)),
        (NamedKvDaemon(0, "k0", True),),
        PlacementColumns((0, 1), (0, 0), (1, 1)),
        ProgressColumns((0, 1), (64, 64)),
        max_running=8,
        moves=(old,),
        queue=queue,
        transports=over,
    )
    assert diff.next(replace(now)) is None
    further = fast._replace(context_tokens=128)
    told = diff.next(replace(now, progress=(slow, further), moves=(old, new)))
    assert told is not None
    columns = ProgressColumns((1,), (128,))
    assert told.report == InstanceReport(2, 1, max_running=8, progress=columns, moves=(new,), queue=None)
    told = diff.next(replace(now, progress=(slow, further), moves=(new,), queue=(), transports=()))
    assert told is not None
    assert told.report == InstanceReport(2, 1, max_running=8, queue=(), transports=())
    # A new stream starts with everything that is remembered.
    told = ReportDiff("instance/a").next(replace(now, moves=(old, new)))
    assert told is not None
    assert isinstance(told.report, InstanceReport)
    assert told.report.moves == (old, new)
