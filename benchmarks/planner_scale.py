"""What the gManager's work costs as the cluster grows: a plan, and the heartbeats that it is made from.

    python -m benchmarks.planner_scale [--instances N ...] [--processes N] [--rates N ...] [--quick] [--json FILE]

Processor time, not time on the clock: one core does all of it, whatever else the machine is doing.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
import sys
import time
from collections.abc import Callable

from benchmarks.harness import Peer, Run, Samples, main
from benchmarks.heartbeats import DIRECT, HeartbeatCost, measure_heartbeats, measure_relay, one_poller
from benchmarks.synthetic_cluster import NOW, REQUESTS, synthetic_load
from services.core.timings import HostingTiming, RemoteTiming, StepTiming
from services.gmanager.cost_model import CostModel, DaemonCosts, InstanceCosts
from services.gmanager.planner.load import ClusterLoad
from services.gmanager.planner.planner import plan

QUESTION = "What do a plan and the heartbeats behind it cost, and how does that grow?"
REPETITIONS = 5
PROCESSES = 10_000  # whose heartbeats, one a second each, one gManager should take with half a core
_RELAYED = math.ceil((PROCESSES - DIRECT) / (DIRECT // 2))  # by each relay then
_OBSERVATIONS = 2_000
_WINDOW_S = 5.0
# Requests of which there is news in every heartbeat of an instance. With a hundred that write 25 tokens/s
# each, 39 begin a new block within a second.
_SILENT = "without heartbeats"
_NEWS = {"nothing new": None, "news of 4 requests": 4, "news of 39 requests": 39}


def measure(run: Run) -> None:
    _plans(run)
    _learning(run)
    asyncio.run(_heartbeats(run))


def _plans(run: Run) -> None:
    sizes: list[int] = [10, 30] if run.quick else run.options.instances
    loads = {}
    for size in sizes:
        run.progress.update(f"making a cluster of {size} instances")
        loads[size] = synthetic_load(size, seed=size)
    results = run.alternate([Peer(str(size), _timed_plan(loads[size])) for size in sizes], REPETITIONS)
    for size in sizes:
        cpu_s, made = results[str(size)], plan(loads[size], NOW)
        run.row(
            {
                "what": "one plan",
                "instances": size,
                "kvdaemons": 2 * size,
                "requests": REQUESTS * size,
                "cpu_ms": 1e3 * cpu_s.median,
                "spread_ms": 1e3 * cpu_s.spread,
                "moves": len(made.moves),
                "modelled_gain": made.planned_throughput / made.throughput - 1.0,
            }
        )
    medians = {size: results[str(size)].median for size in sizes}
    line = statistics.linear_regression([math.log(n) for n in sizes], [math.log(medians[n]) for n in sizes])
    exponent = line.slope
    run.summary("plan_growth_exponent", exponent)
    run.target("plan_growth_exponent", exponent, at_most=1.99)
    for smaller, larger in itertools.pairwise(sizes):
        ratio = medians[larger] / medians[smaller]
        run.summary(f"plan_growth_exponent_{smaller}_to_{larger}", math.log(ratio) / math.log(larger / smaller))
    if 1000 in medians:
        run.target("plan_cpu_s_at_1000_instances", medians[1000], at_most=1.0)


def _timed_plan(load: ClusterLoad) -> Callable[[], float]:
    def timed() -> float:
        begin = time.process_time()
        plan(load, NOW)
        return time.process_time() - begin

    return timed


def _learning(run: Run) -> None:
    """The cost model's part of a heartbeat."""
    number = 200 if run.quick else _OBSERVATIONS
    results = run.alternate(
        [Peer("step", lambda: _learn(number, 1)), Peer("hosting", lambda: _learn(number, 0))], REPETITIONS
    )
    for name, cpu_s in results.items():
        run.row(
            {"what": f"learning from a {name} timing", "cpu_ms": 1e3 * cpu_s.median, "spread_ms": 1e3 * cpu_s.spread}
        )


def _learn(number: int, remotes: int) -> float:
    """Processor seconds for one observation."""
    costs = DaemonCosts(1e-5, 2e-7, 5e-6, 8e-8)
    model = CostModel(InstanceCosts(1e-2, 1e-5, 100.0, 8e-5, 5e-4, 8e-8), costs)
    rng = random.Random(1)
    steps, hosted = [], []
    for _ in range(number):
        context, noise = rng.randint(1000, 100_000), rng.uniform(0.9, 1.1)
        local_s, answer_s = noise * (5e-4 + 8e-8 * context), noise * costs.answer_s(32, 3, context / 4)
        part = RemoteTiming("k", 32, 3, context / 4, answer_s)
        steps.append(StepTiming(rng.randint(1, 200), 0, context, 0.012 + local_s, local_s, local_s, (part,) * remotes))
        hosted.append(HostingTiming(800, 25 * context, noise * costs.compute_s(800, 25 * context)))
    begin = time.process_time()
    if remotes:
        for step in steps:
            model.observe_step("i", step)
    else:
        for timing in hosted:
            model.observe_hosting("k", timing)
    return (time.process_time() - begin) / number


async def _heartbeats(run: Run) -> None:
    processes: int = 400 if run.quick else run.options.processes
    rates: list[int] = [100, 400] if run.quick else run.options.rates
    window_s = 1.0 if run.quick else _WINDOW_S
    cases: list[tuple[str, int]] = [(_SILENT, 0), *((kind, rate) for kind in _NEWS for rate in rates)]
    measured: dict[tuple[str, int], list[HeartbeatCost]] = {case: [] for case in cases}
    relaying: list[HeartbeatCost] = []
    async with one_poller():
        for turn in run.rounds(REPETITIONS, warmup=0):
            for kind, rate in turn.order(cases):
                run.progress.update(f"{turn.label}: {rate} heartbeats/s, {kind}")
                cost = await measure_heartbeats(processes, rate, _NEWS.get(kind), window_s)
                measured[kind, rate].append(cost)
            run.progress.update(f"{turn.label}: a relay")
            relaying.append(await measure_relay(_RELAYED, window_s))
    silent = Samples(tuple(cost.cores for cost in measured[_SILENT, 0]))
    run.row({"what": f"{processes} processes, {_SILENT}", "cores": silent.median, "spread_cores": silent.spread})
    relay = Samples(tuple(cost.cores for cost in relaying))
    run.row(
        {
            "what": f"a daemon's relaying for {_RELAYED}",
            "taken_per_s": statistics.median(cost.heartbeats_per_s for cost in relaying),
            "cores": relay.median,
            "spread_cores": relay.spread,
        }
    )
    for kind, rate in cases[1:]:
        cores = Samples(tuple(cost.cores for cost in measured[kind, rate]))
        each_us = Samples(tuple(1e6 * cost.cores / cost.heartbeats_per_s for cost in measured[kind, rate]))
        run.row(
            {
                "what": f"heartbeats, {kind}",
                "offered_per_s": rate,
                "taken_per_s": statistics.median(cost.heartbeats_per_s for cost in measured[kind, rate]),
                "cores": cores.median,
                "spread_cores": cores.spread,
                "us_each": each_us.median,
                "spread_us": each_us.spread,
            }
        )
        if rate == max(rates):
            needed = PROCESSES * each_us.median / 1e6
            run.target(f"cores for {PROCESSES} heartbeats/s, {kind}", needed, at_most=0.5)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--instances", type=int, nargs="+", metavar="N", default=[10, 100, 1000, 10_000])
    parser.add_argument("--processes", type=int, metavar="N", default=PROCESSES, help="that send heartbeats")
    parser.add_argument("--rates", type=int, nargs="+", metavar="N", default=[1000, 10_000], help="heartbeats/s of all")


if __name__ == "__main__":
    sys.exit(main("planner_scale", QUESTION, measure, _add_arguments))
