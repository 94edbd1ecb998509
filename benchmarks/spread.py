"""``python -m benchmarks.spread``: what is the planner's spreading worth, where nobody lacks memory?

Two clusters on the same two cores: an instance and its daemon on one, a daemon that lends memory on the other. The
first has no planner, so its one request stays where it was written; in the second the planner may move a part of it to
the other daemon while it runs, for attention on both cores at once. Caches are filled without prefill (see
``filled_cache``).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import infinitellm
from benchmarks.checkpoints import random_prompt
from benchmarks.filled_cache import CacheFiller
from benchmarks.filled_requests import (
    BLOCK_TOKENS,
    NEAR,
    SHAPE,
    STEPS,
    TAIL,
    TIMEOUT_S,
    FilledModel,
    cluster_options,
    pin,
    write_model,
)
from benchmarks.harness import Run, main
from benchmarks.long_request import VoidMeasurementError
from benchmarks.placements import run_clusters
from infinitellm import AsyncClient, Tokens
from services.core.blocks import block_keys
from services.core.errors import InfiniteLLMError
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console

QUESTION = "what is the planner's spreading worth, where nobody lacks memory?"
CONTEXTS = (16384, 65536, 262144)
LONG = 65536  # from here on it must pay
_LOOK_S = 5.0  # between two looks at where an answer's blocks lie; steps count from the second one like that before on
_MOST_STEPS = 4096  # of an answer
_POOL = 1.5  # of the filled context: what an instance has left is less than half of its pool, so it is no creditor


@dataclass(slots=True)
class System:
    """One cluster, and what was measured with it.

    Attributes:
        elsewhere: share of the request's blocks on the other daemon while steps were counted.
    """

    name: str
    client: AsyncClient
    tokens: tuple[int, ...] = ()
    step_ms: list[float] = field(default_factory=list)
    elsewhere: list[float] = field(default_factory=list)


def measure(run: Run) -> None:
    """Measures each context in two clusters of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("spread: needs two cores, one for each machine that it plays")
    try:
        with tempfile.TemporaryDirectory(prefix="spread-") as directory:
            run.progress.update("writing the checkpoint")
            model = write_model(Path(directory))
            for context in run.options.contexts or (CONTEXTS[:1] if run.quick else CONTEXTS):
                if asyncio.run(_measure_context(run, model, (cores[0], cores[1]), context)):
                    raise KeyboardInterrupt
    except (InfiniteLLMError, infinitellm.InfiniteLLMError) as error:
        raise SystemExit(f"spread: {error}") from error


async def _measure_context(run: Run, model: FilledModel, cores: tuple[int, int], context: int) -> int:
    draw = random.Random(context)
    systems: list[System] = []

    async def body(clusters: Sequence[LocalCluster]) -> int:
        pin(*cores)
        async with AsyncExitStack() as stack:
            for name, cluster in zip(("without", "with"), clusters, strict=True):
                client = await stack.enter_async_context(AsyncClient(cluster.grpc_address))
                system = System(name, client, random_prompt(SHAPE, context, draw))
                run.progress.update(f"{context:,} tokens, {name} the planner: filling")
                daemons = [d for d in (await client.cluster_status()).kvdaemons if d.kvdaemon_id == NEAR]
                filler = await stack.enter_async_context(CacheFiller(daemons, model.geometry, None))
                await filler.fill(NEAR, block_keys(model.keys, system.tokens, BLOCK_TOKENS))
                systems.append(system)
            for turn in run.rounds(run.options.repetitions):
                for system in turn.order(systems):
                    step_ms, elsewhere = await _answer(system, draw)
                    run.progress.update(
                        f"{context:,} tokens, {turn.label}, {system.name} the planner: {step_ms:.1f} ms a step, "
                        f"{elsewhere:.0%} elsewhere"
                    )
                    if turn.recorded:
                        system.step_ms.append(step_ms)
                        system.elsewhere.append(elsewhere)
        return 0

    blocks = round(_POOL * model.geometry.blocks_for(context))
    options = [cluster_options(model, blocks, 1, None, planner=planner) for planner in (False, True)]
    code = await run_clusters(options, Console(sys.stderr), body)
    if not code:
        _record(run, context, *systems)
    return code


async def _answer(system: System, draw: random.Random) -> tuple[float, float]:
    """The median step in milliseconds once blocks have come to rest, and the share of them that lies elsewhere then.

    Raises:
        VoidMeasurementError: they did not before the answer's end.
    """
    prompt = (*system.tokens, *random_prompt(SHAPE, TAIL, draw))
    times: list[float] = []
    looked_at, counted_from = 0.0, 0
    elsewhere, all_blocks = -1, 1
    events = system.client.generate(prompt, max_tokens=_MOST_STEPS, ignore_eos=True, timeout_s=TIMEOUT_S)
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, Tokens):
                continue
            times += [time.perf_counter()] * len(event.ids)
            looked_at = looked_at or times[0]
            if not counted_from and times[-1] - looked_at > _LOOK_S:
                before = elsewhere
                elsewhere, all_blocks = await _blocks(system.client)
                looked_at = times[-1]
                if elsewhere == before:
                    counted_from = len(times) + 1  # tokens that came meanwhile were not stamped in time
            if counted_from and len(times) > counted_from + STEPS:
                break
    counted = times[counted_from:]
    if not counted_from or len(counted) <= STEPS:
        raise VoidMeasurementError(f"blocks had not come to rest {STEPS} tokens before the last of {len(times)}")
    return 1000 * statistics.median(after - before for before, after in pairwise(counted)), elsewhere / all_blocks


async def _blocks(client: AsyncClient) -> tuple[int, int]:
    """Of the running request: those elsewhere, and all.

    Raises:
        VoidMeasurementError: more requests run than one, or none.
    """
    requests = (await client.cluster_status()).requests
    if len(requests) != 1:
        raise VoidMeasurementError(f"one request should be running, the cluster's status shows {len(requests)}")
    (request,) = requests
    elsewhere = sum(part.num_blocks for part in request.placement if not part.local)
    return elsewhere, sum(part.num_blocks for part in request.placement)


def _record(run: Run, context: int, without: System, spread: System) -> None:
    ratios = [a / b for a, b in zip(without.step_ms, spread.step_ms, strict=True)]
    run.row(
        {
            "context": context,
            "without_ms": statistics.median(without.step_ms),
            "with_ms": statistics.median(spread.step_ms),
            "elsewhere": statistics.median(spread.elsewhere),
            "faster": statistics.median(ratios),
            "faster_min": min(ratios),
            "faster_max": max(ratios),
        }
    )
    if context >= LONG:
        run.target(f"faster_{context}", statistics.median(ratios), at_least=1.2)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    contexts = " ".join(map(str, CONTEXTS))
    parser.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS", help=f"default {contexts}")
    parser.add_argument("--repetitions", type=int, default=3, help="default %(default)s")


if __name__ == "__main__":
    sys.exit(main("spread", QUESTION, measure, _add_arguments))
