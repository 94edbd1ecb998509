"""What only a GPU shows: long contexts, CUDA graphs, calls that wait for nothing, all sizes that tuning tries."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from kernels import AttentionPlan, LayerParams
from kernels.reference import ReferenceKernels
from kernels.triton import TritonKernels
from kernels.triton.kernels import describe_gpu, shape_of
from kernels.triton.tiling import Kind, Tiling, candidates
from kernels.triton.tune import plan_of, tune
from kernels.triton.tuning import TilingCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="there is no GPU"
    ),
]
BLOCK_TOKENS, LAYERS, KV_HEADS, GROUP = 64, 2, 2, 4
DEVICE = torch.device("cuda")


class Batch:
    """Queries, a pool in which all is random, and a plan; with the same sizes for the same lengths in another order."""

    def __init__(self, contexts: list[int], rows: list[int], head_dim: int = 128, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.plan = ragged(contexts, rows)
        shape = (self.plan.block_ids.numel(), LAYERS, KV_HEADS, 2, BLOCK_TOKENS, head_dim)
        self.pool = torch.randn(shape, device=DEVICE).bfloat16()
        self.q = torch.randn(sum(rows), KV_HEADS * GROUP, head_dim, device=DEVICE).bfloat16()
        self.out = torch.empty_like(self.q, dtype=torch.float32)
        self.lse = torch.empty(self.q.shape[:2], device=DEVICE)

    def run(self, kernels: TritonKernels, params: LayerParams) -> None:
        kernels.micro_attention(self.q, self.pool, self.plan, params, self.out, self.lse)

    def expected(self, params: LayerParams) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(self.out), torch.empty_like(self.lse)
        ReferenceKernels().micro_attention(self.q, self.pool, self.plan, params, out, lse)
        return out, lse

    def check(self, params: LayerParams) -> None:
        """The weights were rounded to bfloat16 before they met the values."""
        out, lse = self.expected(params)
        scale = float(out.abs().max())
        torch.testing.assert_close(self.out, out, atol=2.0**-8 * (scale + 0.05), rtol=0)
        torch.testing.assert_close(self.lse, lse, atol=1e-3, rtol=1e-5)


def ragged(contexts: list[int], rows: list[int]) -> AttentionPlan:
    """The last rows of each sequence."""
    plan = plan_of(contexts, 1, BLOCK_TOKENS, DEVICE)
    counts = torch.tensor(rows, device=DEVICE)
    return dataclasses.replace(
        plan,
        query_start=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        query_pos=(torch.tensor(contexts, device=DEVICE) - counts).int(),
        max_query_len=max(rows),
    )


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """The reference multiplies in float32, all of it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5000, 0.0), (0, 30.0)])
def test_long_contexts(head_dim: int, window: int, softcap: float) -> None:
    """A long sequence beside short ones, decoded; and with prefill chunks between them."""
    params = LayerParams(1, head_dim**-0.5, window, softcap)
    for rows in ([1] * 7, [1, 700, 1, 1, 130, 5, 1]):
        batch = Batch([65536, 2000, 1, 64, 8192, 700, 129], rows, head_dim)
        batch.run(TritonKernels(), params)
        batch.check(params)


@pytest.mark.parametrize("kind", list(Kind))
def test_all_sizes_that_tuning_tries(kind: Kind) -> None:
    batch = Batch([9000, 700, 64, 300], [1] * 4 if kind is Kind.DECODE else [600, 300, 40, 257])
    params = LayerParams(0, 0.1)
    gpu = describe_gpu(DEVICE)
    launched: list[Tiling] = []
    for tiling in candidates(gpu, shape_of(batch.pool, KV_HEADS * GROUP, kind)):
        batch.run(TritonKernels({kind: tiling}), params)
        batch.check(params)
        launched.append(tiling)
    assert len(launched) >= 3


@pytest.mark.parametrize("rows", [[1, 1, 1], [1, 90, 400]])
def test_a_graph_replays_with_another_batch(rows: list[int]) -> None:
    """The plan's tensors hold other sequences of the same sizes at a replay; two graphs share one plan."""
    kernels = TritonKernels()
    batch, other = Batch([6000, 200, 500], rows), Batch([200, 500, 6000], rows, seed=1)
    params = [LayerParams(layer, 0.1, window) for layer in range(LAYERS) for window in (0, 300)]
    for one in params:
        batch.run(kernels, one)
    torch.cuda.synchronize()
    graphs, results = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for one in params:
                batch.run(kernels, one)
                results.append((batch.out.clone(), batch.lse.clone()))
    batch.q.copy_(other.q)
    batch.pool.copy_(other.pool)
    for field in ("query_start", "query_pos", "block_start", "block_ids", "block_pos"):
        getattr(batch.plan, field).copy_(getattr(other.plan, field))
    graphs[1].replay()  # alone: it relies on nothing that the first has made
    for one, (out, lse) in zip(params, results[len(params) :], strict=True):
        batch.out.copy_(out)
        batch.lse.copy_(lse)
        batch.check(one)
    graphs[0].replay()
    for first, second in zip(results[: len(params)], results[len(params) :], strict=True):
        assert torch.equal(first[0], second[0])


def test_nothing_waits_for_the_gpu() -> None:
    kernels = TritonKernels()
    batch = Batch([3000, 100], [1, 80])
    params = LayerParams(0, 0.1)
    batch.run(kernels, params)  # compiles
    sinks = torch.zeros(KV_HEADS * GROUP, device=DEVICE)
    slots = torch.arange(2, device=DEVICE)
    k = torch.randn(2, KV_HEADS, 128, device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.plan = dataclasses.replace(batch.plan)
        batch.run(kernels, params)
        kernels.merge_partials(batch.out, batch.lse, batch.out.clone(), batch.lse.clone())
        kernels.merge_sinks(batch.out, batch.lse, sinks)
        kernels.store_kv(k, k, batch.pool, slots, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(batch.pool[0, 0, :, 0, :2], k.bfloat16().transpose(0, 1))


def test_tuning_on_the_gpu(tmp_path: Path) -> None:
    batch = Batch([20000], [1])
    found = tune(batch.pool, KV_HEADS * GROUP, TilingCache(tmp_path))
    assert set(found) == set(Kind)
    kernels = TritonKernels(cache=TilingCache(tmp_path))
    params = LayerParams(1, 0.1)
    batch.run(kernels, params)
    batch.check(params)
