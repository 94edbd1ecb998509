"""What holds of every plan for every cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from fuzzing import cases
from hypothesis import given
from hypothesis import strategies as st
from planner_clusters import clusters
from planner_transcript import NOW

from services.gmanager.planner.load import ClusterLoad
from services.gmanager.planner.plan import apply
from services.gmanager.planner.planner import plan
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner.state import State

DEFAULT = PlannerPolicy()
# Nothing but gain decides: no link, no settling, no minimum to speak of.
EAGER = PlannerPolicy(
    settle_s=0.0,
    move_bytes_per_s=1e15,
    min_gain=1e-3,
    payback=1.0,
    reserve=0.0,
    home_reserve=0.0,
    spread_gain=1e-3,
    spread_reserve=0.0,
    spread_room=1.0,
)
SETTLED = {"leaving_blocks": 0, "coming_blocks": 0, "releasing": ()}
POLICIES = st.sampled_from([DEFAULT, EAGER])


def homes(load: ClusterLoad) -> dict[str, str]:
    return {instance.instance_id: instance.kvdaemon_id for instance in load.instances}


def lends_and_borrows(load: ClusterLoad) -> tuple[set[str], set[str]]:
    """Daemons that host blocks for others, and daemons whose instance borrows."""
    shares = [
        (share.kvdaemon_id, instance.kvdaemon_id)
        for instance in load.instances
        for request in instance.requests
        for share in request.remote
    ]
    return {lender for lender, _ in shares}, {borrower for _, borrower in shares}


@cases(100)
@given(clusters(), POLICIES)
def test_a_plan_takes_no_more_than_is_free(load, policy) -> None:
    coming = Counter()
    for move in plan(load, NOW, policy).moves:
        assert move.blocks > 0
        coming[move.creditor] += move.blocks
    for daemon in load.kvdaemons:
        assert coming[daemon.kvdaemon_id] <= daemon.free_blocks - daemon.leaving_blocks
        carried = policy.move_bytes_per_s * policy.move_window_s / daemon.geometry.block_bytes
        if coming[daemon.kvdaemon_id]:
            assert coming[daemon.kvdaemon_id] + daemon.leaving_blocks + daemon.coming_blocks <= carried


@cases(100)
@given(clusters(), POLICIES)
def test_only_sealed_blocks_move_and_only_from_where_they_lie(load, policy) -> None:
    there = {}
    for instance in load.instances:
        for request in instance.requests:
            there[request.request_id, instance.kvdaemon_id] = request.movable_blocks
            there.update({(request.request_id, share.kvdaemon_id): share.blocks for share in request.remote})
    for move in plan(load, NOW, policy).moves:
        there[move.request_id, move.source] -= move.blocks
        assert there[move.request_id, move.source] >= 0


@cases(100)
@given(clusters(cycles=False), POLICIES)
def test_nobody_ever_lends_and_borrows(load, policy) -> None:
    """Not before the plan, not after it, and not while its moves are under way."""
    lenders, borrowers = lends_and_borrows(load)
    assert not lenders & borrowers
    lenders_then, borrowers_then = lends_and_borrows(apply(load, plan(load, NOW, policy).moves, NOW))
    assert not (lenders | lenders_then) & (borrowers | borrowers_then)


@cases(100)
@given(clusters(), POLICIES)
def test_no_move_adds_to_a_cycle_that_is_there(load, policy) -> None:
    lenders, borrowers = lends_and_borrows(load)
    home_of = homes(load)
    for move in plan(load, NOW, policy).moves:
        if move.creditor != home_of[move.debtor]:
            assert move.creditor not in borrowers
        if move.kind in ("lend", "spread"):
            assert home_of[move.debtor] not in lenders


@cases(100)
@given(clusters(), POLICIES)
def test_for_speed_blocks_go_to_memory_only_daemons_that_keep_room_for_others(load, policy) -> None:
    mapped = set(homes(load).values())
    spread = [move for move in plan(load, NOW, policy).moves if move.kind == "spread"]
    free = {daemon.kvdaemon_id: daemon.free_blocks for daemon in load.kvdaemons}
    total = {daemon.kvdaemon_id: daemon.total_blocks for daemon in load.kvdaemons}
    for move in spread:
        assert move.creditor not in mapped
        free[move.creditor] -= move.blocks
        assert free[move.creditor] >= policy.spread_reserve * total[move.creditor]


@cases(100)
@given(clusters(), POLICIES)
def test_the_modelled_throughput_never_falls_and_is_what_the_gains_say(load, policy) -> None:
    answer = plan(load, NOW, policy)
    before = State(load, NOW, policy).throughput()
    after = State(apply(load, answer.moves, NOW), NOW, policy).throughput()
    assert answer.throughput == pytest.approx(before, rel=1e-9)
    assert answer.planned_throughput == pytest.approx(after, rel=1e-9)
    assert all(move.gain > 0 for move in answer.moves)
    assert after - before == pytest.approx(sum(move.gain for move in answer.moves), rel=1e-6, abs=1e-6 * (1 + before))


@cases(100)
@given(clusters(), POLICIES)
def test_a_second_plan_changes_nothing(load, policy) -> None:
    after = apply(load, plan(load, NOW, policy).moves, NOW)
    assert plan(after, NOW, policy).moves == ()


@cases(100)
@given(clusters(), POLICIES)
def test_bounds_are_kept_or_at_least_not_stretched(load, policy) -> None:
    before = State(load, NOW, policy)
    after = State(apply(load, plan(load, NOW, policy).moves, NOW), NOW, policy)
    for name, daemon in after.daemons.items():
        bound = policy.lender_share if daemon.owner is None else policy.creditor_share
        assert daemon.hosting <= max(bound, before.daemons[name].hosting) + 1e-9
    for was, instance in zip(before.instances, after.instances, strict=True):
        assert instance.slack_s >= min(0.0, was.slack_s) - 1e-9


@cases(100)
@given(clusters(), POLICIES)
def test_who_is_silent_is_left_alone(load, policy) -> None:
    silent = {d.kvdaemon_id for d in load.kvdaemons if d.heard_at < NOW - policy.stale_s}
    silent_instances = {i.instance_id for i in load.instances if i.heard_at < NOW - policy.stale_s}
    mapped_by_silent = {i.kvdaemon_id for i in load.instances if i.instance_id in silent_instances}
    answer = plan(load, NOW, policy)
    for move in answer.moves:
        assert not {move.source, move.creditor} & silent
        assert move.debtor not in silent_instances
        assert move.creditor not in mapped_by_silent
    assert not {hint.instance_id for hint in answer.hints} & silent_instances


@cases(100)
@given(clusters(), POLICIES)
def test_requests_settle_and_turn_back_in_no_plan(load, policy) -> None:
    moved_at = {r.request_id: r.moved_at for instance in load.instances for r in instance.requests}
    came, left = set(), set()
    for move in plan(load, NOW, policy).moves:
        assert moved_at[move.request_id] <= NOW - policy.settle_s
        assert moved_at[move.request_id] < NOW
        came.add((move.request_id, move.creditor))
        left.add((move.request_id, move.source))
    assert not came & left


@cases(100)
@given(clusters(), POLICIES)
def test_the_same_load_gives_the_same_plan_whatever_its_order(load, policy) -> None:
    turned = ClusterLoad(load.instances[::-1], load.kvdaemons[::-1])
    assert plan(load, NOW, policy) == plan(load, NOW, policy) == plan(turned, NOW, policy)


@cases(100)
@given(clusters(), POLICIES)
def test_hints_have_the_room_they_promise(load, policy) -> None:
    answer = plan(load, NOW, policy)
    free = {daemon.kvdaemon_id: daemon.free_blocks for daemon in apply(load, answer.moves, NOW).kvdaemons}
    home_of = homes(load)
    assert [h.gain for h in answer.hints] == sorted((h.gain for h in answer.hints), reverse=True)
    for hint in answer.hints:
        assert 0 < hint.room_blocks <= free[home_of[hint.instance_id]]


@cases(100)
@given(clusters(), POLICIES)
def test_repeated_plans_come_to_rest(load, policy) -> None:
    """Moves end, requests settle, and everybody is heard of again: after a few plans there is nothing left to do."""
    for turn in range(12):
        now = NOW + turn * (policy.settle_s + 1)
        load = ClusterLoad(
            tuple(replace(i, heard_at=now if i.heard_at == NOW else i.heard_at) for i in load.instances),
            tuple(replace(d, heard_at=now if d.heard_at == NOW else d.heard_at, **SETTLED) for d in load.kvdaemons),
        )
        moves = plan(load, now, policy).moves
        if not moves:
            return
        load = apply(load, moves, now)
    pytest.fail("still moving after twelve plans")
