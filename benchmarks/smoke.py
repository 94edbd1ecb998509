"""``python -m benchmarks.smoke``: what it costs a long request that three quarters of its KV cache lie elsewhere.

Real clusters, started as ``infinite-llm up`` starts them, answer needle prompts: one holds the whole KV cache in the
instance's own pool, the other a quarter of it there and the rest on three daemons. Both run at the same time, the
requests one after another. Every answer is compared with the oracle; a wrong one ends the benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import infinitellm
from benchmarks.harness import Round, Run, Samples, main
from benchmarks.long_request import (
    ANSWER_TOKENS,
    COUNTED_TOKENS,
    MAX_TOKENS,
    LongPrompt,
    Timed,
    VoidMeasurementError,
    expected_tokens,
    time_request,
)
from benchmarks.placements import PlacementPlan, plan_placements, run_clusters
from infinitellm import AsyncClient
from services.core.blocks import PoolGeometry
from services.core.errors import InfiniteLLMError
from services.launcher.checkpoint_info import inspect_checkpoint
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console
from services.launcher.needle.checkpoint import Dtype, write_checkpoint
from services.launcher.needle.spec import NeedleSpec, needle_spec
from services.launcher.needle.task import make_task
from services.launcher.plan import DEFAULT_BLOCK_TOKENS

QUESTION = "what does a long request pay when three quarters of its KV cache lie on other daemons?"
CONTEXTS = (4096, 16384, 49152)
QUICK_CONTEXTS = CONTEXTS[:2]
_DTYPE: Dtype = "bfloat16"
_DEPTH = 0.37
_FIRST_SEED = 1000  # of repetition 0; Python's random draws the same for a seed and its negative
_LONG = 32768  # contexts from here on are measured less often
_TOLERANCE = 0.1  # of the remote share; pools are whole MiB, and the open block is always local
_MIB = 1 << 20


@dataclass(slots=True)
class _Peer:
    """One of the two clusters and what was measured in it."""

    name: str
    wanted_share: float
    client: AsyncClient
    timed: list[Timed] = field(default_factory=list)

    def ttft_s(self) -> Samples:
        return Samples(tuple(timed.ttft_s for timed in self.timed))

    def tpot_ms(self) -> Samples:
        return Samples(tuple(timed.tpot_ms for timed in self.timed))


def measure(run: Run) -> None:
    """Measures all contexts, each in two clusters of its own. Whatever goes wrong ends it, with what went wrong."""
    try:
        code = asyncio.run(_measure(run))
    except (InfiniteLLMError, infinitellm.InfiniteLLMError) as error:
        raise SystemExit(f"smoke: {error}") from error
    if code:
        raise SystemExit(code)


async def _measure(run: Run) -> int:
    spec = needle_spec("std")
    with tempfile.TemporaryDirectory(prefix="smoke-") as directory:
        model = Path(directory) / "needle-std"
        run.progress.update("building the needle checkpoint")
        write_checkpoint(model, spec, _DTYPE)
        run.progress.clear()
        geometry = inspect_checkpoint(model).geometry(DEFAULT_BLOCK_TOKENS, _DTYPE)
        assert geometry is not None, "the needle checkpoint says what its KV cache is like"
        for context in run.options.contexts or (QUICK_CONTEXTS if run.quick else CONTEXTS):
            code = await _measure_context(run, spec, model, geometry, context)
            if code:
                return code
    return 0


async def _measure_context(run: Run, spec: NeedleSpec, model: Path, geometry: PoolGeometry, context: int) -> int:
    plan = plan_placements(model, geometry, context, MAX_TOKENS)
    console = Console(sys.stderr)
    console.line(
        f"{context:,} tokens, {geometry.blocks_for(context) * geometry.block_bytes / _MIB:.0f} MiB of KV cache: "
        f"one pool of {plan.local.pool_mib} MiB, and {1 + plan.remote.kvdaemons} of {plan.remote.pool_mib} MiB"
    )

    async def body(clusters: Sequence[LocalCluster]) -> int:
        addresses = [cluster.grpc_address for cluster in clusters]
        async with AsyncClient(addresses[0]) as local, AsyncClient(addresses[1]) as remote:
            peers = (_Peer("local", 0.0, local), _Peer("remote", 0.75, remote))
            for turn in run.rounds(5 if context < _LONG else 3):
                # Half the context is enough to warm up: it opens the sessions with all daemons.
                prompt = _draw(spec, geometry, context if turn.recorded else context // 2, _FIRST_SEED + turn.number)
                for peer in turn.order(peers):
                    await _take_turn(run, prompt, plan, turn, peer)
        run.progress.clear()
        _record(run, context, plan, *peers)
        return 0

    return await run_clusters((plan.local, plan.remote), console, body)


def _draw(spec: NeedleSpec, geometry: PoolGeometry, tokens: int, seed: int) -> LongPrompt:
    """The prompt of one round, the same for both clusters. No two rounds share a prefix, so nothing is cached."""
    task = make_task(spec.vocabulary, tokens, _DEPTH, seed)
    expected = expected_tokens(spec.vocabulary, task, ANSWER_TOKENS + COUNTED_TOKENS)
    return LongPrompt(task.prompt_token_ids, expected, geometry.blocks_for(tokens))


async def _take_turn(run: Run, prompt: LongPrompt, plan: PlacementPlan, turn: Round, peer: _Peer) -> None:
    """One request to one cluster."""
    label = f"{len(prompt.token_ids):,} tokens, {turn.label}, {peer.name}"
    timed = await time_request(
        peer.client, prompt, plan.chunk_tokens, lambda text: run.progress.update(f"{label}: {text}")
    )
    run.progress.update(f"{label}: first token after {timed.ttft_s:.2f} s, then {timed.tpot_ms:.1f} ms a token")
    if not turn.recorded:
        return
    share = timed.placed.remote_share
    if abs(share - peer.wanted_share) > _TOLERANCE:
        raise VoidMeasurementError(f"{label}: {share:.0%} of the KV cache is remote, not {peer.wanted_share:.0%}")
    peer.timed.append(timed)


def _record(run: Run, context: int, plan: PlacementPlan, local: _Peer, remote: _Peer) -> None:
    for peer in (local, remote):
        ttft, tpot = peer.ttft_s(), peer.tpot_ms()
        run.row(
            {
                "context": context,
                "placement": peer.name,
                "local_mib": Samples(tuple(timed.placed.local_bytes / _MIB for timed in peer.timed)).median,
                "remote_mib": Samples(tuple(timed.placed.remote_bytes / _MIB for timed in peer.timed)).median,
                "remote_share": Samples(tuple(timed.placed.remote_share for timed in peer.timed)).median,
                "ttft_s": ttft.median,
                "ttft_s_min": min(ttft.values),
                "ttft_s_max": max(ttft.values),
                "tpot_ms": tpot.median,
                "tpot_ms_min": min(tpot.values),
                "tpot_ms_max": max(tpot.values),
                "prefill_tokens_per_s": context / ttft.median,
                "chunk_tokens": plan.chunk_tokens,
                "repetitions": len(peer.timed),
            }
        )
    run.summary(f"ttft_remote_over_local_{context}", remote.ttft_s().median / local.ttft_s().median)
    run.summary(f"tpot_remote_over_local_{context}", remote.tpot_ms().median / local.tpot_ms().median)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        metavar="TOKENS",
        help=f"lengths of the prompts; default {' '.join(map(str, CONTEXTS))}, the last not with --quick",
    )


if __name__ == "__main__":
    sys.exit(main("smoke", QUESTION, measure, _add_arguments))
