"""From heartbeats to orders: what the planner is told, what becomes of its moves, and who may order them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from gmanager_office import PlayedReign, leading

from services.core.blocks import PoolGeometry
from services.core.errors import TransferTimeoutError
from services.core.placement import (
    BlockCount,
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    MoveEnd,
    MoveReport,
    PlacementEntry,
    PoolStats,
    RunningRequest,
    WaitingRequest,
)
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gmanager.instance_client import MoveAnswer, MoveOrder
from services.gmanager.learning import FIRST, KnownCosts, Learning, like_instance
from services.gmanager.move_book import FORGOTTEN_S, MEASURE_S, MoveBook
from services.gmanager.office import Office
from services.gmanager.output_rate import OutputRates
from services.gmanager.planner.load import RemoteShare, WaitingLoad
from services.gmanager.planner.plan import Move
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner_input import make_load, with_moves
from services.gmanager.planning import ActivePlanning
from services.gmanager.view import ClusterView, InstanceFacts, KvDaemonFacts
from services.runtime.membership import Member

GEOMETRY = PoolGeometry(layers=2, kv_heads=2, block_tokens=64, head_dim=32, dtype="float32")
BLOCK = GEOMETRY.block_bytes
MOVE = Move("lend", "long", "a", "ka", "kb", 10, 5.0, "for a reason")


def instance(name: str) -> Member:
    return Member("instance", name, f"{name}:1", "m", 100_000, f"k{name}")


def pool(total: int, free: int, workspace: int = 4) -> KvDaemonReport:
    stats = PoolStats(total * BLOCK, BLOCK, total, free=free, workspace=workspace, in_use=total - free - workspace)
    return KvDaemonReport(stats, GEOMETRY)


def facts(
    *running: tuple[RunningRequest, dict[str, BlockCount]], queue: tuple[WaitingRequest, ...] = ()
) -> InstanceFacts:
    return InstanceFacts(instance("a"), 5.0, 8, running, queue)


def daemon_facts(name: str, report: KvDaemonReport | None) -> KvDaemonFacts:
    return KvDaemonFacts(Member("kvdaemon", name, f"{name}:2"), 5.0, report)


class TestLoad:
    def test_requests_and_pools(self) -> None:
        where = {"ka": BlockCount(4, True), "km": BlockCount(6, False)}
        entry = (RunningRequest("r", 1.0, 9 * 64, 1000), where)
        daemons = [daemon_facts("ka", pool(20, 5)), daemon_facts("km", pool(30, 20, workspace=0))]
        learned = Learning()
        learned.observe("instance/a", (StepTiming(1, 0, 1000, 0.03, 0.02, 0.02),) * FIRST, 0.0)
        load = make_load([facts(entry, queue=(WaitingRequest(70, 30),))], daemons, learned.known, {"r": 3.0})
        (told,) = load.instances
        assert (told.instance_id, told.kvdaemon_id, told.max_batch, told.heard_at) == ("a", "ka", 8, 5.0)
        assert told.waiting == (WaitingLoad(70, 30),)
        (request,) = told.requests
        assert (request.context_tokens, request.remaining_tokens) == (576, 424)
        assert (request.local_blocks, request.movable_blocks) == (4, 3)  # one is open
        assert request.remote == (RemoteShare("km", 6),)
        assert request.moved_at == 3.0
        assert [(d.kvdaemon_id, d.total_blocks, d.free_blocks) for d in load.kvdaemons] == [
            ("ka", 16, 5),
            ("km", 30, 20),
        ]

    def test_pools_that_nobody_has_formatted_can_take_the_only_geometry_there_is(self) -> None:
        plain = KvDaemonReport(PoolStats(7 * BLOCK))
        daemons = [daemon_facts("ka", pool(20, 5)), daemon_facts("km", plain), daemon_facts("silent", None)]
        load = make_load([facts()], daemons, KnownCosts(), {})
        assert [(d.kvdaemon_id, d.free_blocks) for d in load.kvdaemons] == [("ka", 5), ("km", 7)]
        other = KvDaemonReport(PoolStats(BLOCK, BLOCK, 1, free=1), PoolGeometry(1, 1, 64, 8, "float32"))
        load = make_load([facts()], [*daemons, daemon_facts("ko", other)], KnownCosts(), {})
        assert [d.kvdaemon_id for d in load.kvdaemons] == ["ka", "ko"]

    def test_what_is_not_known_is_taken_from_those_alike(self) -> None:
        idle = InstanceFacts(instance("b"), 5.0, 8, (), ())
        daemons = [daemon_facts(name, pool(20, 5)) for name in ("ka", "kb", "km")]
        learned = Learning()
        load = make_load([facts(), idle], daemons, learned.known, {})
        assert [i.heard_at for i in load.instances] == [-math.inf] * 2  # left alone
        step = StepTiming(1, 0, 1000, 0.03, 0.021, 0.021)
        learned.observe("instance/a", (step,) * 5, 0.0)
        load = make_load([facts(), idle], daemons, learned.known, {})
        costs = learned.known.instances.get("a")
        assert costs is not None
        assert [(i.heard_at, i.costs) for i in load.instances] == [(5.0, costs)] * 2
        assert [d.costs for d in load.kvdaemons] == [like_instance(costs, GEOMETRY.layers)] * 3
        remote = RemoteTiming("km", 2, 1, 640, 0.5)
        learned.observe("instance/a", (replace(step, remotes=(remote,)),) * 5, 0.0)
        load = make_load([facts(), idle], daemons, learned.known, {})
        assert load.kvdaemons[2].costs == learned.known.kvdaemons["km"]

    def test_moves_under_way_count_as_done_but_for_room_that_is_reserved_already(self) -> None:
        where = {"ka": BlockCount(12, True), "kb": BlockCount(2, False)}
        entry = (RunningRequest("long", 1.0, 13 * 64, 2000), where)
        daemons = [daemon_facts("ka", pool(20, 1)), daemon_facts("kb", pool(30, 10))]
        load = make_load([facts(entry)], daemons, KnownCosts(), {})
        moves = [Move("lend", "long", "a", "ka", "kb", 3, 1.0, ""), Move("lend", "gone", "a", "ka", "kb", 9, 1.0, "")]
        then = with_moves(load, moves, 7.0)
        (request,) = then.instances[0].requests
        assert (request.local_blocks, request.movable_blocks) == (9, 8)
        assert request.remote == (RemoteShare("kb", 5),)
        assert request.moved_at == 7.0
        assert [(d.free_blocks, d.leaving_blocks, d.coming_blocks) for d in then.kvdaemons] == [(4, 3, 0), (10, 0, 3)]


def steps_like(batch: int, tokens: int, factor: float = 1.0, *remotes: RemoteTiming) -> StepTiming:
    """30 ms and 2 ms for each batch token, 10 us for each context token."""
    other_s, local_s = factor * (0.03 + 0.002 * batch), factor * 1e-5 * tokens
    return StepTiming(batch, 0, tokens, other_s + local_s, local_s, local_s, remotes)


class TestLearning:
    def test_the_first_timings_set_the_scale(self) -> None:
        learned = Learning()
        learned.observe("instance/a", (steps_like(1, 1000),) * (FIRST - 1), 0.0)
        assert learned.known.instances.get("a") is None
        learned.observe("instance/a", (steps_like(1, 1000, factor=50.0), steps_like(1, 1000)), 0.0)  # an outlier
        costs = learned.known.instances.get("a")
        assert costs is not None
        assert costs.other_s(1) == pytest.approx(0.032, rel=0.2)
        assert costs.local_s(1000) == pytest.approx(0.01, rel=0.2)

    def test_after_a_great_change_it_begins_again(self) -> None:
        learned = Learning()
        for number in range(200):
            learned.observe("instance/a", (steps_like(1 + number % 4, 1000 + 10 * number),), 0.0)
        error = learned.step_error("a")
        assert error is not None
        assert error < 0.05
        for number in range(60):
            learned.observe("instance/a", (steps_like(1 + number % 4, 3000 + 10 * number, factor=6.0),), 0.0)
        costs = learned.known.instances.get("a")
        assert costs is not None
        assert costs.other_s(2) == pytest.approx(6 * 0.034, rel=0.15)
        assert costs.local_s(3000) == pytest.approx(6 * 0.03, rel=0.15)

    def test_a_daemons_first_answers_say_how_far_it_is(self) -> None:
        learned = Learning()
        for number in range(100):
            learned.observe("instance/a", (steps_like(1, 1000 * (1 + number % 7)),), 0.0)
        far = RemoteTiming("k", 2, 1, 640, 0.5)
        learned.observe("instance/a", (steps_like(1, 1000, 1.0, far),) * (FIRST - 1), 0.0)
        assert learned.known.kvdaemons.get("k") is None
        learned.observe("instance/a", (steps_like(1, 1000, 1.0, far),) * FIRST, 0.0)
        costs = learned.known.kvdaemons.get("k")
        assert costs is not None
        assert costs.answer_s(2, 1, 640) == pytest.approx(0.5, rel=0.1)
        assert costs.context_token_s == pytest.approx(1e-5, rel=0.3)  # it computes like its debtor
        for _ in range(100):
            learned.observe("kvdaemon/k", (HostingTiming(2, 640.0, 0.1),), 0.0)
        after = learned.known.kvdaemons.get("k")
        assert after is not None
        assert after.compute_s(2, 640) == pytest.approx(0.1, rel=0.3)

    def test_answers_that_came_early_are_bounds(self) -> None:
        """They say something only if less was expected of the daemon."""
        learned = Learning()
        learned.observe("instance/a", (steps_like(1, 1000, 1.0, RemoteTiming("k", 2, 1, 640, 0.1)),) * 2 * FIRST, 0.0)
        before = learned.known.kvdaemons.get("k")
        assert before is not None
        bound = RemoteTiming("k", 2, 1, 640, 0.2, late=0.0)
        learned.observe("instance/a", (steps_like(1, 1000, 1.0, bound),) * 20, 0.0)
        assert learned.known.kvdaemons.get("k") == before
        bound = RemoteTiming("k", 2, 1, 640, 0.01, late=0.0)
        learned.observe("instance/a", (steps_like(1, 1000, 1.0, bound),) * 200, 0.0)
        after = learned.known.kvdaemons.get("k")
        assert after is not None
        assert after.answer_s(2, 1, 640) < 0.02

    def test_who_left_is_forgotten(self) -> None:
        learned = Learning()
        step = replace(steps_like(1, 1000, 1.0, RemoteTiming("k", 2, 1, 640, 0.1)), steps=10)
        learned.observe("instance/a", (step,) * 2 * FIRST, 1.0)
        assert learned.rates.between(["a"], 0.0, 2.0) == 50.0
        assert learned.step_error("a") is not None
        learned.keep([], [])
        assert learned.rates.between(["a"], 0.0, 2.0) == 0.0
        assert (learned.step_error("a"), learned.known) == (None, KnownCosts())


class TestMoveBook:
    def test_a_move_from_plan_to_measured_gain(self) -> None:
        rates = OutputRates()
        book = MoveBook(rates)
        for second in range(1, 60):
            faster = 20 if second > 20 else 10
            rates.observe("a", StepTiming(2, 0, 0, 0.1, 0, 0, steps=faster // 2), float(second))
        book.plan("m", MOVE, ["a", "b", "a"], before_blocks=2, now=10.0)
        assert book.under_way(lambda move: 0) == []  # not accepted yet
        book.accepted("m", 8)
        assert [move.blocks for move in book.under_way(lambda move: 5)] == [5]
        assert book.records[-1].moved_blocks == 3
        report = MoveReport("m", "long", "ka", "kb", 8, 2.5, MoveEnd.DONE)
        ended = book.reported(report, 20.0)
        assert ended is not None
        assert (ended.state, ended.moved_blocks, ended.seconds, ended.concerned) == ("DONE", 8, 2.5, ("a", "b"))
        assert book.reported(report, 21.0) is None  # told of again on a new stream
        assert book.under_way(lambda move: 5) == []
        assert book.measure(20.0 + MEASURE_S - 1) == []
        (measured,) = book.measure(20.0 + MEASURE_S)
        assert measured.measured_gain == 10.0
        assert book.measure(40.0) == []
        assert book.moved_at == {"long": 20.0}
        book.forget_requests(["other"])
        assert book.moved_at == {}

    def test_refused_and_lost_moves_end(self) -> None:
        book = MoveBook(OutputRates())
        book.plan("m", MOVE, ["a"], 0, now=10.0)
        book.refused("m", "DESTINATION_FULL", 11.0)
        book.plan("n", MOVE, ["a"], 0, now=12.0)
        book.accepted("n", 3)
        book.abandon(12.0 + FORGOTTEN_S)
        assert [record.active for record in book.records] == [False, True]
        book.abandon(13.0 + FORGOTTEN_S)
        assert [record.state for record in book.records] == ["DESTINATION_FULL", "LOST"]
        assert book.measure(1000.0) == []
        book.accepted("n", 5)  # its answer comes after its end
        assert [record.active for record in book.records] == [False, False]


class PlayedOrders:
    """Takes orders and answers as it is told."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, MoveOrder]] = []
        self.answer: Callable[[MoveOrder], MoveAnswer] = lambda order: MoveAnswer(order.num_blocks, "")

    async def move_blocks(self, address: str, order: MoveOrder, timeout_s: float) -> MoveAnswer:
        self.taken.append((address, order))
        return self.answer(order)

    async def keep(self, addresses: frozenset[str]) -> None:
        self.kept = addresses


class Rig:
    """A crowded instance "a" with two long requests and three waiting, and an idle one, "b"."""

    def __init__(self, took: Callable[[float], object] = lambda _: None) -> None:
        self.reign = PlayedReign(7)
        self.office: Office = leading(self.reign)
        self.view = ClusterView()
        self.orders = PlayedOrders()
        self.now = 100.0
        self.planning = ActivePlanning(
            self.view, self.office, self.orders, PlannerPolicy(settle_s=10.0), lambda: self.now, 0.01, took
        )
        self.sequences: dict[str, int] = {}
        self.view.set_instances({name: instance(name) for name in ("a", "b")}, self.now)
        self.view.set_kvdaemons({k: Member("kvdaemon", k, f"{k}:2") for k in ("ka", "kb")}, self.now)

    def say(self, member: str, report: InstanceReport | KvDaemonReport | None, *timings: object) -> None:
        sequence = self.sequences.get(member, 0)
        self.sequences[member] = sequence + 1
        heartbeat = Heartbeat(member, sequence, sequence == 0, report, timings)  # type: ignore[arg-type]
        self.view.apply(0, heartbeat, self.now)
        self.planning.observe(heartbeat, self.now)

    def crowd(self, instances: bool = True) -> None:
        self.say("kvdaemon/ka", pool(1004, 0))
        self.say("kvdaemon/kb", pool(2004, 2000))
        # Attention over a whole long context takes 40 ms, all else 5 ms: the idle instance's daemon can help.
        context, steps = 500 * 64, []
        for tokens in (1, 4):
            steps += [StepTiming(tokens, 0, context * tokens, 5e-3 + 0.04 * tokens, 0.04 * tokens, 0.04 * tokens)] * 10
        if instances:
            progress = tuple(RunningRequest(name, at, context, context + 5000) for at, name in enumerate(("r0", "r1")))
            placement = tuple(PlacementEntry(name, "ka", 500, True) for name in ("r0", "r1"))
            queue = tuple(WaitingRequest(1600, 500) for _ in range(3))
            self.say(
                "instance/a", InstanceReport(2, 3, placement, max_running=8, progress=progress, queue=queue), *steps
            )
            self.say("instance/b", InstanceReport(0, 0, max_running=8), *steps)

    async def plans(self, count: int) -> None:
        """Lets the loop make so many plans."""
        start = self.planning.summary.plans
        running = asyncio.create_task(self.planning.run())
        try:
            async with asyncio.timeout(20):
                while self.planning.summary.plans < start + count:
                    assert not running.done()
                    await asyncio.sleep(0.005)
        finally:
            running.cancel()
            await asyncio.wait([running])

    @property
    def states(self) -> list[str]:
        return [record.state for record in self.planning.moves]


def test_a_crowded_instance_lends_to_an_idle_ones_pool() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()
        await rig.plans(3)
        assert rig.orders.taken
        address, order = rig.orders.taken[0]
        assert address == "a:1"
        assert (order.fencing_token, order.source_kvdaemon_id) == (7, "ka")
        assert (order.destination_kvdaemon_id, order.destination_address) == ("kb", "kb:2")
        assert rig.states == ["MOVING"] * len(rig.orders.taken)
        assert len({order.request_id for _, order in rig.orders.taken}) == len(rig.orders.taken)  # none is moved twice
        assert rig.orders.kept == {"a:1", "b:1"}
        summary = rig.planning.summary
        assert summary is not None
        assert [info.hint is not None for info in rig.view.instances(rig.now)] == [False, True]
        # The rManager says how a move ended.
        report = MoveReport(order.move_id, order.request_id, "ka", "kb", 4, 1.0, MoveEnd.DESTINATION_LOST)
        rig.say("instance/a", InstanceReport(2, 3, max_running=8, moves=(report,)))
        assert "DESTINATION_LOST" in rig.states

    asyncio.run(scenario())


def test_refusals_wait_for_a_later_plan() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()
        rig.orders.answer = lambda order: MoveAnswer(0, "DESTINATION_FULL")
        await rig.plans(4)
        first = [order.request_id for _, order in rig.orders.taken]
        assert len(set(first)) == len(first)
        assert set(rig.states) == {"DESTINATION_FULL"}
        for after_s, again in ((5.0, 0), (5.0, 1)):  # a request is left alone for settle_s
            rig.now += after_s
            for member in ("instance/a", "instance/b", "kvdaemon/ka", "kvdaemon/kb"):
                rig.say(member, None)
            await rig.plans(2)
            assert [order.request_id for _, order in rig.orders.taken] == first * (1 + again)

    asyncio.run(scenario())


def test_nobody_orders_without_a_lease() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()
        rig.reign.held = False
        running = asyncio.create_task(rig.planning.run())
        await asyncio.sleep(0.1)
        running.cancel()
        assert (rig.orders.taken, rig.planning.summary.plans) == ([], 0)

    asyncio.run(scenario())


def test_a_lease_lost_between_two_orders_stops_the_second() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()
        moves = [(name, Move("lend", name, "a", "ka", "kb", 3, 1.0, "")) for name in ("r0", "r1")]
        for move_id, move in moves:
            rig.planning._book.plan(move_id, move, ["a"], 0, rig.now)

        def lose(order: MoveOrder) -> MoveAnswer:
            rig.reign.held = False
            return MoveAnswer(order.num_blocks, "")

        rig.orders.answer = lose
        await rig.planning._order_all("a:1", moves, {"kb": "kb:2"})
        assert [order.move_id for _, order in rig.orders.taken] == ["r0"]
        assert {record.move_id: record.state for record in rig.planning.moves} == {"r0": "MOVING", "r1": "NOT_LEADER"}

    asyncio.run(scenario())


def test_an_instance_that_does_not_answer_is_not_asked_again_in_the_same_plan() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()

        def hang(order: MoveOrder) -> MoveAnswer:
            raise TransferTimeoutError("it does not answer")

        rig.orders.answer = hang
        moves = [(name, Move("lend", name, "a", "ka", "kb", 3, 1.0, "")) for name in ("r0", "r1")]
        for move_id, move in moves:
            rig.planning._book.plan(move_id, move, ["a"], 0, rig.now)
        await rig.planning._order_all("a:1", moves, {"kb": "kb:2"})
        assert len(rig.orders.taken) == 1
        assert rig.states == ["UNREACHABLE"] * 2

    asyncio.run(scenario())


def test_a_new_leader_plans_when_all_have_reported_or_had_the_time_to() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd(instances=False)
        running = asyncio.create_task(rig.planning.run())
        await asyncio.sleep(0.1)
        assert rig.planning.summary.plans == 0
        rig.now += 6.0
        async with asyncio.timeout(10):
            while True:
                if rig.planning.summary.plans:
                    break
                await asyncio.sleep(0.01)
        running.cancel()
        assert rig.orders.taken == []

    asyncio.run(scenario())


def test_stepping_down_forgets_everything() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()
        await rig.plans(1)
        assert rig.planning.moves
        assert rig.planning.step_error("a") is not None
        rig.planning.forget()
        assert (rig.planning.moves, rig.planning.step_error("a")) == ((), None)
        assert rig.planning.summary.plans == 0

    asyncio.run(scenario())


def test_rates_count_output_only() -> None:
    rates = OutputRates()
    rates.observe("a", StepTiming(101, 100, 0, 0.1, 0, 0, steps=10), 1.0)
    rates.observe("a", StepTiming(3, 0, 0, 0.1, 0, 0, steps=10), 2.0)
    assert rates.between(["a", "b"], 0.0, 2.0) == 20.0
    assert rates.between(["a"], 1.0, 2.0) == 30.0
    rates.observe("a", StepTiming(1, 0, 0, 0.1, 0, 0), 1000.0)
    assert rates.between(["a"], 0.0, 100.0) == 0.0
    assert math.isfinite(rates.between([], 0.0, 1.0))
