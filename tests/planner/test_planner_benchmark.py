"""The planner's benchmark measures what it says: its cluster is in need, and its heartbeats reach a real gManager."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.heartbeats import measure_heartbeats, one_poller
from benchmarks.synthetic_cluster import NOW, REQUESTS, synthetic_load
from services.gmanager.planner.plan import apply
from services.gmanager.planner.planner import plan


def test_the_synthetic_cluster_gives_the_planner_something_to_do() -> None:
    load = synthetic_load(30, seed=1)
    assert len(load.kvdaemons) == 2 * len(load.instances) == 60
    assert all(len(instance.requests) == REQUESTS for instance in load.instances)
    answer = plan(load, NOW)
    assert {"lend"} <= {move.kind for move in answer.moves}
    assert answer.planned_throughput > answer.throughput
    assert plan(apply(load, answer.moves, NOW), NOW).moves == ()


@pytest.mark.parametrize("news", [None, 4])
def test_heartbeats_reach_a_real_gmanager(news) -> None:
    async def measure():
        async with one_poller():
            return await measure_heartbeats(6, 12.0, news, window_s=1.0)

    cost = asyncio.run(measure())  # it fails if a sender is cut off
    assert cost.heartbeats_per_s > 1
    assert cost.cores >= 0
