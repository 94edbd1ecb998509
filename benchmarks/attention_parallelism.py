"""``python -m benchmarks.attention_parallelism``: the paper's micro-benchmark, on the processors at hand.

One decode attention layer with LLaMA2-13B's shapes, computed by several processes together in three ways: the query
travels (DistAttention), keys and values travel (RingAttention), or heads are divided (tensor parallelism).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from benchmarks.attention_methods import METHODS
from benchmarks.attention_ranks import Measured, Ranks, kv_bytes
from benchmarks.decode_layer import BLOCK_TOKENS
from benchmarks.harness import Run, main
from services.core.errors import ConfigError
from services.dataplane.select import Scheme

QUESTION = "one decode attention layer of LLaMA2-13B: should queries travel, or keys and values, or heads be divided?"
CONTEXTS = (4096, 16384, 65536, 131072, 262144)
PROCESSES = (2, 3, 4)
DIST, RING, TP = METHODS
PAPER = {RING: "7.7-19.8", TP: "1.01-1.25"}  # times DistAttention's time, 4 GPUs
_GOAL_CONTEXT = 131072
_GOAL_BYTES = 20.0
_LAYER_TOKENS = {DIST: 131072, TP: 131072, RING: 16384}  # of all layers of a turn together, at least
_LEAST_LAYERS = {DIST: 2, TP: 2, RING: 1}
_TOLERANCE = 0.02  # of the largest output: bfloat16 has 8 bits, and each part is rounded once


@dataclass(slots=True)
class Timed:
    """What was measured of one method.

    Attributes:
        sent_bytes: by all ranks together in a layer, the same in each.
    """

    layer_ms: list[float] = field(default_factory=list)
    sent_bytes: float = 0.0


def measure(run: Run) -> None:
    cores = sorted(os.sched_getaffinity(0))
    contexts = run.options.contexts or (CONTEXTS[:1] if run.quick else CONTEXTS)
    for context in contexts:
        if context < BLOCK_TOKENS * max(PROCESSES) or context % BLOCK_TOKENS:
            raise SystemExit(f"attention_parallelism: --contexts {context}: use multiples of {BLOCK_TOKENS} from 256")
    for processes in run.options.processes or (PROCESSES[:1] if run.quick else PROCESSES):
        with tempfile.TemporaryDirectory(prefix="attention-") as directory:
            run.progress.update(f"{processes} processes: starting")
            with Ranks(processes, cores, run.options.transport, Path(directory)) as ranks:
                for context in contexts:
                    _measure_context(run, ranks, processes, context)


def _measure_context(run: Run, ranks: Ranks, processes: int, context: int) -> None:
    label = f"{processes} processes, {context:,} tokens"
    timed = {name: Timed() for name in METHODS}
    run.progress.update(f"{label}: filling {kv_bytes(context) / 2**30:.1f} GiB")
    try:
        with ranks.context(context):
            for turn in run.rounds(run.options.repetitions):
                outs: dict[str, list[float]] = {}
                for name in turn.order(list(METHODS)):
                    layers = 1 if run.quick else max(_LEAST_LAYERS[name], _LAYER_TOKENS[name] // context)
                    measured = ranks.measure(name, layers)
                    run.progress.update(f"{label}, {turn.label}: {name}, {1000 * measured[0].layer_s:.2f} ms a layer")
                    outs[name] = measured[0].out
                    if turn.recorded:
                        _add(timed[name], measured)
                check_agreement(outs)
    except ConfigError as error:
        raise SystemExit(f"attention_parallelism: {error}") from error
    _record(run, processes, context, timed)


def _add(timed: Timed, measured: Sequence[Measured]) -> None:
    timed.layer_ms.append(1000 * measured[0].layer_s)
    timed.sent_bytes = sum(rank.sent_bytes for rank in measured)


def check_agreement(outs: dict[str, list[float]]) -> None:
    """Ends the benchmark if two methods' results differ by more than rounding: what they took would mean nothing."""
    base = outs[DIST]
    most = _TOLERANCE * max(map(abs, base))
    for name, out in outs.items():
        apart = max(abs(a - b) for a, b in zip(base, out, strict=True))
        if not apart <= most:
            raise SystemExit(
                f"attention_parallelism: {name} and {DIST} computed different results: they are {apart:.3g} apart, "
                f"{most:.3g} are allowed"
            )


def _record(run: Run, processes: int, context: int, timed: dict[str, Timed]) -> None:
    dist = timed[DIST]
    for name, own in timed.items():
        over_dist = [a / b for a, b in zip(own.layer_ms, dist.layer_ms, strict=True)]
        run.row(
            {
                "processes": processes,
                "context": context,
                "method": name,
                "layer_ms": statistics.median(own.layer_ms),
                "layer_ms_min": min(own.layer_ms),
                "layer_ms_max": max(own.layer_ms),
                "sent_bytes": own.sent_bytes,
                "time_over_dist": statistics.median(over_dist),
                "time_over_dist_min": min(over_dist),
                "time_over_dist_max": max(over_dist),
                "paper_over_dist": PAPER.get(name, ""),
            }
        )
        if name != DIST:
            short = "ring" if name == RING else "tp"
            run.target(f"{short}_over_dist_{context}_{processes}", statistics.median(over_dist), at_least=1.0)
    if context == _GOAL_CONTEXT:
        ratio = timed[RING].sent_bytes / dist.sent_bytes
        run.target(f"ring_bytes_over_dist_{context}_{processes}", ratio, at_least=_GOAL_BYTES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    contexts, processes = " ".join(map(str, CONTEXTS)), " ".join(map(str, PROCESSES))
    parser.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS", help=f"default {contexts}")
    parser.add_argument("--processes", type=int, nargs="+", choices=PROCESSES, help=f"default {processes}")
    parser.add_argument("--transport", choices=get_args(Scheme), default="tcp", help="default %(default)s")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")


if __name__ == "__main__":
    sys.exit(main("attention_parallelism", QUESTION, measure, add_arguments))
