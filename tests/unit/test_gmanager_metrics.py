"""What a gManager tells: who leads, what its plans came to, what became of its moves."""

from __future__ import annotations

import asyncio

import pytest
from gmanager_cluster import Rig
from prometheus_client import CollectorRegistry
from scraped import Scraped, scraped
from test_gmanager_office import OTHER, Steps, leader

from services.core.placement import InstanceReport, MoveEnd, MoveReport
from services.gmanager.metrics import GManagerState
from services.gmanager.move_book import MEASURE_S
from services.gmanager.planning import NoPlanning
from services.gmanager.relays import Relays
from services.gmanager.view import ClusterView
from services.runtime.membership import Member

RELAYS = Relays(10, 10, {}.get)


def told_by(rig: Rig) -> Scraped:
    registry = CollectorRegistry()
    registry.register(GManagerState(rig.office, rig.view, rig.planning, RELAYS))
    return scraped(registry)


def test_moves_from_order_to_measured_gain() -> None:
    async def scenario() -> None:
        rig = Rig()
        rig.crowd()
        await rig.plans(1)
        told = told_by(rig)
        assert told.value("infinite_llm_gmanager_leads") == 1
        assert told.by("kind", "infinite_llm_members") == {"instance": 2, "kvdaemon": 2, "gmanager": 0}
        assert told.value("infinite_llm_moves_in_progress") == len(rig.orders.taken) > 0
        throughput = told.by("moves", "infinite_llm_planned_throughput_tokens_per_second")
        assert throughput["with"] > throughput["without"] > 0
        assert told.by("instance_id", "infinite_llm_step_prediction_error_ratio").keys() == {"a", "b"}
        assert not told.by("kind", "infinite_llm_moves_total")

        records = rig.planning.moves
        reports = tuple(
            MoveReport(r.move_id, r.move.request_id, r.move.source, r.move.creditor, 7, 0.5, MoveEnd.DONE)
            for r in records
        )
        rig.say("instance/a", InstanceReport(2, 3, max_running=8, moves=reports))
        told = told_by(rig)
        assert told.value("infinite_llm_moves_in_progress") == 0
        assert told.value("infinite_llm_moves_total", kind="lend", end="DONE") == len(records)
        assert told.value("infinite_llm_moved_blocks_total", kind="lend") == 7 * len(records)
        assert not told.by("kind", "infinite_llm_move_measured_gain_tokens_per_second")

        rig.now += MEASURE_S + 1
        rig.crowd(instances=False)
        await rig.plans(1)
        told, measured = told_by(rig), [r for r in rig.planning.moves if r.measured_gain is not None]
        assert len(measured) == len(records)
        predicted = told.value("infinite_llm_move_predicted_gain_tokens_per_second", kind="lend")
        assert predicted == pytest.approx(sum(r.move.gain for r in measured) / len(measured))
        gain = told.value("infinite_llm_move_measured_gain_tokens_per_second", kind="lend")
        assert gain == pytest.approx(sum(r.measured_gain or 0.0 for r in measured) / len(measured))

        rig.reign.held = False
        assert told_by(rig).value("infinite_llm_gmanager_leads") == 0

    asyncio.run(scenario())


def test_plans_tell_how_long_they_took() -> None:
    async def scenario() -> None:
        took: list[float] = []
        rig = Rig(took=took.append)
        rig.crowd()
        await rig.plans(2)
        assert len(took) >= 2

    asyncio.run(scenario())


def test_a_gmanager_that_does_not_plan() -> None:
    office, view, registry = Steps().office, ClusterView(), CollectorRegistry()
    view.set_gmanagers({"g": Member("gmanager", "g", "g:1")}, 0.0)
    registry.register(GManagerState(office, view, NoPlanning(), RELAYS))
    told = scraped(registry)
    assert told.value("infinite_llm_gmanager_leads") == 0
    assert told.by("kind", "infinite_llm_members")["gmanager"] == 1
    assert "infinite_llm_planned_throughput_tokens_per_second" not in told.families


def test_leader_changes_are_counted_once_each() -> None:
    office = Steps().office
    for token in (5, 5, 7, 6, 7):  # word of an earlier one may come late
        office.observed(leader(OTHER, token))
    office.observed(None)
    assert office.leader_changes == 1
