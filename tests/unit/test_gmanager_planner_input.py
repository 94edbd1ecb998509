"""What the planner is told: loads made of reports, costs learned from timings."""

from __future__ import annotations

import math

import pytest
from gmanager_cluster import BLOCK, GEOMETRY, instance, pool

from services.core.blocks import PoolGeometry
from services.core.placement import (
    BlockCount,
    KvDaemonReport,
    PoolStats,
    RunningRequest,
    WaitingRequest,
)
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gmanager.learning import FIRST, TIMINGS_PER_S, KnownCosts, Learning, like_instance
from services.gmanager.planner.load import RemoteShare, WaitingLoad
from services.gmanager.planner.plan import Move
from services.gmanager.planner_input import make_load, with_moves
from services.gmanager.view import InstanceFacts, KvDaemonFacts
from services.runtime.membership import Member

MOVE = Move("lend", "long", "a", "ka", "kb", 10, 5.0, "for a reason")


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
        learned.observe("instance/a", (step._replace(remotes=(remote,)),) * 5, 0.0)
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
        for second in range(100):
            learned.observe("kvdaemon/k", (HostingTiming(2, 640.0, 0.1),), float(second))
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

    def test_in_a_large_cluster_each_process_is_listened_to_now_and_then(self) -> None:
        learned, members = Learning(), [f"instance/{number}" for number in range(2 * int(TIMINGS_PER_S))]
        known = []
        for second in range(2 * FIRST):
            for member in members:
                learned.observe(member, (steps_like(1, 1000),), float(second))
            known.append(len(learned.known.instances))
        assert known[FIRST + 1] <= 0.6 * len(members)
        assert known[-1] == len(members)
        # What each put out is counted all the same, and who is alone is listened to always.
        assert learned.rates.between(["7"], -1.0, 2 * FIRST - 1) == 1.0
        learned.keep(["7"], [])
        errors = set()
        for number in range(10):
            learned.observe("instance/7", (steps_like(1, 1000, 1.5 + number),), 100.0)
            errors.add(learned.step_error("7"))
        assert len(errors) > 5

    def test_who_left_is_forgotten(self) -> None:
        learned = Learning()
        step = steps_like(1, 1000, 1.0, RemoteTiming("k", 2, 1, 640, 0.1))._replace(steps=10)
        learned.observe("instance/a", (step,) * 2 * FIRST, 1.0)
        assert learned.rates.between(["a"], 0.0, 2.0) == 50.0
        assert learned.step_error("a") is not None
        learned.keep([], [])
        assert learned.rates.between(["a"], 0.0, 2.0) == 0.0
        assert (learned.step_error("a"), learned.known) == (None, KnownCosts())
