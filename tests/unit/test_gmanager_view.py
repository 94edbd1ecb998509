"""The cluster view: membership and heartbeats in, answers out."""

from __future__ import annotations

import math

import pytest
from told import told

from services.core.blocks import PoolGeometry
from services.core.errors import InvalidRequestError, ResyncRequiredError
from services.core.placement import (
    AdmissionHint,
    BlockCount,
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    NamedKvDaemon,
    NamedRequest,
    PeerTransport,
    PlacementColumns,
    PlacementEntry,
    PoolStats,
    ProgressColumns,
    RunningRequest,
    WaitingRequest,
)
from services.core.sequence import RequestAge
from services.gmanager.view import ClusterView
from services.runtime.membership import Member

GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=64, head_dim=32, dtype="float32")
OTHER = PoolGeometry(layers=4, kv_heads=2, block_tokens=64, head_dim=32, dtype="float32")
BLOCK = GEOMETRY.block_bytes


def instance(name: str, kvdaemon: str = "") -> Member:
    return Member("instance", name, f"{name}:1", "m", 100, kvdaemon)


def daemons(*names: str) -> dict[str, Member]:
    return {name: Member("kvdaemon", name, f"{name}:2") for name in names}


def report(view: ClusterView, member: str, body, stream: int = 0, sequence: int = 0, now: float = 0.0) -> None:
    view.apply(stream, Heartbeat(member, sequence, sequence == 0, body), now)


def formatted(free: int, cached: int = 0, in_use: int = 0, geometry: PoolGeometry = GEOMETRY) -> KvDaemonReport:
    total = free + cached + in_use
    stats = PoolStats(
        total * geometry.block_bytes, geometry.block_bytes, total, free=free, cached=cached, in_use=in_use
    )
    return KvDaemonReport(stats, geometry)


def placement(view: ClusterView) -> dict[tuple[str, str, str], int]:
    return {
        (info.instance_id, entry.request_id, entry.kvdaemon_id): entry.num_blocks
        for info in view.requests()
        for entry in info.placement
    }


def test_placement_follows_the_changes() -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a")}, 0.0)
    view.set_kvdaemons(daemons("k0", "k1"), 0.0)
    entries = (PlacementEntry("r", "k0", 5, True), PlacementEntry("r", "k1", 7, False))
    report(view, "instance/a", told(1, 2, entries))
    assert placement(view) == {("a", "r", "k0"): 5, ("a", "r", "k1"): 7}
    report(view, "instance/a", told(1, 2, (PlacementEntry("r", "k0", 0, True),)), sequence=1)
    assert placement(view) == {("a", "r", "k1"): 7}
    report(view, "instance/a", None, sequence=2, now=3.0)
    report(view, "instance/a", told(0, 0, (), ("r", "unknown")), sequence=3, now=4.0)
    assert placement(view) == {}
    (info,) = view.instances(now=6.0)
    assert (info.running, info.waiting, info.heartbeat_age_s) == (0, 0, 2.0)


def test_a_full_report_replaces_everything() -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a")}, 0.0)
    view.set_kvdaemons(daemons("k0"), 0.0)
    report(view, "instance/a", told(1, 0, (PlacementEntry("old", "k0", 5, True),)), stream=1)
    report(view, "instance/a", told(1, 0, (PlacementEntry("new", "k0", 6, True),)), stream=2)
    assert placement(view) == {("a", "new", "k0"): 6}
    with pytest.raises(ResyncRequiredError):
        report(view, "instance/a", told(0, 0), stream=1, sequence=1)
    view.stream_ended("instance/a", 1)
    assert placement(view) == {("a", "new", "k0"): 6}


def test_gaps_ask_for_everything_again() -> None:
    view = ClusterView()
    view.set_kvdaemons(daemons("k0"), 0.0)
    with pytest.raises(ResyncRequiredError):
        report(view, "kvdaemon/k0", formatted(1), sequence=1)
    report(view, "kvdaemon/k0", formatted(1))
    report(view, "kvdaemon/k0", formatted(2), sequence=1)
    for wrong in (1, 3):
        with pytest.raises(ResyncRequiredError):
            report(view, "kvdaemon/k0", formatted(3), sequence=wrong)
    with pytest.raises(ResyncRequiredError):
        view.apply(0, Heartbeat("kvdaemon/k0", 2, True, formatted(3)), 0.0)


def test_a_member_that_goes_takes_its_entries_along() -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a", "k0"), "b": instance("b")}, 0.0)
    view.set_kvdaemons(daemons("k0", "k1"), 0.0)
    entries = (PlacementEntry("r", "k0", 5, True), PlacementEntry("r", "k1", 7, False))
    report(view, "instance/a", told(1, 0, entries))
    report(view, "instance/b", told(1, 0, (PlacementEntry("s", "k1", 1, False),)))
    report(view, "kvdaemon/k0", formatted(3, 4))
    assert [info.local_free_blocks for info in view.instances(0.0)] == [7, 0]

    view.stream_ended("kvdaemon/k0", 0)
    view.set_kvdaemons(daemons("k1"), 0.0)
    assert placement(view) == {("a", "r", "k1"): 7, ("b", "s", "k1"): 1}
    assert view.instances(0.0)[0].local_free_blocks == 0
    # The daemon's key was only lost for a moment: its blocks are still there, and the instance will not say so again.
    view.set_kvdaemons(daemons("k0", "k1"), 0.0)
    assert placement(view)[("a", "r", "k0")] == 5

    view.set_instances({"b": instance("b")}, 0.0)
    assert ("a", "r", "k1") in placement(view)  # it still sends heartbeats
    view.stream_ended("instance/a", 0)
    assert placement(view) == {("b", "s", "k1"): 1}
    view.set_instances({"a": instance("a"), "b": instance("b")}, 0.0)
    assert placement(view) == {("b", "s", "k1"): 1}
    with pytest.raises(ResyncRequiredError):
        report(view, "instance/a", None, sequence=1)


def test_members_without_a_lease_stay_while_they_send_heartbeats() -> None:
    """etcd hung longer than the leases live: all entries are gone at once, and nobody is dead."""
    view = ClusterView()
    view.set_instances({"a": instance("a", "k0")}, 0.0)
    view.set_kvdaemons(daemons("k0", "k1"), 0.0)
    report(view, "instance/a", told(1, 0, (PlacementEntry("r", "k0", 5, True),)))
    report(view, "kvdaemon/k0", formatted(3))
    view.set_instances({}, 1.0)
    view.set_kvdaemons({}, 1.0)
    assert [room.kvdaemon_id for room in view.find_room(GEOMETRY, BLOCK)] == ["k0"]
    assert [info.member.member_id for info in view.kvdaemons(1.0)] == ["k0"]  # k1 never sent any
    assert placement(view) == {("a", "r", "k0"): 5}
    report(view, "kvdaemon/k0", formatted(2), sequence=1, now=2.0)
    view.set_kvdaemons(daemons("k0"), 2.0)
    view.stream_ended("kvdaemon/k0", 0)
    assert [room.free_blocks for room in view.find_room(GEOMETRY, BLOCK)] == [2]  # it stands in etcd again
    version = view.load_version
    view.stream_ended("instance/a", 0)
    assert view.instances(2.0) == ()
    assert view.load_version > version
    with pytest.raises(ResyncRequiredError):
        report(view, "instance/a", None, sequence=1)


def test_a_heartbeat_may_come_before_the_membership() -> None:
    view = ClusterView()
    report(view, "kvdaemon/k0", formatted(3))
    report(view, "kvdaemon/stranger", formatted(3))
    assert view.kvdaemons(0.0) == ()
    view.stream_ended("kvdaemon/stranger", 0)
    view.set_kvdaemons(daemons("k0", "stranger"), 0.0)
    infos = view.kvdaemons(1.0)
    assert [info.stats is not None for info in infos] == [True, False]
    assert infos[1].heartbeat_age_s == 1.0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (KvDaemonReport(PoolStats(10 * BLOCK + 1)), 10),
        (KvDaemonReport(PoolStats(BLOCK - 1)), None),
        (formatted(3, 4, 5), 7),
        (formatted(0, 0, 5), 0),  # full now, but it counts as memory of the cluster
        (formatted(1, 2, 0, OTHER), 3 * OTHER.block_bytes // BLOCK),
        (formatted(1, 2, 1, OTHER), None),
    ],
)
def test_room_for_a_geometry(body: KvDaemonReport, expected: int | None) -> None:
    view = ClusterView()
    view.set_kvdaemons(daemons("k0"), 0.0)
    report(view, "kvdaemon/k0", body)
    rooms = view.find_room(GEOMETRY, BLOCK)
    assert [room.free_blocks for room in rooms] == ([] if expected is None else [expected])


def test_room_emptiest_first_without_the_excluded() -> None:
    view = ClusterView()
    view.set_kvdaemons(daemons("k0", "k1", "k2", "silent"), 0.0)
    for name, free in (("k0", 3), ("k1", 9), ("k2", 5)):
        report(view, f"kvdaemon/{name}", formatted(free))
    assert [room.kvdaemon_id for room in view.find_room(GEOMETRY, BLOCK)] == ["k1", "k2", "k0"]
    (first, second) = view.find_room(GEOMETRY, BLOCK, {"k1"})
    assert (first.kvdaemon_id, second.kvdaemon_id, first.address) == ("k2", "k0", "k2:2")


def test_version_grows_with_what_gateways_see() -> None:
    view = ClusterView()
    before = view.load_version
    view.set_instances({"a": instance("a")}, 0.0)
    assert view.load_version > before
    before = view.load_version
    report(view, "instance/a", told(1, 0))
    assert view.load_version > before
    before = view.load_version
    report(view, "instance/a", None, sequence=1)
    assert view.load_version == before


def test_who_is_silent_does_not_starve_the_others() -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a"), "b": instance("b")}, 0.0)
    old, young = RequestAge(1.0, "old"), RequestAge(2.0, "young")
    report(view, "instance/a", told(1, 0, oldest_starving=old))
    report(view, "instance/b", told(1, 0, oldest_starving=young))
    assert view.oldest_starving(1.0) == old
    report(view, "instance/b", None, sequence=1, now=8.0)
    assert view.oldest_starving(9.0) == young  # a was killed or stopped: what it starved for may be done elsewhere


def test_what_the_planner_needs_follows_the_changes() -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a", "k0"), "silent": instance("silent", "k1")}, 0.0)
    view.set_kvdaemons(daemons("k0", "k1"), 0.0)
    report(view, "kvdaemon/k0", formatted(3), now=1.0)
    young, old = RunningRequest("young", 9.0, 64, 500), RunningRequest("old", 1.0, 128, 400)
    entries = (PlacementEntry("young", "k0", 2, True), PlacementEntry("old", "k0", 3, True))
    queue = (WaitingRequest(10, 20),)
    over = (PeerTransport("k1", "tcp"),)
    full = told(2, 1, entries, max_running=8, progress=(young, old), queue=queue, transports=over)
    report(view, "instance/a", full, now=2.0)
    assert [info.transports for info in view.instances(2.0)] == [over, ()]
    first, silent = view.instance_facts()
    assert (first.heard_at, first.max_running, first.queue) == (2.0, 8, queue)
    assert first.running == (
        (old, {"k0": BlockCount(3, True)}),
        (young, {"k0": BlockCount(2, True)}),
    )
    assert (silent.heard_at, silent.running, silent.queue) == (-math.inf, (), ())
    known, unknown = view.kvdaemon_facts()
    assert (known.heard_at, known.report) == (1.0, formatted(3))
    assert (unknown.heard_at, unknown.report) == (-math.inf, None)

    older = old._replace(context_tokens=192)
    change = told(2, 0, (PlacementEntry("old", "k1", 4, False),), max_running=8, progress=(older,))
    report(view, "instance/a", change, sequence=1, now=3.0)
    (entry, _) = view.instance_facts()[0].running
    assert entry == (older, {"k0": BlockCount(3, True), "k1": BlockCount(4, False)})
    assert view.instance_facts()[0].queue == queue  # unchanged
    assert view.instances(3.0)[0].transports == over
    report(view, "instance/a", told(1, 0, (), ("young",), max_running=8, queue=()), sequence=2, now=4.0)
    assert [progress.request_id for progress, _ in view.instance_facts()[0].running] == ["old"]
    assert view.instance_facts()[0].queue == ()


@pytest.mark.parametrize(
    "wrong",
    [
        InstanceReport(1, 0, placement=PlacementColumns((7,), (0,), (1,))),  # no such request
        InstanceReport(1, 0, placement=PlacementColumns((0,), (7,), (1,))),  # no such daemon
        InstanceReport(1, 0, progress=ProgressColumns((7,), (64,))),
        InstanceReport(1, 0, ended=(7,)),
        InstanceReport(1, 0, placement=PlacementColumns((0,), (0,), (1, 2))),
        InstanceReport(1, 0, progress=ProgressColumns((0, 0), (64,))),
    ],
)
def test_what_was_not_named_is_not_taken_in(wrong: InstanceReport) -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a")}, 0.0)
    view.set_kvdaemons(daemons("k"), 0.0)
    named = (NamedRequest(0, "r", 1.0, 500),), (NamedKvDaemon(0, "k", True),)
    report(view, "instance/a", InstanceReport(1, 0, *named, PlacementColumns((0,), (0,), (5,))))
    with pytest.raises(InvalidRequestError):
        report(view, "instance/a", wrong, sequence=1)
    assert placement(view) == {("a", "r", "k"): 5}


def test_hints_are_shown_until_a_plan_says_otherwise() -> None:
    view = ClusterView()
    view.set_instances({"a": instance("a"), "b": instance("b")}, 0.0)
    before = view.load_version
    view.set_hints({"b": AdmissionHint(640, 1.5)})
    assert view.load_version > before
    before = view.load_version
    view.set_hints({"b": AdmissionHint(640, 1.5)})
    assert view.load_version == before
    assert [info.hint for info in view.instances(0.0)] == [None, AdmissionHint(640, 1.5)]
    view.forget_reports()
    assert [info.hint for info in view.instances(0.0)] == [None, None]
