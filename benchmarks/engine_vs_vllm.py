"""``python -m benchmarks.engine_vs_vllm``: how fast is one instance beside vLLM on the same core, over HTTP?

Two whole servers run side by side on one core, and one client on another asks them in turn: this project's, as
``infinite-llm up`` starts it, and vLLM's OpenAI server for CPUs (``make peers``). Checkpoints have random weights.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.checkpoints import SHAPES, CheckpointShape, random_prompt, write_random_checkpoint
from benchmarks.harness import Run, Samples, main
from benchmarks.http_load import Ask, Load, send_load
from benchmarks.peers.agreement import compare_servers
from benchmarks.peers.ours import our_command
from benchmarks.peers.server import PinnedServer, Serving
from benchmarks.peers.vllm import DEFAULT_ENVIRONMENT, vllm_command
from services.core.errors import ConfigError, InfiniteLLMError

QUESTION = "how fast is one instance beside vLLM, on the same core and over HTTP?"
CHECKPOINTS = ("llama-100m", "qwen2.5-0.5b")  # small enough for two servers on one core
MAX_MODEL_LEN = 8192
MAX_NUM_SEQS = 64
KV_BYTES = 1 << 30
REPETITIONS = 5
_SEED = 4000
_CHECKED_PROMPTS = (3, 64, 65, 200, 700, 1500)  # tokens: within a block and beyond, within a chunk and beyond
_CHECKED_TOKENS = 16
_LEAST_SAME = 2  # of the tokens of a checked prompt, on average
_IDLE_S = 5.0
_MOST_IDLE = 0.1  # of a core
_PAUSE_S = 0.3  # between turns: an engine may look out for more work for a moment


@dataclass(frozen=True, slots=True)
class Workload:
    """What one sample consists of.

    Attributes:
        at_once: requests that are sent together.
        in_a_row: how often that is done, one after another.
    """

    name: str
    at_once: int
    prompt_tokens: int
    output_tokens: int
    in_a_row: int = 1

    @property
    def is_prefill(self) -> bool:
        return self.output_tokens == 1

    @property
    def tokens(self) -> int:
        """That count: generated ones, or those of the prompts."""
        each = self.prompt_tokens if self.is_prefill else self.output_tokens
        return each * self.at_once * self.in_a_row


WORKLOADS = (
    Workload("decode-1", 1, 64, 128),
    Workload("decode-8", 8, 64, 128),
    Workload("decode-32", 32, 64, 128),
    Workload("decode-64", 64, 64, 128),
    Workload("prefill-512", 1, 512, 1, in_a_row=4),
    Workload("prefill-4096", 1, 4096, 1),
)
QUICK_WORKLOADS = (Workload("decode-8", 8, 64, 32), Workload("prefill-512", 1, 512, 1))


@dataclass(slots=True)
class Measured:
    """One server's samples of one workload, in the order of the rounds."""

    server: PinnedServer
    tokens_per_s: list[float] = field(default_factory=list)
    processor_us: list[float] = field(default_factory=list)  # of all its processes, per token
    tpot_ms: list[float] = field(default_factory=list)


def measure(run: Run) -> None:
    """Measures every checkpoint with a fresh pair of servers."""
    ratios: list[float] = []
    try:
        for name in run.options.checkpoints or CHECKPOINTS[: 1 if run.quick else None]:
            if name not in SHAPES:
                raise ConfigError(f"--checkpoints {name}: there are {', '.join(SHAPES)}")
            ratios += _measure_checkpoint(run, SHAPES[name])
    except InfiniteLLMError as error:
        raise SystemExit(f"engine_vs_vllm: {error}") from error
    _judge(run, ratios)


def _judge(run: Run, ratios: Sequence[float]) -> None:
    run.target("slowest_ratio", min(ratios), at_least=1.0)
    run.target("median_ratio", statistics.median(ratios), at_least=1.3)


def _measure_checkpoint(run: Run, shape: CheckpointShape) -> list[float]:
    """Answers its workloads' ratios."""
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="engine-vs-vllm-") as temporary, _pinned_to(cores[-1]):
        directory = Path(temporary)
        run.progress.update(f"{shape.name}: writing the checkpoint")
        write_random_checkpoint(directory / shape.name, shape)
        serving = Serving(directory / shape.name, (cores[0],), MAX_MODEL_LEN, MAX_NUM_SEQS, KV_BYTES)
        commands = (our_command(serving, directory), vllm_command(serving, run.options.vllm))
        run.progress.update(f"{shape.name}: starting both servers; vLLM compiles for minutes the first time")
        logs = [directory / f"{command.name}.log" for command in commands]
        with (
            PinnedServer(commands[1], serving.cores, logs[1]) as vllm,
            PinnedServer(commands[0], serving.cores, logs[0]) as ours,
        ):
            run.progress.update(f"{shape.name}: comparing answers")
            draw = random.Random(_SEED)
            prompts = [random_prompt(shape, tokens, draw) for tokens in _CHECKED_PROMPTS]
            agreement = compare_servers((ours, vllm), prompts, _CHECKED_TOKENS, _LEAST_SAME)
            run.summary(f"{shape.name}_same_tokens", agreement.same)
            run.summary(f"{shape.name}_near_ties", agreement.near_ties)
            for server in (ours, vllm):
                run.summary(f"{shape.name}_{server.name}_idle_percent", 100 * server.idle_share(_IDLE_S, _MOST_IDLE))
            return [
                _measure_workload(run, shape, workload, (Measured(ours), Measured(vllm)), draw)
                for workload in _chosen(run)
            ]


def _measure_workload(
    run: Run, shape: CheckpointShape, workload: Workload, sides: Sequence[Measured], draw: random.Random
) -> float:
    """Both servers take turns with the same prompts, of which no two rounds share one: nothing is cached.

    Answers the ratio.
    """
    for turn in run.rounds(run.options.repetitions):
        batches = [
            [_draw_ask(shape, workload, draw) for _ in range(workload.at_once)] for _ in range(workload.in_a_row)
        ]
        for side in turn.order(sides):
            time.sleep(_PAUSE_S)
            before = side.server.processor_s()
            loads = asyncio.run(_send(side.server, batches))
            taken_us = 1e6 * side.server.processor_s_since(before) / workload.tokens
            tokens_per_s = workload.tokens / sum(load.wall_s for load in loads)
            run.progress.update(
                f"{shape.name}, {workload.name}, {turn.label}, {side.server.name}: {tokens_per_s:.0f} tokens/s, "
                f"{taken_us:.0f} us of processor time a token"
            )
            if turn.recorded:
                side.tokens_per_s.append(tokens_per_s)
                side.processor_us.append(taken_us)
                side.tpot_ms.append(1000 * statistics.median(load.tpot_s for load in loads))
    return _record(run, shape, workload, *sides)


async def _send(server: PinnedServer, batches: Sequence[Sequence[Ask]]) -> list[Load]:
    return [await send_load(server.address, server.model, batch) for batch in batches]


def _record(run: Run, shape: CheckpointShape, workload: Workload, ours: Measured, vllm: Measured) -> float:
    our, their = Samples(tuple(ours.tokens_per_s)), Samples(tuple(vllm.tokens_per_s))
    our_us, their_us = statistics.median(ours.processor_us), statistics.median(vllm.processor_us)
    ratio = our.median / their.median
    paired = [a / b for a, b in zip(our.values, their.values, strict=True)]
    row: dict[str, str | int | float] = {
        "checkpoint": shape.name,
        "workload": workload.name,
        "ours_tokens_per_s": our.median,
        "ours_spread": our.spread,
        "vllm_tokens_per_s": their.median,
        "vllm_spread": their.spread,
        "ratio": ratio,
        "ratio_min": min(paired),
        "ratio_max": max(paired),
        "ours_processor_us_per_token": our_us,
        "vllm_processor_us_per_token": their_us,
        "processor_ratio": their_us / our_us,
    }
    if not workload.is_prefill:
        row["ours_tpot_ms"] = statistics.median(ours.tpot_ms)
        row["vllm_tpot_ms"] = statistics.median(vllm.tpot_ms)
    run.row(row | {"repetitions": len(our.values)})
    run.summary(f"{shape.name}_{workload.name}_ratio", ratio)
    return ratio


def _draw_ask(shape: CheckpointShape, workload: Workload, draw: random.Random) -> Ask:
    return Ask(random_prompt(shape, workload.prompt_tokens, draw), workload.output_tokens)


def _chosen(run: Run) -> Sequence[Workload]:
    if not run.options.workloads:
        return QUICK_WORKLOADS if run.quick else WORKLOADS
    by_name = {workload.name: workload for workload in (QUICK_WORKLOADS if run.quick else WORKLOADS)}
    unknown = [name for name in run.options.workloads if name not in by_name]
    if unknown:
        raise ConfigError(f"--workloads {' '.join(unknown)}: there are {', '.join(by_name)}")
    return [by_name[name] for name in run.options.workloads]


@contextmanager
def _pinned_to(core: int) -> Iterator[None]:
    """This process, the client, runs on one core meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoints", nargs="+", metavar="NAME", help=f"of {', '.join(SHAPES)}; default {' and '.join(CHECKPOINTS)}"
    )
    parser.add_argument("--workloads", nargs="+", metavar="NAME", help="some of them only")
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="default %(default)s")
    parser.add_argument(
        "--vllm", type=Path, default=DEFAULT_ENVIRONMENT, metavar="DIR", help="virtual environment with vLLM"
    )


if __name__ == "__main__":
    sys.exit(main("engine_vs_vllm", QUESTION, measure, _add_arguments))
