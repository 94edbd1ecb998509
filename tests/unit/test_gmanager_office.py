"""Leading, standing by, and what is between: who answers, and who may give orders."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable

import pytest
from gmanager_office import GMANAGER, PlayedReign
from told import told

from infinitellm.internal.v1 import gmanager_pb2
from services.core.errors import NotLeaderError, UnavailableError
from services.core.placement import Heartbeat, PlacementEntry
from services.gmanager.office import Office, hold_office
from services.gmanager.planning import NoPlanning
from services.gmanager.reception import Reception
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView
from services.runtime.election import Leader
from services.runtime.membership import Member, encode_member

OTHER = dataclasses.replace(GMANAGER, member_id="other", address="127.0.0.1:2")


def leader(member: Member, token: int) -> Leader:
    return Leader(encode_member(member), token)


class Steps:
    """Counts how often an office was lost to another."""

    def __init__(self) -> None:
        self.down = 0
        self.office = Office(GMANAGER, self._down)

    def _down(self) -> None:
        self.down += 1


def test_a_standby_refuses_and_says_who_leads() -> None:
    office = Steps().office
    assert office.fencing_token is None
    with pytest.raises(NotLeaderError, match="nobody yet"):
        office.require()
    office.observed(leader(OTHER, 5))
    with pytest.raises(NotLeaderError, match="other at"):
        office.require()


def test_without_a_lease_no_orders_but_answers_until_a_successor_is_known() -> None:
    """etcd is away: nobody else can be elected, so the cache goes on answering."""
    steps, reign = Steps(), PlayedReign(7)
    steps.office.elected(reign)
    assert steps.office.fencing_token == 7
    reign.held = False
    assert steps.office.fencing_token is None
    steps.office.require()
    steps.office.observed(None)
    steps.office.observed(leader(GMANAGER, 7))
    steps.office.require()
    steps.office.observed(leader(OTHER, 9))
    assert steps.down == 1
    with pytest.raises(NotLeaderError):
        steps.office.require()
    steps.office.observed(leader(OTHER, 9))
    assert steps.down == 1


def test_late_word_of_a_predecessor_is_no_reason_to_step_down() -> None:
    steps = Steps()
    steps.office.elected(PlayedReign(7))
    steps.office.observed(leader(OTHER, 5))
    assert steps.office.fencing_token == 7
    assert steps.down == 0


def test_a_later_leader_deposes_even_who_still_has_a_lease() -> None:
    """A later start of the same process removes the key that this one led with."""
    steps = Steps()
    steps.office.elected(PlayedReign(7))
    steps.office.observed(leader(dataclasses.replace(GMANAGER, epoch=2), 9))
    assert (steps.down, steps.office.fencing_token) == (1, None)


def test_elected_again_the_same_process_goes_on() -> None:
    """Its own later key is seen before the campaign has returned."""
    steps, first = Steps(), PlayedReign(7)
    steps.office.elected(first)
    first.held = False
    steps.office.observed(leader(GMANAGER, 12))
    steps.office.require()
    steps.office.elected(PlayedReign(12))
    assert (steps.office.fencing_token, steps.down) == (12, 0)


def test_stepping_down_forgets_what_was_said_but_not_who_is_there() -> None:
    view = ClusterView()
    view.set_instances({"a": Member("instance", "a", "a:1"), "b": Member("instance", "b", "b:1")}, 0.0)
    view.set_kvdaemons({"k": Member("kvdaemon", "k", "k:1")}, 0.0)
    for name in ("a", "b"):
        report = told(1, 0, (PlacementEntry(name, "k", 2, True),))
        view.apply(0, Heartbeat(f"instance/{name}", 0, True, report), 1.0)
    view.set_instances({"a": Member("instance", "a", "a:1")}, 2.0)  # b's lease is lost, its heartbeats come
    version = view.load_version
    view.forget_reports()
    assert view.requests() == ()
    assert [(info.member.member_id, info.running) for info in view.instances(3.0)] == [("a", 0)]
    assert view.load_version > version


async def _messages(*messages: gmanager_pb2.HeartbeatRequest) -> AsyncIterator[gmanager_pb2.HeartbeatRequest]:
    for message in messages:
        yield message


async def _never(stream: AsyncIterator[object]) -> None:
    async for _ in stream:
        raise AssertionError("a standby answered")


def test_a_standby_answers_nothing() -> None:
    async def scenario() -> None:
        view = ClusterView()
        view.set_instances({"a": Member("instance", "a", "a:1")}, 0.0)
        reception = Reception(view, NoPlanning(), lambda: 0.0)
        servicer = GManagerServicer(MembershipSignal(), 0.01, Steps().office, reception)
        report = gmanager_pb2.InstanceReport(running_requests=1)
        full = gmanager_pb2.HeartbeatRequest(member="instance/a", full=True, instance=report)
        relayed = gmanager_pb2.RelayHeartbeatsRequest(heartbeats=[gmanager_pb2.RelayedHeartbeat(heartbeat=full)])
        calls: list[Callable[[], object]] = [
            lambda: servicer.Heartbeat(_messages(full), None),
            lambda: _never(servicer.RelayHeartbeats(_messages(relayed), None)),
            lambda: servicer.FindRoom(gmanager_pb2.FindRoomRequest(), None),
            lambda: servicer.GetClusterView(gmanager_pb2.GetClusterViewRequest(), None),
            lambda: _never(servicer.WatchInstances(gmanager_pb2.WatchInstancesRequest(), None)),
        ]
        for call in calls:
            with pytest.raises(NotLeaderError):
                await call()  # type: ignore[misc]
        assert view.instances(0.0)[0].running == 0

    asyncio.run(scenario())


def test_streams_end_when_another_leads() -> None:
    """Whoever watches and whoever sends heartbeats goes to the new leader."""

    async def scenario() -> None:
        view, changed, ended = ClusterView(), MembershipSignal(), asyncio.Event()
        office = Office(GMANAGER, changed.notify)
        office.elected(PlayedReign(7))
        servicer = GManagerServicer(changed, 3600.0, office, Reception(view, NoPlanning(), lambda: 0.0))

        async def watch() -> None:
            async for _ in servicer.WatchInstances(gmanager_pb2.WatchInstancesRequest(), None):
                ended.set()

        async def heartbeats() -> AsyncIterator[gmanager_pb2.HeartbeatRequest]:
            report = gmanager_pb2.InstanceReport()
            yield gmanager_pb2.HeartbeatRequest(member="instance/a", full=True, instance=report)
            await ended.wait()
            office.observed(leader(OTHER, 9))
            yield gmanager_pb2.HeartbeatRequest(member="instance/a", sequence=1)

        async with asyncio.timeout(10):
            watching = asyncio.create_task(watch())
            await ended.wait()
            with pytest.raises(NotLeaderError):
                await servicer.Heartbeat(heartbeats(), None)
            with pytest.raises(NotLeaderError):
                await watching

    asyncio.run(scenario())


class PlayedElection:
    """An election of which the test says how it goes."""

    def __init__(self) -> None:
        self.leaders: asyncio.Queue[Leader | None] = asyncio.Queue()
        self.victories: asyncio.Queue[PlayedLeadership] = asyncio.Queue()
        self.removable: list[bytes] = []
        self.failures = 1

    async def observe(self) -> AsyncIterator[Leader | None]:
        while True:
            yield await self.leaders.get()

    async def campaign(self, value: bytes, ttl_s: int) -> PlayedLeadership:
        return await self.victories.get()

    async def remove(self, unwanted: Callable[[bytes], bool]) -> None:
        if self.failures:
            self.failures -= 1
            raise UnavailableError("etcd is away")
        self.removable = [value for value in self.removable if not unwanted(value)]


class PlayedLeadership(PlayedReign):
    def __init__(self, token: int) -> None:
        super().__init__(token)
        self.lost = asyncio.Event()
        self.resigned = False

    async def resign(self) -> None:
        self.resigned = True


def test_the_office_is_sought_again_and_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.gmanager.office.RETRY_S", 0.01)

    async def scenario() -> None:
        election, steps = PlayedElection(), Steps()
        election.removable = [encode_member(OTHER), encode_member(dataclasses.replace(GMANAGER, epoch=0)), b"odd"]
        first, second, third = (PlayedLeadership(token) for token in (7, 12, 20))

        async def token(expected: int | None) -> None:
            while True:
                if steps.office.fencing_token == expected:
                    return
                await asyncio.sleep(0.001)

        async with asyncio.timeout(10):
            holding = asyncio.create_task(hold_office(steps.office, election, 5))  # type: ignore[arg-type]
            election.victories.put_nowait(first)
            await token(7)
            assert election.removable == [encode_member(OTHER), b"odd"]
            first.held = False
            first.lost.set()
            election.victories.put_nowait(second)
            await token(12)
            assert (first.resigned, steps.down) == (True, 0)
            election.leaders.put_nowait(leader(OTHER, 15))  # deposed, though its lease is good
            await token(None)
            assert steps.down == 1
            election.victories.put_nowait(third)
            await token(20)
            assert second.resigned
            holding.cancel()
            await asyncio.wait([holding])
            assert third.resigned

    asyncio.run(scenario())
