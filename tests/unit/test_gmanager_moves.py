"""What becomes of moves and who may order them."""

from __future__ import annotations

import asyncio
import math

from gmanager_cluster import Rig

from services.core.errors import TransferTimeoutError
from services.core.placement import (
    InstanceReport,
    MoveEnd,
    MoveReport,
)
from services.core.timings import StepTiming
from services.gmanager.instance_client import MoveAnswer, MoveOrder
from services.gmanager.move_book import FORGOTTEN_S, MEASURE_S, MoveBook
from services.gmanager.output_rate import OutputRates
from services.gmanager.planner.plan import Move

MOVE = Move("lend", "long", "a", "ka", "kb", 10, 5.0, "for a reason")


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
