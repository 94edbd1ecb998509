"""Measures which sizes of tiles are best for a pool's shape on this GPU, and keeps them for all later processes.

Not part of serving: it takes seconds per size, most of them the compiler's. ``benchmarks.kernel_gpu`` calls it.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kernels.interface import AttentionPlan, LayerParams
from kernels.triton.kernels import TritonKernels, describe_gpu, shape_of
from kernels.triton.tiling import Kind, Tiling, candidates
from kernels.triton.tuning import TilingCache, choose

_log = logging.getLogger(__name__)

_WARM_UP = 3
_SAMPLES = 5
_CALLS = 4  # of a sample
_PREFILL_ROWS = 2048


def tune(
    pool: Tensor,
    q_heads: int,
    cache: TilingCache,
    kinds: Iterable[Kind] = tuple(Kind),
    again: bool = False,
    measurement: Callable[[Tensor, int, Kind], Callable[[Tiling], float]] | None = None,
) -> dict[Kind, Tiling]:
    """Measures what the cache does not know yet, or all of it ``again``; answers the sizes of each kind.

    Args:
        pool: [num_blocks, layers, kv_heads, 2, block_tokens, head_dim] on a GPU; only read. The more of it, the better:
            a pool that the GPU's cache holds says little.
        measurement: what times a launch, given pool, q_heads and kind; None: CUDA events.

    Raises:
        RuntimeError: called while a CUDA graph is captured, or nothing could be launched.
    """
    if pool.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("kernels cannot be tuned while a CUDA graph is captured: tune before")
    gpu, found = describe_gpu(pool.device), {}
    for kind in kinds:
        shape = shape_of(pool, q_heads, kind)
        tiling = None if again else cache.tuned(gpu, shape)
        if tiling is None:
            tiling = choose(gpu, shape, (measurement or time_on_gpu)(pool, q_heads, kind))
            if tiling is None:
                raise RuntimeError(f"no kernel for {shape.key} can be launched on {gpu.name}: see the log")
            _log.info("%s on %s: %s", shape.key, gpu.name, tiling)
            cache.keep(gpu, shape, tiling)
        found[kind] = tiling
    return found


def time_on_gpu(pool: Tensor, q_heads: int, kind: Kind) -> Callable[[Tiling], float]:
    """Seconds of a layer's call, the median of a few, over all of the pool's blocks.

    Decoding: one sequence of half the blocks and seven that share the rest. Prefill: the last rows of one sequence.
    """
    blocks, block_tokens = pool.shape[0], pool.shape[4]
    rest = max(1, blocks // 14)
    lengths = [blocks] if kind is Kind.PREFILL or blocks < 14 else [blocks - 7 * rest, *[rest] * 7]
    rows = min(_PREFILL_ROWS, blocks * block_tokens) if kind is Kind.PREFILL else 1
    plan = plan_of([length * block_tokens for length in lengths], rows, block_tokens, pool.device)
    q = torch.randn(rows * len(lengths), q_heads, pool.shape[5], device=pool.device).to(pool.dtype)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], device=pool.device)
    params = [LayerParams(layer, pool.shape[5] ** -0.5) for layer in range(pool.shape[1])]
    if pool.is_cuda:
        _compile(
            lambda tiling: TritonKernels({kind: tiling}).micro_attention(q, pool, plan, params[0], out, lse),
            candidates(describe_gpu(pool.device), shape_of(pool, q_heads, kind)),
        )
    expected: list[Tensor] = []  # what the first that can be launched, as a rule the default, gives

    def measure(tiling: Tiling) -> float:
        kernels = TritonKernels({kind: tiling})

        def call(number: int) -> None:
            kernels.micro_attention(q, pool, plan, params[number % len(params)], out, lse)

        for number in range(_WARM_UP):
            call(len(params) * number)  # the first layer
        # One that is fast because the compiler got it wrong is not chosen.
        expected.append(out.clone())
        torch.testing.assert_close(out, expected[0], atol=0.05 * float(out.abs().max()), rtol=0)
        del expected[1:]
        seconds = []
        for _ in range(_SAMPLES):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            before.record()
            for number in range(_CALLS):
                call(number)
            after.record()
            after.synchronize()
            seconds.append(float(before.elapsed_time(after)) * 1e-3 / _CALLS)
        return statistics.median(seconds)

    return measure


def _compile(launch: Callable[[Tiling], None], tried: list[Tiling]) -> None:
    """Launches each once, side by side: what takes long is the compiler, and it lets other threads run."""
    with ThreadPoolExecutor(min(len(tried), os.cpu_count() or 1)) as threads:
        for failed in [threads.submit(launch, tiling) for tiling in tried]:
            failed.exception()  # said when it is measured
    torch.cuda.synchronize()


def plan_of(contexts: list[int], rows: int, block_tokens: int, device: torch.device) -> AttentionPlan:
    """The last ``rows`` rows of sequences of these lengths, whose blocks lie in random order."""
    counts = [-(-context // block_tokens) for context in contexts]
    total = sum(counts)
    starts = torch.tensor([0, *counts]).cumsum(0)

    def on_device(values: Tensor) -> Tensor:
        return values.to(device=device, dtype=torch.int32)

    return AttentionPlan(
        query_start=on_device(torch.arange(len(contexts) + 1) * rows),
        query_pos=on_device(torch.tensor(contexts) - rows),
        block_start=on_device(starts),
        block_ids=on_device(torch.randperm(total, generator=torch.Generator().manual_seed(1))),
        block_pos=on_device(torch.cat([torch.arange(count) * block_tokens for count in counts])),
        max_query_len=rows,
    )
