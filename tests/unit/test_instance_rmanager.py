"""The instance's rManager against real daemons' control servers and a real gManager's, while they come and go."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from gmanager_office import leading
from opentelemetry.trace import Tracer

from infinitellm.internal.v1 import kvdaemon_pb2, kvdaemon_pb2_grpc
from infinitellm.internal.v1.gmanager_pb2_grpc import add_GManagerServiceServicer_to_server
from services.core.blocks import BLOCK_KEY_BYTES, PoolGeometry
from services.core.errors import PeerLostError, UnavailableError
from services.core.placement import Heartbeat, InstanceReport, KvDaemonReport
from services.core.sequence import RequestAge
from services.dataplane.loopback import LoopbackHub, LoopbackTransport
from services.dataplane.negotiation import Offers
from services.dataplane.peers import PeerSet
from services.dataplane.transport import Limits
from services.gmanager.planning import NoPlanning
from services.gmanager.reception import Reception
from services.gmanager.servicer import GManagerServicer, MembershipSignal
from services.gmanager.view import ClusterView
from services.instance.capacity import MEMORY_S, SETTLE_S, Capacity
from services.instance.control import (
    EndSession,
    EngineEvent,
    PromptDeferred,
    PromptReserved,
    Replenish,
    Replenished,
    ReservePrompt,
)
from services.instance.rmanager import RManager, RManagerSettings
from services.kvdaemon.server import KvDaemonServicer, SessionTerms
from services.kvdaemon.sessions import Sessions, SharedLedger
from services.rmanager.daemon_client import DaemonSession
from services.rmanager.gmanager_client import GManagerClient
from services.rmanager.ledger import Ledger
from services.runtime.grpc_server import bind, make_server
from services.runtime.membership import Member

GEOMETRY = PoolGeometry(layers=1, kv_heads=1, block_tokens=16, head_dim=16, dtype="float32")
DEADLINE_S = 20.0


class Gate:
    """Where calls wait while it is closed; ``asked`` is set when one comes."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.open = asyncio.Event()
        self.open.set()

    async def enter(self) -> None:
        self.asked.set()
        await self.open.wait()


class Daemon(KvDaemonServicer):
    """A daemon's control server."""

    def __init__(self, name: str, blocks: int, tracer: Tracer | None = None) -> None:
        self.name = name
        self.ledger = SharedLedger(Ledger(blocks * GEOMETRY.block_bytes, itertools.count(1).__next__))
        self.reserving, self.releasing = Gate(), Gate()
        self._server = make_server(tracer=tracer)
        super().__init__(
            self.ledger, Sessions(self.ledger, lambda: None), SessionTerms(Offers((f"loopback:{name}",)), "", 1.0, 5.0)
        )
        kvdaemon_pb2_grpc.add_KvDaemonServiceServicer_to_server(self, self._server)
        self.address = bind(self._server, "127.0.0.1:0")

    async def __aenter__(self) -> Daemon:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(grace=None)

    async def Reserve(self, request: kvdaemon_pb2.ReserveRequest, context: object) -> kvdaemon_pb2.ReserveResponse:
        await self.reserving.enter()
        return await super().Reserve(request, context)  # type: ignore[arg-type]

    async def Release(self, request: kvdaemon_pb2.ReleaseRequest, context: object) -> kvdaemon_pb2.ReleaseResponse:
        await self.releasing.enter()
        return await super().Release(request, context)  # type: ignore[arg-type]

    async def wait_for_sessions(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                with self.ledger as ledger:
                    if ledger.open_sessions == count:
                        return
                await asyncio.sleep(0.01)

    def reserved(self) -> int:
        with self.ledger as ledger:
            return ledger.stats().reserved

    def session(self, instance: str, mapped: bool = False) -> DaemonSession:
        return DaemonSession(
            self.name,
            self.address,
            instance_id=instance,
            epoch=1,
            geometry=GEOMETRY,
            mapped=mapped,
            on_lost=lambda *_: None,
            call_timeout_s=DEADLINE_S,
        )


class HangingGManager(GManagerServicer):
    """Answers nothing, as one that is stopped."""

    async def FindRoom(self, request: object, context: object) -> object:
        await asyncio.Event().wait()


@asynccontextmanager
async def gmanager(
    view: ClusterView, servicer: type[GManagerServicer] = GManagerServicer
) -> AsyncIterator[GManagerClient]:
    server = make_server()
    add_GManagerServiceServicer_to_server(
        servicer(MembershipSignal(), 1.0, leading(), Reception(view, NoPlanning(), lambda: 0.0)), server
    )
    address = bind(server, "127.0.0.1:0")
    await server.start()

    async def locate() -> str:
        return address

    client = GManagerClient(locate)
    yield client
    await client.close()
    await server.stop(grace=None)


class Rig:
    """An rManager with a local daemon of 4 blocks and two lenders of 8; use ``rig()``."""

    def __init__(
        self,
        rmanager: RManager,
        daemons: tuple[Daemon, Daemon, Daemon],
        events: asyncio.Queue[EngineEvent],
        view: ClusterView,
    ):
        self.rmanager = rmanager
        self.view = view  # the gManager's
        self.local, self.first, self.second = daemons
        self.events = events

    def reserve(
        self, attempt: int, blocks: int, most: int | None = None, expected: int | None = None, peak: int = 0
    ) -> None:
        """Orders a prompt's reservation.

        Args:
            blocks: of the prompt, the open one among them.
            most, expected: in the end, if more than that.
            peak: that all of its instance's requests are expected to want together.
        """
        age, most, expected = RequestAge(1.0, "r"), most or blocks, expected or blocks
        self.rmanager.order(ReservePrompt(age, attempt, (), blocks - 1, most, expected, peak))

    async def answer(self, attempt: int) -> PromptReserved | PromptDeferred:
        async with asyncio.timeout(DEADLINE_S):
            while True:
                event = await self.events.get()
                if isinstance(event, PromptReserved | PromptDeferred) and event.attempt == attempt:
                    return event

    def want_first(self) -> None:
        """The first lender belongs to an instance whose own requests wait."""
        lender = Member("instance", "other", "other:1", local_kvdaemon_id=self.first.name)
        self.view.set_instances({"other": lender}, 0.0)
        self.view.apply(1, Heartbeat("instance/other", 0, True, InstanceReport(1, 1)), 0.0)

    async def replenish(self, blocks: int, spare_wanted: bool) -> list[str]:
        """Whose blocks came, each daemon once for each."""
        self.rmanager.order(Replenish(blocks, spare_wanted))
        async with asyncio.timeout(DEADLINE_S):
            while not isinstance(event := await self.events.get(), Replenished):
                pass
        return ["local"] * len(event.local) + [ref.kvdaemon_id for ref in event.remote]

    def reserved(self) -> tuple[int, int, int]:
        return self.local.reserved(), self.first.reserved(), self.second.reserved()


@asynccontextmanager
async def rig(tracer: Tracer | None = None) -> AsyncIterator[Rig]:
    local, first, second = daemons = Daemon("local", 4), Daemon("first", 8, tracer), Daemon("second", 8)
    view = ClusterView()
    view.set_kvdaemons({d.name: Member("kvdaemon", d.name, d.address) for d in (first, second)}, 0.0)
    for daemon in (first, second):
        with daemon.ledger as ledger:
            report = KvDaemonReport(ledger.stats(), None)
        view.apply(0, Heartbeat(f"kvdaemon/{daemon.name}", 0, True, report), 0.0)
    events: asyncio.Queue[EngineEvent] = asyncio.Queue()
    peers = PeerSet(LoopbackTransport(LoopbackHub(), "instance"), Limits(1 << 16, 1 << 18), 1 << 12)
    async with local, first, second, gmanager(view) as client:
        own = local.session("i")
        await own.open()
        settings = RManagerSettings("i", GEOMETRY, 0, DEADLINE_S)
        rmanager = RManager(settings, own, client, peers, events.put_nowait, lambda reason: pytest.fail(reason), tracer)
        yield Rig(rmanager, daemons, events, view)
        await rmanager.close()
        await own.close()
    peers.close()


def test_blocks_of_a_session_that_ended_are_never_handed_to_the_engine() -> None:
    """Two lenders are asked for room. While the second one thinks, the first one's session ends and another begins:
    handles of the old session would name blocks of the new one, which may hold something else."""

    async def run() -> None:
        async with rig() as r:
            r.second.reserving.open.clear()
            r.reserve(1, 12)  # 4 of each daemon
            await r.second.reserving.asked.wait()
            assert r.reserved() == (4, 4, 0)
            r.rmanager.order(EndSession("first", 1, "its data connection broke"))
            await r.first.wait_for_sessions(0)
            r.second.reserving.open.set()
            assert isinstance(await r.answer(1), PromptDeferred)
            r.reserve(2, 12)
            assert isinstance(await r.answer(2), PromptReserved)
            assert r.reserved() == (4, 4, 4)

    asyncio.run(run())


def test_a_lender_that_is_lost_while_it_gets_its_blocks_back_costs_no_answer() -> None:
    """The engine would wait for ever, and with it everybody younger than the prompt."""

    async def run() -> None:
        async with rig() as r:
            r.reserve(1, 12)
            assert isinstance(await r.answer(1), PromptReserved)
            r.first.releasing.open.clear()
            r.reserve(2, 9)  # one more than there is left: what was got is given back
            await r.first.releasing.asked.wait()
            r.rmanager.order(EndSession("first", 1, "its data connection broke"))
            assert isinstance(await r.answer(2), PromptDeferred)
            await r.first.wait_for_sessions(0)
            assert r.reserved() == (4, 0, 4)
            r.first.releasing.open.set()

    asyncio.run(run())


def test_questions_to_a_gmanager_that_hangs_all_fail_and_none_vanishes() -> None:
    """The first one that times out closes the channel, which cancels the calls of the others."""

    async def run() -> None:
        async with gmanager(ClusterView(), HangingGManager) as client:
            questions = [asyncio.create_task(client.find_room(GEOMETRY, timeout_s=s)) for s in (0.3, DEADLINE_S, 10.0)]
            answers = await asyncio.gather(*questions, return_exceptions=True)
            assert [type(answer) for answer in answers] == [UnavailableError] * 3

            task = asyncio.create_task(client.find_room(GEOMETRY, timeout_s=DEADLINE_S))
            await asyncio.sleep(0.1)
            task.cancel()
            assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

    asyncio.run(run())


def test_a_call_of_a_session_that_is_closed_meanwhile_fails() -> None:
    async def run() -> None:
        async with Daemon("d", 4) as daemon:
            session = daemon.session("i")
            await session.open()
            daemon.reserving.open.clear()
            calls = [asyncio.create_task(session.reserve(1, 0)) for _ in range(2)]  # one is sent, one waits its turn
            await daemon.reserving.asked.wait()
            await session.close()
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(answer) for answer in answers] == [PeerLostError] * 2
            daemon.reserving.open.set()

    asyncio.run(run())


def test_capacity_is_judged_over_a_while() -> None:
    capacity = Capacity(now=100.0)
    capacity.see(30, 100.5)
    assert capacity.limit(101.0) is None  # not all daemons may have been seen
    now = 100.0 + SETTLE_S
    assert capacity.limit(now) == 30
    capacity.see(0, now)  # the gManager was started again and knows nobody yet
    assert capacity.limit(now + 1) == 30
    capacity.see(20, now + 2)
    capacity.see(10, now + 3)
    assert capacity.limit(now + MEMORY_S) == 20  # what was known before all that is too long ago
    assert capacity.limit(now + 10 * MEMORY_S) == 10


def test_who_waits_for_an_older_request_is_told_so() -> None:
    """It does not starve itself then; if all who wait said so, a cluster would admit one prompt after the other."""

    async def run() -> None:
        async with rig() as r:
            r.view.set_instances({"other": Member("instance", "other", "other:1")}, 0.0)
            starving = InstanceReport(0, 1, oldest_starving=RequestAge(0.5, "older"))
            r.view.apply(1, Heartbeat("instance/other", 0, True, starving), 0.0)
            r.reserve(1, 1)
            answer = await r.answer(1)
            assert isinstance(answer, PromptDeferred)
            assert not answer.starves
            assert r.reserved() == (0, 0, 0)

    asyncio.run(run())


def test_who_fits_at_home_takes_nothing_from_an_instance_whose_own_requests_wait() -> None:
    """But who does not fit takes what it can get; and of daemons that nobody waits for, anybody."""

    async def run() -> None:
        async with rig() as r:
            r.want_first()
            r.reserve(1, 4)  # all of the local pool
            assert isinstance(await r.answer(1), PromptReserved)
            r.reserve(2, 4)
            answer = await r.answer(2)
            assert isinstance(answer, PromptReserved)
            assert r.reserved() == (4, 0, 4), "only of the second, whose memory nobody waits for"
            r.reserve(3, 4)
            assert isinstance(await r.answer(3), PromptReserved)
            assert r.reserved() == (4, 0, 8)
            r.reserve(4, 4)
            deferred = await r.answer(4)
            assert isinstance(deferred, PromptDeferred)
            assert not deferred.starves, "it waits for room at home, and nobody need make any for it"
            assert deferred.missing == 4
            r.reserve(5, 4, most=5)
            assert isinstance(await r.answer(5), PromptReserved)
            assert r.reserved() == (4, 4, 8), "longer than its own pool: it depends on others"
            r.reserve(6, 5)
            deferred = await r.answer(6)
            assert isinstance(deferred, PromptDeferred)
            assert (deferred.starves, deferred.missing) == (True, 1)

    asyncio.run(run())


def test_who_can_give_way_at_home_grows_not_on_an_instance_whose_own_requests_wait() -> None:
    async def run() -> None:
        async with rig() as r:
            r.want_first()
            assert await r.replenish(6, spare_wanted=True) == ["local"] * 4 + ["second"] * 2
            assert await r.replenish(8, spare_wanted=True) == ["second"] * 6
            assert await r.replenish(1, spare_wanted=True) == []
            assert await r.replenish(1, spare_wanted=False) == ["first"]

    asyncio.run(run())


def test_who_would_want_too_much_later_together_with_others_waits() -> None:
    """More than half as much again as the own pool has and there is to spare; it fits now, and takes nothing."""

    async def run() -> None:
        async with rig() as r:
            r.want_first()
            r.reserve(1, 1, peak=6 + 8 + 1)  # the own pool has 4; the second, whose memory nobody waits for, 8
            deferred = await r.answer(1)
            assert isinstance(deferred, PromptDeferred)
            assert (deferred.starves, deferred.missing) == (False, 0)
            assert r.reserved() == (0, 0, 0)
            r.reserve(2, 1, most=20, expected=4, peak=6 + 8 + 1)  # it may become longer than its own pool
            assert isinstance(await r.answer(2), PromptDeferred)
            r.reserve(3, 1, most=20, expected=5, peak=100)  # it will: it depends on others anyway
            assert isinstance(await r.answer(3), PromptReserved)
            r.reserve(4, 1, peak=6 + 8)
            assert isinstance(await r.answer(4), PromptReserved)

    asyncio.run(run())


def test_what_is_cached_of_a_prompt_is_not_wanted_again() -> None:
    async def run() -> None:
        async with rig() as r:
            session = r.rmanager._local
            key = b"k" * BLOCK_KEY_BYTES
            await session.seal([(handle, key) for handle in await session.reserve(1, 0)])
            order = ReservePrompt(RequestAge(1.0, "r"), 1, (), 1, 2, 2, peak_blocks=6 + 16 + 1)
            r.rmanager.order(order)
            assert isinstance(await r.answer(1), PromptDeferred)
            r.rmanager.order(replace(order, attempt=2, keys=(key,)))
            reserved = await r.answer(2)
            assert isinstance(reserved, PromptReserved)
            assert len(reserved.attached) == 1

    asyncio.run(run())
