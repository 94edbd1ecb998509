"""``python -m benchmarks.distance``: what is a decode step worth whose KV cache lies partly on another machine?

One request of a real cluster, its cache filled without prefill (see ``filled_cache``), none of it, half, three quarters
or nearly all of it on another daemon. Beside it, in the same rounds, the bare kernel: one process with all of the
context, and two with half of it each. What the two save is what half a cache elsewhere could save a step at best.
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
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import infinitellm
from benchmarks.checkpoints import random_prompt
from benchmarks.filled_cache import CacheFiller
from benchmarks.filled_requests import (
    BLOCK_TOKENS,
    FAR,
    GROUP,
    NEAR,
    ROWS,
    SHAPE,
    TIMEOUT_S,
    FilledAnswer,
    FilledModel,
    cluster_options,
    least_wire_bytes,
    pin,
    time_answer,
    wire_bytes,
    write_model,
)
from benchmarks.harness import Round, Run, main
from benchmarks.kernel_processes import KernelProcess, together_s
from benchmarks.placements import run_clusters
from infinitellm import AsyncClient
from services.core.blocks import block_keys
from services.core.errors import InfiniteLLMError
from services.dataplane.select import Scheme
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console

QUESTION = "what is a step worth whose KV cache lies partly on another machine?"
CONTEXTS = (8192, 65536, 262144)
SHORT = 8192  # up to here distance may cost something; beyond it must pay
SHARES = (0.0, 0.5, 0.75, 0.95)  # of the blocks, elsewhere
NONE, TCP = "none", "tcp"  # shared memory, and TCP within this machine; others are emulated over shared memory
LINKS = (NONE, TCP, "25gbit,50us", "10gbit,200us")
_PASSES = 16


@dataclass(slots=True)
class Placed:
    """One placement of one context, and what was measured with it.

    Attributes:
        tokens: of the filled part; every placement has its own.
        wire_bytes: exchanged with the far daemon in each answer.
    """

    share: float
    tokens: tuple[int, ...]
    answers: list[FilledAnswer] = field(default_factory=list)
    wire_bytes: list[float] = field(default_factory=list)

    @property
    def step_ms(self) -> list[float]:
        return [answer.step_ms for answer in self.answers]

    @property
    def ttft_s(self) -> list[float]:
        return [answer.ttft_s for answer in self.answers]


@dataclass(slots=True)
class Kernels:
    """The bare kernel's passes through all layers, in milliseconds."""

    one_ms: list[float] = field(default_factory=list)
    two_ms: list[float] = field(default_factory=list)


def measure(run: Run) -> None:
    """Measures each context over each link, in a cluster of its own."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("distance: needs two cores, one for each machine that it plays")
    try:
        with tempfile.TemporaryDirectory(prefix="distance-") as directory:
            run.progress.update("writing the checkpoint")
            model = write_model(Path(directory))
            for context in run.options.contexts or (CONTEXTS[:1] if run.quick else CONTEXTS):
                for link in run.options.links or (LINKS[:1] if run.quick else LINKS):
                    measuring = _measure_context(run, model, (cores[0], cores[1]), context, link)
                    if asyncio.run(measuring):
                        raise KeyboardInterrupt
    except (InfiniteLLMError, infinitellm.InfiniteLLMError) as error:
        raise SystemExit(f"distance: {error}") from error


async def _measure_context(run: Run, model: FilledModel, cores: tuple[int, int], context: int, link: str) -> int:
    draw = random.Random(context)
    placements = [Placed(share, random_prompt(SHAPE, context, draw)) for share in SHARES]
    kernels = Kernels()
    emulated = None if link in (NONE, TCP) else link
    transport: Scheme = "tcp" if link == TCP else "shm"
    label = f"{context:,} tokens, link {link}"

    async def body(clusters: Sequence[LocalCluster]) -> int:
        pin(*cores)
        async with AsyncClient(clusters[0].grpc_address) as client:
            daemons = (await client.cluster_status()).kvdaemons
            async with CacheFiller(daemons, model.geometry, emulated, transport) as filler:
                await _borrow_once(client, filler, draw)
                for placed in placements:
                    run.progress.update(f"{label}: filling, {placed.share:.0%} elsewhere")
                    await _fill(filler, block_keys(model.keys, placed.tokens, BLOCK_TOKENS), placed.share)
                with ExitStack() as stack:
                    one, *two = (stack.enter_context(kernel) for kernel in _kernel_processes(model, cores, context))
                    for turn in run.rounds(run.options.repetitions):
                        await asyncio.to_thread(_take_kernel_turn, turn, kernels, one, two)
                        for placed in turn.order(placements):
                            before = await asyncio.to_thread(wire_bytes, clusters[0].http_address)
                            answer = await time_answer(client, placed.tokens, draw)
                            exchanged = await asyncio.to_thread(wire_bytes, clusters[0].http_address) - before
                            run.progress.update(
                                f"{label}, {turn.label}, {placed.share:.0%} elsewhere: {answer.step_ms:.1f} ms a step"
                            )
                            if turn.recorded:
                                placed.answers.append(answer)
                                placed.wire_bytes.append(exchanged)
        return 0

    blocks = model.geometry.blocks_for(context)
    far = [round(share * blocks) for share in SHARES]
    filled = max(sum(far), sum(blocks - count for count in far))
    code = await run_clusters([cluster_options(model, filled, 1, emulated, transport)], Console(sys.stderr), body)
    if not code:
        _record(run, context, link, placements, kernels, ROWS * least_wire_bytes(model))
    return code


async def _borrow_once(client: AsyncClient, filler: CacheFiller, draw: random.Random) -> None:
    """Lets the instance open its session with the other daemon: it attaches only to blocks of daemons it knows."""
    taken = await filler.take_all(NEAR)
    async for _ in client.generate(random_prompt(SHAPE, 2 * BLOCK_TOKENS, draw), max_tokens=1):
        pass
    await filler.give_back(NEAR, taken)


async def _fill(filler: CacheFiller, keys: Sequence[bytes], share: float) -> None:
    """The beginning of a sequence elsewhere, as with a prompt that had no room."""
    far = round(share * len(keys))
    await filler.fill(FAR, keys[:far])
    await filler.fill(NEAR, keys[far:])


def _kernel_processes(model: FilledModel, cores: tuple[int, int], context: int) -> list[KernelProcess]:
    """One with all of the context, then two with half of it each."""
    near, far = cores
    parts = ((near, context), (near, context // 2), (far, context - context // 2))
    return [KernelProcess(core, tokens, GROUP, model.geometry) for core, tokens in parts]


def _take_kernel_turn(turn: Round, kernels: Kernels, one: KernelProcess, two: Sequence[KernelProcess]) -> None:
    for processes, into in turn.order([([one], kernels.one_ms), (list(two), kernels.two_ms)]):
        seconds = together_s(processes, "attend", _PASSES, TIMEOUT_S)
        if turn.recorded:
            into.append(1000 * seconds)


def _record(
    run: Run, context: int, link: str, placements: Sequence[Placed], kernels: Kernels, least_wire_bytes: int
) -> None:
    """``least_wire_bytes``: of one answer."""
    local = placements[0]
    saved_by_kernels = statistics.median(a - b for a, b in zip(kernels.one_ms, kernels.two_ms, strict=True))
    for placed in placements:
        of_local = [a / b for a, b in zip(placed.step_ms, local.step_ms, strict=True)]
        saved = statistics.median(a - b for a, b in zip(local.step_ms, placed.step_ms, strict=True))
        run.row(
            {
                "context": context,
                "link": link,
                "elsewhere": placed.share,
                "step_ms": statistics.median(placed.step_ms),
                "of_local": statistics.median(of_local),
                "of_local_min": min(of_local),
                "of_local_max": max(of_local),
                "saved_of_kernels": saved / saved_by_kernels,
                "wire_of_least": statistics.median(placed.wire_bytes) / least_wire_bytes,
                "ttft_s": statistics.median(placed.ttft_s),
                "ttft_of_local": statistics.median(placed.ttft_s) / statistics.median(local.ttft_s),
                "kernel_one_ms": statistics.median(kernels.one_ms),
                "kernel_two_ms": statistics.median(kernels.two_ms),
            }
        )
        if placed.share == 0.5:
            name = f"{context}_{link}"
            wire = statistics.median(placed.wire_bytes) / least_wire_bytes
            run.target(f"wire_bytes_of_least_{name}", wire, at_most=1.1)
            if context <= SHORT:
                run.target(f"half_of_local_{name}", statistics.median(of_local), at_most=1.15)
            else:
                run.target(f"saved_of_kernels_{name}", saved / saved_by_kernels, at_least=0.8)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    contexts = " ".join(map(str, CONTEXTS))
    parser.add_argument("--contexts", type=int, nargs="+", metavar="TOKENS", help=f"default {contexts}")
    parser.add_argument("--links", nargs="+", metavar="LINK", help=f"default {' '.join(LINKS)}")
    parser.add_argument("--repetitions", type=int, default=5, help="default %(default)s")


if __name__ == "__main__":
    sys.exit(main("distance", QUESTION, measure, _add_arguments))
