"""``python -m benchmarks.gpu_cluster``: long contexts in a cluster whose processes share one GPU.

Two questions. Does a cluster of two instances and three daemons find a needle in a million tokens, with full prefill?
And what do first and further tokens of a Llama-3-8B cost at 128K, 512K and a million tokens, all local and with three
quarters of the context in other daemons, with and without MPS? The weights are random, the work is real. A context that
leaves no room for 32 layers is measured with as many as fit; the table says how many.

The time per output token is taken behind a cache that was filled without prefill (``filled_cache``). The time to the
first token is that of a full prefill, for the contexts of ``--prefill``.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from pathlib import Path

import infinitellm
from benchmarks.checkpoints import SHAPES, CheckpointShape, random_prompt, write_random_checkpoint
from benchmarks.filled_cache import CacheFiller
from benchmarks.filled_requests import NEAR, FilledModel, time_answer
from benchmarks.gpu_plan import (
    BLOCK_TOKENS,
    DTYPE,
    LENDERS,
    chunk_tokens_for,
    deal,
    fit,
    geometry_of,
    weight_bytes,
    with_layers,
)
from benchmarks.harness import Run, main
from benchmarks.long_request import VoidMeasurementError
from benchmarks.mps import mps, mps_is_installed
from benchmarks.placements import run_clusters
from infinitellm import AsyncClient, Progress, Tokens
from services.core.blocks import BlockKeySpace, block_keys
from services.core.errors import ConfigError, InfiniteLLMError
from services.instance.model import checkpoint_fingerprint
from services.launcher.cluster import LocalCluster
from services.launcher.console import Console
from services.launcher.needle.checkpoint import write_checkpoint
from services.launcher.needle.spec import needle_spec
from services.launcher.needle.task import make_task
from services.launcher.options import ClusterOptions

QUESTION = "what do long contexts cost in a cluster whose processes share one GPU?"
CONTEXTS = (131072, 524288, 1048576)
PREFILLED = (131072,)
NEEDLE_TOKENS = 1_000_000
QUICK_CONTEXTS, QUICK_PREFILLED, QUICK_NEEDLE_TOKENS, QUICK_LAYERS = (32768, 131072), (32768,), 131072, 4
_CHUNK_TOKENS = 4096
_NEEDLE_CHUNK_TOKENS = 8192
_NEEDLE_LAYERS = 8  # 8 KiB of KV a token
_NEEDLE_POOL_MIB = 3200  # three of them hold it, two do not
_REQUEST_TIMEOUT_S = 3600.0
_STATUS_TIMEOUT_S = 20.0
_TAIL_TOKENS = 1024
_POLL_S = 0.05
_SHOW_S = 2.0
_MIXED_STEP_S = 5.0  # a chunk behind a million tokens takes so long; there is nobody beside it


def measure(run: Run) -> None:
    options = run.options
    if run.quick:
        options.contexts = options.contexts or QUICK_CONTEXTS
        options.prefill = QUICK_PREFILLED if options.prefill is None else options.prefill
        options.needle_tokens = options.needle_tokens or QUICK_NEEDLE_TOKENS
        options.layers = options.layers or QUICK_LAYERS
    options.contexts = options.contexts or CONTEXTS
    options.prefill = PREFILLED if options.prefill is None else options.prefill
    options.needle_tokens = options.needle_tokens or NEEDLE_TOKENS
    options.mps = options.mps or ("both" if mps_is_installed() else "off")
    if options.mps != "off" and not mps_is_installed():
        raise SystemExit("gpu_cluster: nvidia-cuda-mps-control is not on PATH; measure without it: --mps off")
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-cluster-", dir=options.directory) as directory:
            for with_mps in {"on": (True,), "off": (False,), "both": (True, False)}[options.mps]:
                with mps(with_mps):
                    if not options.skip_needle:
                        _needle(run, Path(directory) / f"needle-{with_mps}", with_mps)
                    for placement in options.placements:
                        _llama(run, Path(directory), placement == "spread", with_mps)
    except (InfiniteLLMError, infinitellm.InfiniteLLMError) as error:
        raise SystemExit(f"gpu_cluster: {error}") from error


def _needle(run: Run, path: Path, with_mps: bool) -> None:
    """Two instances and three daemons; the prompt fills more than two of the pools."""
    spec = needle_spec("std", layers=_NEEDLE_LAYERS)
    write_checkpoint(path, spec, DTYPE)
    tokens = run.options.needle_tokens
    task = make_task(spec.vocabulary, tokens, 0.37, seed=1)
    cluster = ClusterOptions(
        model=path,
        instances=2,
        kvdaemons=1,
        pool_mib=max(16, _NEEDLE_POOL_MIB * tokens // NEEDLE_TOKENS),
        dtype=DTYPE,
        http_port=0,
        grpc_port=0,
        device=run.options.device,
        overlay=_overlay(chunk_tokens_for(tokens, _NEEDLE_CHUNK_TOKENS)),
    )

    async def body(clusters: Sequence[LocalCluster]) -> int:
        async with AsyncClient(clusters[0].grpc_address) as client:
            run.progress.update("needle: prefill")
            answer = await _ask(client, task.prompt_token_ids, len(task.expected_token_ids), run.progress.update)
            right = answer.tokens == list(task.expected_token_ids)
            run.row(
                {
                    "what": "needle",
                    "context": tokens,
                    "layers": _NEEDLE_LAYERS,
                    "mps": "with" if with_mps else "without",
                    "placement": f"{answer.daemons} daemons",
                    "ttft_s": answer.ttft_s,
                    "tpot_ms": answer.tpot_ms,
                }
            )
            run.target(f"needle_right_{'with' if with_mps else 'without'}_mps", float(right), at_least=1.0)
        return 0

    _run(cluster, body)


def _llama(run: Run, directory: Path, spread: bool, with_mps: bool) -> None:
    """One cluster for all contexts; each begins with the one before it."""
    options = run.options
    contexts = sorted(options.contexts)
    wanted = SHAPES[options.shape]
    if options.layers is not None:
        wanted = with_layers(wanted, options.layers)
    chunk_tokens = chunk_tokens_for(contexts[-1], _CHUNK_TOKENS)
    fitting = fit(wanted, _gpu_mib(options), contexts[-1], chunk_tokens, spread)
    shape = with_layers(wanted, fitting.layers)
    model = _checkpoint(run, directory / shape.name, shape)
    cluster = ClusterOptions(
        model=model.path,
        instances=1,
        kvdaemons=fitting.daemons - 1,
        pool_mib=fitting.pool_mib,
        dtype=DTYPE,
        http_port=0,
        grpc_port=0,
        start_timeout_s=600.0,
        device=options.device,
        overlay=_overlay(chunk_tokens),
    )

    async def body(clusters: Sequence[LocalCluster]) -> int:
        async with AsyncClient(clusters[0].grpc_address) as client:
            daemons = (await client.cluster_status()).kvdaemons
            async with CacheFiller(daemons, model.geometry, None) as filler:
                ttft = {
                    context: await _prefill(run, client, filler, shape, model, context, spread)
                    for context in sorted(options.prefill)
                }
                tokens = random_prompt(shape, contexts[-1], random.Random(7))
                keys = block_keys(model.keys, tokens, BLOCK_TOKENS)
                filled = 0
                for context in contexts:
                    run.progress.update(f"{_named(spread)}, {context:,} tokens: filling")
                    for kvdaemon_id, some in deal(keys[: context // BLOCK_TOKENS], filled, spread).items():
                        await filler.fill(kvdaemon_id, some)
                    filled = context // BLOCK_TOKENS
                    steps: list[float] = []
                    for turn in run.rounds(options.repetitions):
                        draw = random.Random(1000 * context + turn.number)
                        answer = await time_answer(client, tokens[:context], draw, shape)
                        run.progress.update(f"{context:,} tokens, {turn.label}: {answer.step_ms:.1f} ms a step")
                        if turn.recorded:
                            steps.append(answer.step_ms)
                    run.row(
                        {
                            "what": options.shape,
                            "context": context,
                            "layers": shape.settings["num_hidden_layers"],
                            "mps": "with" if with_mps else "without",
                            "placement": _named(spread),
                            "ttft_s": ttft.get(context, ""),
                            "tpot_ms": statistics.median(steps),
                            "tpot_ms_min": min(steps),
                            "tpot_ms_max": max(steps),
                        }
                    )
        return 0

    _run(cluster, body)


async def _prefill(
    run: Run,
    client: AsyncClient,
    filler: CacheFiller,
    shape: CheckpointShape,
    model: FilledModel,
    context: int,
    spread: bool,
) -> float:
    """The time to the first token of a prompt that nobody has seen. The near pool is as good as small meanwhile."""
    taken = await filler.take_all(NEAR) if spread else []
    share = model.geometry.blocks_for(context) // (1 + len(LENDERS))
    await filler.give_back(NEAR, taken[:share])
    run.progress.update(f"{_named(spread)}, {context:,} tokens: prefill")
    prompt = random_prompt(shape, context, random.Random(context + spread))
    answer = await _ask(client, prompt, 2, run.progress.update)
    await filler.give_back(NEAR, taken[share:])
    if spread and answer.daemons < 1 + len(LENDERS):
        raise VoidMeasurementError(f"the prompt lies on {answer.daemons} daemons, {1 + len(LENDERS)} were to have it")
    return answer.ttft_s


class _Answer:
    """One request, as its client sees it. ``daemons``: that held its blocks when its tokens had come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.arrived: list[float] = []
        self.daemons = 0
        self.ttft_s = 0.0

    @property
    def tpot_ms(self) -> float:
        gaps = len(self.arrived) - 1
        return 1000 * (self.arrived[-1] - self.arrived[0]) / gaps if gaps > 0 else float("nan")


async def _ask(client: AsyncClient, prompt: Sequence[int], count: int, show: Callable[[str], None]) -> _Answer:
    """Sends a prompt and takes ``count`` tokens; the request goes on while its placement is looked up."""
    answer = _Answer()
    started = shown = time.perf_counter()
    request_id = ""
    events = client.generate(
        prompt, max_tokens=count + _TAIL_TOKENS, ignore_eos=True, progress=True, timeout_s=_REQUEST_TIMEOUT_S
    )
    async with aclosing(events):
        async for event in events:
            now = time.perf_counter()
            request_id = event.request_id
            if isinstance(event, Progress) and now - shown >= _SHOW_S:
                shown = now
                show(f"prefill {event.computed_tokens:,}/{event.prompt_tokens:,}, {now - started:.0f} s")
            elif isinstance(event, Tokens):
                answer.ttft_s = answer.ttft_s or now - started
                answer.tokens += event.ids
                answer.arrived += [now] * len(event.ids)
                if len(answer.tokens) >= count:
                    break
        answer.daemons = await _seen(client, request_id, lambda blocks: sum(blocks) * BLOCK_TOKENS > len(prompt))
    await _seen(client, request_id, lambda blocks: not blocks)
    del answer.tokens[count:], answer.arrived[count:]
    return answer


async def _seen(client: AsyncClient, request_id: str, wanted: Callable[[Sequence[int]], bool]) -> int:
    """Waits until the cluster's status shows a request's blocks, of each daemon, as wanted; answers how many daemons.

    Raises:
        VoidMeasurementError: it does not.
    """
    deadline = time.monotonic() + _STATUS_TIMEOUT_S
    while time.monotonic() < deadline:
        requests = (await client.cluster_status()).requests
        blocks = [place.num_blocks for r in requests if r.request_id == request_id for place in r.placement]
        if wanted(blocks):
            return sum(count > 0 for count in blocks)
        await asyncio.sleep(_POLL_S)
    raise VoidMeasurementError(f"the cluster's status did not show request {request_id} as it should be")


def _checkpoint(run: Run, path: Path, shape: CheckpointShape) -> FilledModel:
    """Writes the checkpoint, unless an earlier placement has."""
    if not path.exists():
        needed = weight_bytes(shape)
        if shutil.disk_usage(path.parent).free < needed:
            raise ConfigError(
                f"{path.parent} has no room for {needed >> 30} GiB of weights: choose another --directory"
            )
        run.progress.update(f"writing {path.name}")
        # In a process of its own: this one must have nothing on the GPU.
        device = "cuda" if run.options.device.startswith("cuda") else "cpu"
        context = multiprocessing.get_context("spawn")
        writer = context.Process(target=write_random_checkpoint, args=(path, shape, device))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise ConfigError(f"the checkpoint {path.name} could not be written")
    geometry = geometry_of(shape)
    return FilledModel(path, geometry, BlockKeySpace(checkpoint_fingerprint(path), DTYPE, (0, geometry.kv_heads)))


def _overlay(chunk_tokens: int) -> dict[str, dict[str, object]]:
    return {
        "instance": {
            "max_num_seqs": 4,
            "max_batch_tokens": chunk_tokens,
            "block_tokens": BLOCK_TOKENS,
            "mixed_step_s": _MIXED_STEP_S,
            "startup_timeout_s": 300.0,
        },
        "gmanager": {"planner": False},  # or it would bring the blocks home
    }


def _run(options: ClusterOptions, body: Callable[[Sequence[LocalCluster]], Coroutine[None, None, int]]) -> None:
    if asyncio.run(run_clusters([options], Console(sys.stderr), body)):
        raise KeyboardInterrupt


def _gpu_mib(options: argparse.Namespace) -> int:
    """Memory of the GPU that nobody uses, by its driver: asked in a process of its own, without a context there."""
    if options.gpu_mib is not None:
        return int(options.gpu_mib)
    _, _, index = options.device.partition(":")
    command = ["nvidia-smi", f"--id={index or 0}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise ConfigError(f"nvidia-smi does not say how much memory is free ({error}); give --gpu-mib") from error


def _named(spread: bool) -> str:
    return "three quarters remote" if spread else "all local"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3-8b", help="default %(default)s")
    parser.add_argument(
        "--contexts", type=int, nargs="+", metavar="TOKENS", help=f"default {' '.join(map(str, CONTEXTS))}"
    )
    parser.add_argument(
        "--prefill",
        type=int,
        nargs="*",
        metavar="TOKENS",
        help="contexts computed in full for the time to the first token (default: 128K; a million takes a "
        "quarter of an hour on an H100 with 32 layers)",
    )
    parser.add_argument(
        "--placements", nargs="+", choices=("local", "spread"), default=("local", "spread"), help="default: both"
    )
    parser.add_argument("--mps", choices=("on", "off", "both"), help="default: both, where MPS is installed")
    parser.add_argument("--layers", type=int, help="of the Llama (default: 32, or as many as fit)")
    parser.add_argument("--repetitions", type=int, default=3, help="default %(default)s")
    parser.add_argument("--needle-tokens", type=int, metavar="N", help=f"default {NEEDLE_TOKENS}")
    parser.add_argument("--skip-needle", action="store_true", help="only the Llama")
    parser.add_argument("--device", default="cuda", help="of all processes (default %(default)s)")
    parser.add_argument("--gpu-mib", type=int, metavar="N", help="memory to fill (default: what nvidia-smi calls free)")
    parser.add_argument("--directory", type=Path, metavar="DIR", help="for the checkpoints, up to 16 GiB")


if __name__ == "__main__":
    sys.exit(main("gpu_cluster", QUESTION, measure, _add_arguments))
