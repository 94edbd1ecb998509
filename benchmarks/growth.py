"""``python -m benchmarks.growth``: how does the time of a decode step grow with the context, up to a million tokens?

One request of a real cluster, its cache filled without prefill (see ``filled_cache``) in the instance's own pool. A
step reads all of it, so each token of context should cost what reading its keys and values costs: the rate is measured
in the same rounds, with a loop that only reads them.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import infinitellm
from benchmarks.checkpoints import random_prompt
from benchmarks.filled_cache import CacheFiller
from benchmarks.filled_requests import (
    BLOCK_TOKENS,
    GROUP,
    NEAR,
    SHAPE,
    TIMEOUT_S,
    FilledModel,
    cluster_options,
    pin,
    time_answer,
    write_model,
)
from benchmarks.harness import Run, main
from benchmarks.kernel_processes import KernelProcess, together_s
from benchmarks.placements import run_clusters
from infinitellm import AsyncClient
from services.core.blocks import block_keys
from services.core.errors import InfiniteLLMError
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console

QUESTION = "how does the time of a decode step grow with the context?"
CONTEXTS = (1024, 4096, 16384, 65536, 262144, 1048576)
QUICK_CONTEXTS = CONTEXTS[:3]
_READ_CONTEXT = 65536  # read to learn the memory's rate: more than any cache holds
_PASSES = 8


def measure(run: Run) -> None:
    """One cluster; its pool holds one context at a time."""
    cores = sorted(os.sched_getaffinity(0))
    contexts = sorted(run.options.contexts or (QUICK_CONTEXTS if run.quick else CONTEXTS))
    try:
        with tempfile.TemporaryDirectory(prefix="growth-") as directory:
            run.progress.update("writing the checkpoint")
            model = write_model(Path(directory))
            steps: dict[int, list[float]] = {context: [] for context in contexts}
            rates: list[float] = []

            async def body(clusters: Sequence[LocalCluster]) -> int:
                pin(cores[0], cores[-1])
                async with AsyncClient(clusters[0].grpc_address) as client:
                    for context in contexts:
                        await _measure_context(run, model, client, context, steps[context], rates, cores[0])
                return 0

            options = cluster_options(model, model.geometry.blocks_for(contexts[-1]), 0, None)
            if asyncio.run(run_clusters([options], Console(sys.stderr), body)):
                raise KeyboardInterrupt
            _record(run, model, steps, rates)
    except (InfiniteLLMError, infinitellm.InfiniteLLMError) as error:
        raise SystemExit(f"growth: {error}") from error


async def _measure_context(
    run: Run, model: FilledModel, client: AsyncClient, context: int, steps: list[float], rates: list[float], core: int
) -> None:
    draw = random.Random(context)
    tokens = random_prompt(SHAPE, context, draw)
    daemons = [d for d in (await client.cluster_status()).kvdaemons if d.kvdaemon_id == NEAR]
    run.progress.update(f"{context:,} tokens: filling")
    async with CacheFiller(daemons, model.geometry, None) as filler:
        await filler.fill(NEAR, block_keys(model.keys, tokens, BLOCK_TOKENS))
        with KernelProcess(core, _READ_CONTEXT, GROUP, model.geometry) as kernel:
            for turn in run.rounds(run.options.repetitions):
                read_s = await asyncio.to_thread(together_s, [kernel], "read", _PASSES, TIMEOUT_S)
                answer = await time_answer(client, tokens, draw)
                run.progress.update(f"{context:,} tokens, {turn.label}: {answer.step_ms:.1f} ms a step")
                if turn.recorded:
                    steps.append(answer.step_ms)
                    rates.append(_READ_CONTEXT * _bytes_per_token(model) / read_s)


def _record(run: Run, model: FilledModel, steps: dict[int, list[float]], rates: list[float]) -> None:
    rate = statistics.median(rates)
    predicted_us = 1e6 * _bytes_per_token(model) / rate
    contexts = np.array(list(steps), dtype=float)
    medians = np.array([statistics.median(values) for values in steps.values()])
    # Relative errors count: a straight line through a million tokens would not see what happens at a thousand.
    weights = 1 / medians
    slope, start = np.polyfit(contexts, medians, 1, w=weights)
    fitted = start + slope * contexts
    for (context, values), line in zip(steps.items(), fitted, strict=True):
        run.row(
            {
                "context": context,
                "step_ms": statistics.median(values),
                "step_ms_min": min(values),
                "step_ms_max": max(values),
                "line_ms": float(line),
                "of_line": statistics.median(values) / float(line),
            }
        )
    run.summary("read_gb_per_s", rate / 1e9)
    run.summary("us_per_token_of_context", 1000 * float(slope))
    run.summary("predicted_us_per_token_of_context", predicted_us)
    run.target("slope_of_predicted", 1000 * float(slope) / predicted_us, at_most=1 / 0.7)
    run.target("farthest_from_the_line", float(np.abs(medians / fitted - 1).max()), at_most=0.15)


def _bytes_per_token(model: FilledModel) -> float:
    return model.geometry.block_bytes / model.geometry.block_tokens


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    contexts = " ".join(map(str, CONTEXTS))
    parser.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS", help=f"default {contexts}")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")


if __name__ == "__main__":
    sys.exit(main("growth", QUESTION, measure, _add_arguments))
