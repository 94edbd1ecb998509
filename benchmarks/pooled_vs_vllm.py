"""``python -m benchmarks.pooled_vs_vllm``: two cores and one amount of KV memory, three ways of using them.

    vllm-multi     two vLLM servers, a core and half of the memory each; a request goes to the one with more room
    vllm-single    one vLLM server, tensor parallel over both cores
    ours           two instances, a core and half of the memory each, pooled; all requests go to the gateway

All run at the same time and take turns with the same requests (see ``mixed_load``), from the same HTTP client. What a
server refuses because it could never hold it counts as refused; its tokens count for nobody.
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
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.checkpoints import SHAPES, random_prompt, write_random_checkpoint
from benchmarks.harness import Run, main
from benchmarks.mixed_load import MixedLoad, Sent, Target, send_mixed
from benchmarks.peers.agreement import compare_servers
from benchmarks.peers.ours import our_command
from benchmarks.peers.server import PinnedServer, Serving
from benchmarks.peers.vllm import DEFAULT_ENVIRONMENT, vllm_command
from services.core.errors import InfiniteLLMError

QUESTION = "what do two cores serve with pooled KV memory, beside vLLM with as much?"
# As in the paper's models of 7 and 13 billion parameters, every head has keys and values of its own: 36 KiB a token.
SHAPE = replace(
    SHAPES["llama-100m"],
    name="llama-125m-mha",
    settings={**SHAPES["llama-100m"].settings, "num_key_value_heads": 12, "max_position_embeddings": 1 << 17},
)
KV_TOKEN_BYTES = 12 * 12 * 64 * 2 * 2
BLOCK_TOKENS = 32  # vLLM's kernels want multiples of 32; its own choice, 128, wastes half a block of each request
MULTI, SINGLE, OURS = "vllm-multi", "vllm-single", "ours"
# The paper's traces 0 to 2, whose longest request takes half an instance's memory, then longer and longer ones.
LOADS = (
    MixedLoad("short-5%", 0.05, 0.5),
    MixedLoad("short-15%", 0.15, 0.5),
    MixedLoad("short-40%", 0.4, 0.5),
    MixedLoad("tail-95%", 0.05, 0.95),
    MixedLoad("tail-140%", 0.05, 1.4),
    MixedLoad("tail-175%", 0.05, 1.75),
)
LONGEST = LOADS[-1].name
MAX_NUM_SEQS = 32
CLIENTS = 32
REQUESTS = 64
_SEED = 6000
_CHECKED_PROMPTS = (3, 33, 200, 1000)  # tokens
_CHECKED_TOKENS, _LEAST_SAME = 16, 2
_IDLE_S, _MOST_IDLE = 5.0, 0.1
_PAUSE_S = 1.0


@dataclass(frozen=True, slots=True)
class Scale:
    """
    Attributes:
        pool_mib: KV cache of each half.
        outputs: tokens of any output.
        instance: settings of ours.
    """

    pool_mib: int
    outputs: tuple[int, int]
    instance: Mapping[str, object]

    @property
    def pool_tokens(self) -> int:
        return (self.pool_mib << 20) // KV_TOKEN_BYTES


SCALES = {
    # A third of the weights that a step reads: half a dozen short requests. Ours keeps 10 of 128 blocks for prefill.
    "small": Scale(72, (128, 384), {"block_tokens": 16, "max_batch_tokens": 64, "max_num_seqs": MAX_NUM_SEQS // 2}),
    # Four times the weights, as beside LLaMA2-7B and 13B on A100-80GB.
    "paper": Scale(864, (256, 768), {"block_tokens": 32, "max_batch_tokens": 512, "max_num_seqs": MAX_NUM_SEQS}),
}


@dataclass(slots=True)
class System:
    """One way of serving, and what was measured of it, by load."""

    name: str
    targets: tuple[Target, ...]
    sent: dict[str, list[Sent]] = field(default_factory=dict)

    def tokens_per_s(self, load: MixedLoad) -> list[float]:
        return [sent.output_tokens_per_s for sent in self.sent[load.name]]


def measure(run: Run) -> None:
    """Starts all servers, checks that they compute the same, and measures every load."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("pooled_vs_vllm: needs two cores")
    loads = _chosen(run)
    try:
        with tempfile.TemporaryDirectory(prefix="pooled-vs-vllm-") as temporary, ExitStack() as stack:
            directory = Path(temporary)
            run.progress.update("writing the checkpoint")
            write_random_checkpoint(directory / SHAPE.name, SHAPE)
            systems = _start(run, stack, directory, (cores[0], cores[1]))
            for load in loads:
                _measure_load(run, load, systems)
    except InfiniteLLMError as error:
        raise SystemExit(f"pooled_vs_vllm: {error}") from error
    for load in loads:
        _record(run, load, *systems)


def _start(run: Run, stack: ExitStack, directory: Path, cores: tuple[int, int]) -> list[System]:
    """All servers, checked; in the order of the systems."""
    scale, kv_bytes = SCALES[run.options.scale], SCALES[run.options.scale].pool_mib << 20
    # What the KV cache holds, without the last block: vLLM keeps one for itself.
    half = Serving(directory / SHAPE.name, cores[:1], scale.pool_tokens - BLOCK_TOKENS, MAX_NUM_SEQS, kv_bytes)
    whole = replace(half, cores=cores, max_model_len=2 * scale.pool_tokens - BLOCK_TOKENS, kv_bytes=2 * kv_bytes)
    settings = {"instance": scale.instance, "kvdaemon": {"num_threads": 1}}
    extra = ("--block-size", str(BLOCK_TOKENS))
    vllm: Path = run.options.vllm
    commands = [
        vllm_command(half, vllm, extra),
        vllm_command(replace(half, cores=cores[1:]), vllm, extra),
        vllm_command(whole, vllm, extra, tensor_parallel=True),
        our_command(whole, directory, settings, instances=2),
    ]
    where = (cores[:1], cores[1:], cores, cores)
    servers = []
    for number, (command, pinned) in enumerate(zip(commands, where, strict=True)):
        run.progress.update(f"starting {command.name}, {number + 1} of {len(commands)}; vLLM compiles the first time")
        log = directory / f"{number}-{command.name}.log"
        servers.append(stack.enter_context(PinnedServer(command, pinned, log)))
    run.progress.update("comparing answers")
    draw = random.Random(_SEED)
    prompts = [random_prompt(SHAPE, tokens, draw) for tokens in _CHECKED_PROMPTS]
    agreement = compare_servers(servers[::-1], prompts, _CHECKED_TOKENS, _LEAST_SAME)
    run.summary("same_tokens", agreement.same)
    run.summary("near_ties", agreement.near_ties)
    for number, server in enumerate(servers):
        run.summary(f"{number}_{server.name}_idle_percent", 100 * server.idle_share(_IDLE_S, _MOST_IDLE))
    one, other, single, ours = (
        Target(server.address, server.model, scale.pool_tokens * len(pinned))
        for server, pinned in zip(servers, where, strict=True)
    )
    return [System(MULTI, (one, other)), System(SINGLE, (single,)), System(OURS, (ours,))]


def _measure_load(run: Run, load: MixedLoad, systems: Sequence[System]) -> None:
    """Systems take turns; no two rounds share a prompt."""
    scale = SCALES[run.options.scale]
    requests = CLIENTS if run.quick else run.options.requests
    for turn in run.rounds(run.options.repetitions, warmup=0):
        asks = load.draw(SHAPE, requests, scale.pool_tokens, scale.outputs, str(turn.number))
        for system in turn.order(systems):
            label = f"{load.name}, {turn.label}, {system.name}"
            shown = time.monotonic()

            def show(answered: int, label: str = label) -> None:
                nonlocal shown
                if time.monotonic() - shown > 2:
                    shown = time.monotonic()
                    run.progress.update(f"{label}: {answered} of {requests} answered")

            time.sleep(_PAUSE_S)
            sent = asyncio.run(send_mixed(system.targets, asks, CLIENTS, show))
            run.progress.update(f"{label}: {sent.output_tokens_per_s:.0f} tokens/s, {sent.refused} refused")
            system.sent.setdefault(load.name, []).append(sent)


def _record(run: Run, load: MixedLoad, multi: System, single: System, ours: System) -> None:
    for system in (multi, single, ours):
        sent = system.sent[load.name]
        rates = system.tokens_per_s(load)
        ttft = [1000 * answer.ttft_s for one in sent for answer in one.answers]
        tpot = [1000 * answer.tpot_s for one in sent for answer in one.answers]
        run.row(
            {
                "load": load.name,
                "system": system.name,
                "output_tokens_per_s": statistics.median(rates),
                "smallest": min(rates),
                "largest": max(rates),
                "ttft_p50_ms": statistics.median(ttft),
                "ttft_p99_ms": _p99(ttft),
                "tpot_p50_ms": statistics.median(tpot),
                "tpot_p99_ms": _p99(tpot),
                "answered": sum(len(one.answers) for one in sent),
                "refused": sum(one.refused for one in sent),
            }
        )
    of_multi, of_single = (
        statistics.median(a / b for a, b in zip(ours.tokens_per_s(load), other.tokens_per_s(load), strict=True))
        for other in (multi, single)
    )
    run.summary(f"{load.name}_over_multi", of_multi)
    run.summary(f"{load.name}_over_single", of_single)
    run.target(f"{load.name}_over_the_better", min(of_multi, of_single), at_least=2.0 if load.name == LONGEST else 1.35)
    if load.name == LONGEST:
        run.target(f"{load.name}_over_the_worse", max(of_multi, of_single), at_least=3.4)


def _p99(values: Sequence[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _chosen(run: Run) -> Sequence[MixedLoad]:
    by_name = {load.name: load for load in LOADS}
    names = run.options.loads or ([LOADS[0].name] if run.quick else list(by_name))
    if unknown := [name for name in names if name not in by_name]:
        raise SystemExit(f"pooled_vs_vllm: --loads {' '.join(unknown)}: there are {', '.join(by_name)}")
    return [by_name[name] for name in names]


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loads", nargs="+", metavar="NAME", help=f"of {', '.join(x.name for x in LOADS)}".replace("%", "%%")
    )
    parser.add_argument(
        "--scale", choices=SCALES, default="small", help="how large KV caches and outputs are (default %(default)s)"
    )
    parser.add_argument("--requests", type=int, default=REQUESTS, help="of each load (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=2, help="of each load (default %(default)s)")
    parser.add_argument(
        "--vllm", type=Path, default=DEFAULT_ENVIRONMENT, metavar="DIR", help="virtual environment with vLLM"
    )


if __name__ == "__main__":
    sys.exit(main("pooled_vs_vllm", QUESTION, measure, _add_arguments))
