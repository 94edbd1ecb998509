"""Processes are killed and stopped at random while they serve: every stream gets exactly the tokens of an undisturbed
run, and afterwards nothing is held, every ledger is sound, and the cluster serves on."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from known_requests import KnownRequests
from schedule import Disturbance, draw_schedule

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

COUNTED = {
    "spilled": "admissions with blocks elsewhere",
    "request preempted": "preemptions",
    "step discarded": "steps discarded",
    "kvdaemon lost": "lenders lost",
    "request lost its instance": "requests moved",
}


def test_schedule(
    clusters, known: KnownRequests, chaos_seed: int, schedule_number: int, tell: Callable[[str], None]
) -> None:
    schedule = draw_schedule(chaos_seed, schedule_number)
    print(schedule)
    requests = [known.request(number) for number in schedule.requests]
    after = known.request(schedule.requests[0] - 1)
    cluster = clusters.take(fresh=schedule.needs_fresh_cluster)
    started, sound = time.monotonic(), False
    try:
        cluster.serve(requests, schedule.disturbances)
        served = time.monotonic()
        cluster.check_sound(after, everything_lives=not schedule.needs_fresh_cluster)
        sound = True
    finally:
        clusters.give_back(cluster, usable=sound and not schedule.needs_fresh_cluster)
    counts = cluster.events()
    told = ", ".join(f"{counts[message]} {name}" for message, name in COUNTED.items() if counts[message])
    tell(f"{schedule}\n    {served - started:.0f} s + {time.monotonic() - served:.0f} s until sound; {told}")


def test_etcd_is_away_for_ten_seconds(clusters, known: KnownRequests) -> None:
    """Longer than its leases live: members are gone and come back, and no request notices."""
    cluster = clusters.take()
    sound = False
    try:
        requests = [known.request(number) for number in range(8)]
        cluster.serve(requests, [Disturbance("etcd", 0.05, 0.0, stop_s=10.0)])
        assert not cluster.events()["request lost its instance"]
        cluster.check_sound(known.request(9), everything_lives=True)
        sound = True
    finally:
        clusters.give_back(cluster, usable=sound)
