"""Heartbeats survive the wire: what a process says is what the view takes in."""

from __future__ import annotations

import asyncio

import pytest
from gmanager_office import leading

from infinitellm.internal.v1 import gmanager_pb2
from services.core.blocks import PoolGeometry
from services.core.errors import InvalidRequestError
from services.core.placement import (
    AdmissionHint,
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    MoveEnd,
    MoveReport,
    NamedKvDaemon,
    NamedRequest,
    PeerTransport,
    PlacementColumns,
    PoolStats,
    ProgressColumns,
    WaitingRequest,
)
from services.core.sequence import RequestAge
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gateway.gmanager_client import _instance as gateway_view
from services.gmanager.heartbeat_messages import heartbeat_from_proto
from services.gmanager.messages import instance_to_proto
from services.gmanager.planning import NoPlanning
from services.gmanager.reception import Reception
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView, InstanceInfo
from services.rmanager.heartbeat_messages import heartbeat_to_proto
from services.runtime.membership import Member

# Values that a float of the wire can hold.
STEP = StepTiming(3.5, 2.0, 640.0, 0.25, 0.125, 0.0625, (RemoteTiming("k", 4.0, 1.5, 512.0, 0.03125, 0.5),), steps=7)
FULL = InstanceReport(
    running=2,
    waiting=1,
    requests=(NamedRequest(3, "r", 1.5, 900), NamedRequest(4, "s")),
    kvdaemons=(NamedKvDaemon(0, "k", True), NamedKvDaemon(300, "k1", False)),
    placement=PlacementColumns((3, 4), (0, 300), (5, 0)),
    progress=ProgressColumns((3,), (320,)),
    ended=(4,),
    oldest_starving=RequestAge(1.5, "r"),
    max_running=8,
    moves=(MoveReport("m", "r", "k", "k1", 3, 0.5, MoveEnd.SOURCE_LOST),),
    queue=(WaitingRequest(100, 50),),
    transports=(PeerTransport("k1", "shm"),),
)


@pytest.mark.parametrize(
    "heartbeat",
    [
        Heartbeat("instance/a", 0, True, FULL, (STEP,)),
        Heartbeat("instance/a", 1, False, InstanceReport(0, 0), (STEP, StepTiming(1, 0, 64, 0.5, 0.25, 0.25))),
        Heartbeat("instance/a", 2, False, InstanceReport(0, 0, queue=(), transports=())),  # empty now, not unchanged
        Heartbeat("instance/a", 3, False, None),
        Heartbeat("instance/a", 0, True, InstanceReport(0, 0), lost_relay="127.0.0.1:7200"),
        Heartbeat("kvdaemon/k", 0, True, KvDaemonReport(PoolStats(1024))),
        Heartbeat(
            "kvdaemon/k",
            1,
            False,
            KvDaemonReport(PoolStats(1024, 64, 16, 1, 2, 3, 4, 6), PoolGeometry(2, 2, 16, 32, "float32")),
            (HostingTiming(4.0, 128.0, 0.5),),
        ),
    ],
)
def test_heartbeats_survive_the_wire(heartbeat: Heartbeat) -> None:
    wire = heartbeat_to_proto(heartbeat).SerializeToString()
    assert heartbeat_from_proto(gmanager_pb2.HeartbeatRequest.FromString(wire)) == heartbeat


def test_what_cannot_be_is_refused() -> None:
    odd = gmanager_pb2.HeartbeatRequest(member="instance/a")
    odd.instance.moves.add(move_id="m", end="SOMEHOW")
    with pytest.raises(InvalidRequestError, match="SOMEHOW"):
        heartbeat_from_proto(odd)


def test_hints_reach_the_gateway() -> None:
    info = InstanceInfo(Member("instance", "a", "a:1"), 1, 2, 3, 0.5)
    assert gateway_view(instance_to_proto(info)).hint is None
    hinted = InstanceInfo(Member("instance", "a", "a:1"), 1, 2, 3, 0.5, AdmissionHint(640, 2.5))
    assert gateway_view(instance_to_proto(hinted)).hint == AdmissionHint(640, 2.5)


def test_the_view_of_the_cluster_names_the_leader() -> None:
    view = ClusterView()
    view.set_gmanagers({"g": Member("gmanager", "g", "g:1"), "h": Member("gmanager", "h", "h:1")}, 0.0)
    servicer = GManagerServicer(MembershipSignal(), 1.0, leading(), Reception(view, NoPlanning(), lambda: 0.0))
    answer = asyncio.run(servicer.GetClusterView(gmanager_pb2.GetClusterViewRequest(), None))
    assert [(one.gmanager_id, one.leads) for one in answer.gmanagers] == [("g", True), ("h", False)]
    assert not answer.HasField("planner")
