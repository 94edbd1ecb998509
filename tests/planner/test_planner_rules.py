"""Rules of the planner that no transcript shows: odd clusters, bounds of the policy, what a move leads to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from planner_transcript import DAEMON_COSTS, GEOMETRY, NOW, read_cluster

from services.core.errors import ConfigError
from services.gmanager.planner.load import ClusterLoad, DaemonLoad, RemoteShare
from services.gmanager.planner.plan import Move, apply
from services.gmanager.planner.planner import plan
from services.gmanager.planner.policy import PlannerPolicy
from services.gmanager.planner.state import State

TESTDATA = Path(__file__).parent / "testdata"


def cluster(name: str) -> ClusterLoad:
    return read_cluster((TESTDATA / f"{name}.yaml").read_text())[0]


def daemon(load: ClusterLoad, kvdaemon_id: str) -> DaemonLoad:
    return next(entry for entry in load.kvdaemons if entry.kvdaemon_id == kvdaemon_id)


def with_daemon(load: ClusterLoad, kvdaemon_id: str, **changes) -> ClusterLoad:
    return replace(
        load,
        kvdaemons=tuple(replace(d, **changes) if d.kvdaemon_id == kvdaemon_id else d for d in load.kvdaemons),
    )


def with_book(load: ClusterLoad, **changes) -> ClusterLoad:
    """The debtor of long_request.yaml with another long request."""
    first, *rest = load.instances
    book, *chats = first.requests
    return replace(load, instances=(replace(first, requests=(replace(book, **changes), *chats)), *rest))


def test_an_empty_cluster_has_an_empty_plan() -> None:
    answer = plan(ClusterLoad((), ()), NOW)
    assert (answer.moves, answer.hints, answer.unmet, answer.throughput) == ((), (), (), 0.0)
    assert answer.made_at == NOW


def test_only_pools_of_the_same_geometry_lend() -> None:
    load = cluster("long_request")
    assert plan(load, NOW).moves
    other = with_daemon(load, "k1", geometry=replace(GEOMETRY, kv_heads=8))
    answer = plan(other, NOW)
    assert answer.moves == ()
    assert [(entry.instance_id, entry.reason) for entry in answer.unmet] == [("i0", "nobody has room to lend")]


def test_an_instance_whose_daemon_is_lost_takes_no_part() -> None:
    load = cluster("long_request")
    gone = replace(load, kvdaemons=(daemon(load, "k1"),))
    answer = plan(gone, NOW)
    assert answer.moves == ()
    assert [hint.instance_id for hint in answer.hints] == ["i1"]


def test_blocks_on_a_lost_daemon_are_neither_local_nor_anywhere_else() -> None:
    load = with_book(
        cluster("long_request"), remote=(RemoteShare("gone", 500),), local_blocks=1063, movable_blocks=1062
    )
    instance = State(load, NOW, PlannerPolicy()).instances[0]
    assert instance.tokens == sum(r.context_tokens for r in load.instances[0].requests) - 500 * 64
    assert not instance.borrowed
    assert all(move.source != "gone" for move in plan(load, NOW).moves)


def test_shared_blocks_stay() -> None:
    load = cluster("long_request")
    moved = sum(move.blocks for move in plan(load, NOW).moves if move.request_id == "book")
    assert moved > 60
    bound = plan(with_book(load, movable_blocks=60), NOW)
    assert sum(move.blocks for move in bound.moves if move.request_id == "book") <= 60


def test_a_request_about_to_end_is_not_moved() -> None:
    load = cluster("long_request")
    assert {move.request_id for move in plan(load, NOW).moves} == {"book"}
    assert "book" not in {move.request_id for move in plan(with_book(load, remaining_tokens=3), NOW).moves}


def test_a_busy_link_lets_go_when_its_moves_have_ended() -> None:
    busy = cluster("link_busy")
    idle = with_daemon(with_daemon(busy, "k0", leaving_blocks=0), "k1", coming_blocks=0)
    assert sum(m.blocks for m in plan(idle, NOW).moves) > sum(m.blocks for m in plan(busy, NOW).moves)


def test_room_that_is_still_being_left_cannot_be_written_to() -> None:
    load = with_daemon(cluster("long_request"), "k1", leaving_blocks=1450)  # of 1490 free
    moves = plan(load, NOW, PlannerPolicy(move_bytes_per_s=1e12)).moves
    assert 0 < sum(move.blocks for move in moves) <= 40


def test_a_daemon_hosts_for_so_many_debtors_only() -> None:
    load = cluster("two_debtors")
    assert {move.debtor for move in plan(load, NOW).moves} == {"i0", "i1"}
    assert {move.debtor for move in plan(load, NOW, PlannerPolicy(max_debtors=1)).moves} == {"i1"}


def test_while_what_it_hosted_is_leaving_an_instance_does_not_borrow() -> None:
    load = with_daemon(cluster("long_request"), "k0", releasing=("i1",))
    answer = plan(load, NOW)
    assert answer.moves == ()
    assert answer.unmet[0].reason == "what it hosted is still leaving"


def test_while_its_blocks_are_coming_home_an_instance_does_not_lend() -> None:
    load = cluster("long_request")
    spare = DaemonLoad("m0", GEOMETRY, 100, 100, DAEMON_COSTS["dram"], NOW, releasing=("i1",))
    answer = plan(replace(load, kvdaemons=(*load.kvdaemons, spare)), NOW)
    assert all(move.creditor != "k1" for move in answer.moves)


def test_apply_moves_blocks_in_the_books() -> None:
    load = cluster("relieve")
    home = Move("home", "book", "i0", "k1", "k0", 40, 1.0, "")
    relieve = Move("relieve", "book", "i0", "k1", "k2", 110, 1.0, "")
    after = apply(load, [home, relieve], NOW)
    before, book = load.instances[0].requests[0], after.instances[0].requests[0]
    assert book.remote == (RemoteShare("k2", 110),)
    assert (book.local_blocks, book.movable_blocks) == (before.local_blocks + 40, before.movable_blocks + 40)
    assert book.moved_at == NOW
    for kvdaemon_id, change, leaving, coming in (("k0", -40, 0, 40), ("k1", 150, 150, 0), ("k2", -110, 0, 110)):
        was, now = daemon(load, kvdaemon_id), daemon(after, kvdaemon_id)
        assert now.free_blocks - was.free_blocks == change
        assert (now.leaving_blocks, now.coming_blocks) == (leaving, coming)
    assert daemon(after, "k1").releasing == ("i0",)
    lend = apply(load, [Move("lend", "book", "i0", "k0", "k2", 5, 1.0, "")], NOW)
    assert daemon(lend, "k0").releasing == ()


def test_hosting_slows_the_creditors_own_requests_in_proportion_to_its_time() -> None:
    state = State(cluster("home"), NOW, PlannerPolicy())
    debtor, creditor = state.instances
    costs = creditor.home.load.costs
    share = costs.compute_s(GEOMETRY.layers, 90 * GEOMETRY.block_tokens) / debtor.step_s
    assert creditor.home.hosting == pytest.approx(share)
    assert creditor.throughput == pytest.approx(creditor.batch / creditor.step_s * (1 - share))


def test_the_oldest_request_never_gives_way() -> None:
    load = cluster("growth")
    full = with_daemon(load, "k0", free_blocks=0)
    first = replace(full.instances[0], requests=full.instances[0].requests[:1])
    state = State(replace(full, instances=(first, *full.instances[1:])), NOW, PlannerPolicy())
    assert state.instances[0].spare < 0
    assert state.instances[0].batch == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"hide": 0.0},
        {"hide": 0.9, "still_hide": 0.8},
        {"creditor_share": 1.5},
        {"reserve": 0.2, "home_reserve": 0.1},
        {"min_gain": 0.0},
        {"move_bytes_per_s": 0.0},
        {"max_debtors": 0},
        {"settle_s": -1.0},
        {"horizon_tokens": -1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_impossible_policy_is_refused_by_name(changes) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        PlannerPolicy(**changes)
