"""Golden transcripts: each file of testdata/ shows a cluster and the plan for it, reasons included.

``REGENERATE=1 python -m pytest tests/planner/test_planner_transcripts.py`` writes the plans anew; read the difference
before it is committed.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from planner_transcript import NOW, SEPARATOR, read_cluster, render

from services.gmanager.planner.plan import Plan
from services.gmanager.planner.planner import plan

TESTDATA = Path(__file__).parent / "testdata"
TRANSCRIPTS = sorted(TESTDATA.glob("*.yaml"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_the_plan_is_as_written_down(path: Path) -> None:
    text = path.read_text()
    cluster, _, _ = text.partition(SEPARATOR)
    rendered = cluster + render(*read_cluster(text))
    if os.environ.get("REGENERATE"):
        path.write_text(rendered)
    assert rendered == path.read_text()


def planned(name: str) -> Plan:
    load, policy = read_cluster((TESTDATA / f"{name}.yaml").read_text())
    return plan(load, NOW, policy)


def routes(answer: Plan) -> list[tuple[str, str, str]]:
    return [(move.kind, move.source, move.creditor) for move in answer.moves]


# What each transcript is about, so that a regenerated one cannot quietly lose it.


@pytest.mark.parametrize("name", ["nothing_to_do", "hysteresis"])
def test_nothing_moves(name) -> None:
    assert planned(name).moves == ()


def test_hysteresis_has_two_reasons() -> None:
    reasons = {entry.instance_id: entry.reason for entry in planned("hysteresis").unmet}
    assert "moved less than 10 s ago" in reasons["i0"]
    assert "less than" in reasons["i1"]


@pytest.mark.parametrize("name", ["crowded_and_idle", "long_request", "growth"])
def test_the_crowded_instance_borrows_and_the_cluster_gains(name) -> None:
    answer = planned(name)
    assert set(routes(answer)) == {("lend", "k0", "k1")}
    assert answer.planned_throughput > 1.05 * answer.throughput


def test_the_smaller_batch_comes_first_and_both_borrow() -> None:
    assert [move.debtor for move in planned("two_debtors").moves] == ["i1", "i0"]


def test_the_creditors_bound_and_not_gain_ends_the_lending() -> None:
    load, policy = read_cluster((TESTDATA / "creditor_bound.yaml").read_text())
    bounded = sum(move.blocks for move in plan(load, NOW, policy).moves)
    free = sum(move.blocks for move in plan(load, NOW).moves)
    assert 0 < bounded < free


def test_blocks_come_home() -> None:
    assert routes(planned("home")) == [("home", "k1", "k0")]


def test_a_creditor_in_need_is_relieved_before_it_could_borrow() -> None:
    assert routes(planned("relieve")) == [("home", "k1", "k0"), ("relieve", "k1", "k2")]


def test_the_link_bounds_what_moves() -> None:
    busy, usual = planned("link_busy"), planned("long_request")
    assert 0 < sum(move.blocks for move in busy.moves) < sum(move.blocks for move in usual.moves)


def test_only_who_is_heard_of_takes_part() -> None:
    answer = planned("silent")
    assert routes(answer) == [("lend", "k0", "k4")]
    assert any(entry.instance_id == "i3" and "not heard of" in entry.reason for entry in answer.unmet)


def test_attention_is_spread_though_nobody_lacks_memory() -> None:
    answer = planned("spread")
    assert set(routes(answer)) == {("spread", "k0", "m0"), ("spread", "k0", "m1")}
    assert {move.debtor for move in answer.moves} == {"i0"}


def test_slow_lenders_host_less_though_they_have_more_room() -> None:
    hosted = Counter()
    for move in planned("memory_only").moves:
        hosted[move.creditor] += move.blocks
    assert 0 < hosted["m1"] < hosted["k2"]
    assert 0 < hosted["m0"] < hosted["k2"]
