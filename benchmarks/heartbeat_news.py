"""What the processes of a large cluster say in their heartbeats.

One of three is an instance with a hundred running requests, the others are KV daemons.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from benchmarks.synthetic_cluster import GEOMETRY, REQUESTS
from services.core.placement import (
    Heartbeat,
    InstanceReport,
    KvDaemonReport,
    NamedKvDaemon,
    NamedRequest,
    PlacementColumns,
    PoolStats,
    ProgressColumns,
    Report,
    WaitingRequest,
)
from services.core.timings import HostingTiming, RemoteTiming, StepTiming

_ROUND = 4


def is_instance(number: int) -> bool:
    return number % 3 == 0


def member_name(number: int) -> str:
    return f"{'instance' if is_instance(number) else 'kvdaemon'}/{number}"


def _named(instance: int, request: int) -> NamedRequest:
    return NamedRequest(request, f"request-{instance}-{request}", 1e9 + request, 64 * 100)


def _full_report(number: int) -> Report:
    if not is_instance(number):
        return _pool(free=1000)
    everything = tuple(range(REQUESTS))
    return InstanceReport(
        running=REQUESTS,
        waiting=2,
        requests=tuple(_named(number, request) for request in everything),
        kvdaemons=(NamedKvDaemon(0, str(number + 1), True),),
        placement=PlacementColumns(everything, (0,) * REQUESTS, (16,) * REQUESTS),
        progress=ProgressColumns(everything, (16 * 64,) * REQUESTS),
        max_running=256,
        queue=(WaitingRequest(1000, 200), WaitingRequest(3000, 500)),
    )


def full_heartbeat(number: int) -> Heartbeat:
    return Heartbeat(member_name(number), 0, full=True, report=_full_report(number))


def news(number: int, changed: int | None) -> Sequence[Heartbeat]:
    """What a process says, in turn and again: what has changed within a second, and what was measured.

    In each heartbeat of an instance, ``changed`` requests have grown, one has ended and one has begun.
    """
    silent = Heartbeat(member_name(number), 0, False, None)
    if changed is None:
        return [silent]
    rng = random.Random(number)
    if not is_instance(number):
        return [_pool_news(silent, rng) for _ in range(_ROUND)]
    last = REQUESTS - 1  # of the full report; the last of a round has the same number
    begun = [*range(REQUESTS, REQUESTS + _ROUND - 1), last]
    return [
        _instance_news(silent, number, rng.sample(range(last), changed), begun[k], begun[k - 1], rng)
        for k in range(_ROUND)
    ]


def _pool_news(heartbeat: Heartbeat, rng: random.Random) -> Heartbeat:
    hosting = HostingTiming(messages=800.0, context_tokens=2.5e5, compute_s=0.08 * rng.uniform(0.9, 1.1))
    return heartbeat._replace(report=_pool(free=rng.randrange(2000)), timings=(hosting,))


def _instance_news(
    heartbeat: Heartbeat, number: int, grown: Sequence[int], begun: int, ended: int, rng: random.Random
) -> Heartbeat:
    blocks = [rng.randint(17, 99) for _ in grown]
    report = InstanceReport(
        running=REQUESTS,
        waiting=2,
        requests=(_named(number, begun),),
        placement=PlacementColumns((*grown, begun), (0,) * (len(grown) + 1), (*blocks, 1)),
        progress=ProgressColumns((*grown, begun), (*(64 * count for count in blocks), 64)),
        ended=(ended,),
        max_running=256,
    )
    noise = rng.uniform(0.9, 1.1)
    remote = RemoteTiming(str(number + 2), messages=32.0, rows=3.0, context_tokens=1e4, answer_s=4e-3 * noise)
    step = StepTiming(100.0, 0.0, 1.1e5, 0.04 * noise, 0.03 * noise, 0.029 * noise, (remote,), steps=25)
    return heartbeat._replace(report=report, timings=(step,))


def _pool(free: int) -> KvDaemonReport:
    size = GEOMETRY.block_bytes
    stats = PoolStats(3000 * size, size, total=3000, free=free, workspace=100, in_use=2900 - free)
    return KvDaemonReport(stats, GEOMETRY)
