"""The memory, the queries and the plans that ``python -m benchmarks.kernel_cpu`` measures with.

Pools are the daemons' own: memfd mappings of ``[blocks, layers, kv_heads, 2, 64, head_dim]`` bfloat16, in which the
blocks of a sequence lie in random order.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from kernels import AttentionPlan, LayerParams
from kernels.cpu import CpuKernels
from kernels.cpu.layer_ops import CpuLayerOps
from services.core.blocks import PoolGeometry
from services.dataplane.kv_pool import KvPool, Pages
from services.dataplane.memfd import HUGE_PAGE_BYTES

BLOCK_TOKENS = 64
_RUNS = 16  # into which a contiguous layer is cut, for threads to share
_TOGETHER_S = 60.0
STEP_BYTES = 256 << 20  # all layers together: more than a cache holds


class PagedCase:
    """Some sequences of one length in a pool of their own, and one row or chunk of queries at the end of each."""

    def __init__(
        self,
        context: int,
        head_dim: int,
        group: int,
        kv_heads: int,
        sequences: int = 1,
        rows: int = 1,
        layers: int = 0,
        pages: Pages = Pages.TOGETHER,
    ) -> None:
        self.context, self.head_dim, self.group, self.sequences, self.rows = context, head_dim, group, sequences, rows
        blocks = sequences * (context // BLOCK_TOKENS)
        self.layer_bytes = blocks * BLOCK_TOKENS * kv_heads * head_dim * 2 * 2
        self.layers = layers or max(2, -(-STEP_BYTES // self.layer_bytes))
        geometry = PoolGeometry(self.layers, kv_heads, BLOCK_TOKENS, head_dim, "bfloat16")
        pool_bytes = blocks * geometry.block_bytes
        self._memory = KvPool(-(-pool_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES, pages)
        self._memory.wait_until_together(_TOGETHER_S)
        self.pool = self._memory.as_tensor(geometry)[:blocks]
        _fill(self.pool)
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int()
        positions = torch.arange(0, context, BLOCK_TOKENS, dtype=torch.int32)
        self.plan = AttentionPlan(
            query_start=torch.arange(sequences + 1, dtype=torch.int32) * rows,
            query_pos=torch.full((sequences,), context - rows, dtype=torch.int32),
            block_start=torch.arange(sequences + 1, dtype=torch.int32) * (context // BLOCK_TOKENS),
            block_ids=order,
            block_pos=positions.repeat(sequences),
            max_query_len=rows,
        )
        self._in_order = order.sort().values
        self._params = [LayerParams(layer, head_dim**-0.5) for layer in range(self.layers)]
        self.q = _fill(torch.empty(sequences * rows, kv_heads * group, head_dim, dtype=torch.bfloat16))
        self.out = torch.empty_like(self.q)
        self._lse = torch.empty(self.q.shape[:2])

    def close(self) -> None:
        self._memory.close()

    def attend(self, kernels: CpuKernels, layer: int) -> None:
        """One layer's micro-attention, called as the engine calls it."""
        kernels.micro_attention(self.q, self.pool, self.plan, self._params[layer], self.out, self._lse)

    def read(self, kernels: CpuKernels, layer: int) -> None:
        """Reads what ``attend`` reads, in the order of addresses."""
        kernels.read(self.pool[:, layer], self._in_order, self.pool[0, layer].numel() * 2)

    @property
    def visible_pairs(self) -> int:
        """Pairs of a query row and a key that it sees, of one head."""
        return self.sequences * sum(self.context - self.rows + row + 1 for row in range(self.rows))


class ContiguousCase:
    """As many keys and values for torch and for reading, contiguous: [layers, 2, 1, kv_heads, tokens, head_dim].

    A group's query heads are rows of one head, which is the same for decoding: each key is read once.
    """

    def __init__(self, like: PagedCase) -> None:
        kv_heads = like.pool.shape[2]
        shape = (like.layers, 2, 1, kv_heads, like.context * like.sequences, like.head_dim)
        self._kv = _fill(torch.empty(shape, dtype=torch.bfloat16))
        self._q = _fill(torch.empty(1, kv_heads, like.group, like.head_dim, dtype=torch.bfloat16))
        self._runs = self._kv.view(-1, self._kv[0].numel() // _RUNS)  # [layers * _RUNS, ...]

    @property
    def layer_bytes(self) -> int:
        return self._kv[0].numel() * 2

    def flash(self, layer: int) -> None:
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(self._q, self._kv[layer, 0], self._kv[layer, 1])

    def read(self, kernels: CpuKernels, layer: int) -> None:
        ids = torch.arange(layer * _RUNS, (layer + 1) * _RUNS, dtype=torch.int32)
        kernels.read(self._runs, ids, self._runs.shape[1] * 2)


class ProductsCase:
    """The two matrix products of a chunk's attention as torch computes them: one query head, nothing masked."""

    def __init__(self, rows: int, context: int, head_dim: int) -> None:
        self._q = _fill(torch.empty(rows, head_dim, dtype=torch.bfloat16))
        self._kv = _fill(torch.empty(2, context, head_dim, dtype=torch.bfloat16))
        self._scores = torch.empty(rows, context, dtype=torch.bfloat16)
        self._out = torch.empty_like(self._q)
        self.pairs = rows * context

    def multiply(self) -> None:
        torch.mm(self._q, self._kv[0].T, out=self._scores)
        torch.mm(self._scores, self._kv[1], out=self._out)


class LinearCase:
    """The products of some linear layers of one shape, with the same rows; compiled, and as torch computes them."""

    def __init__(self, rows: int, inputs: int, outputs: int, dtype: torch.dtype, layers: int) -> None:
        ops = CpuLayerOps(1)
        self._x = _fill(torch.empty(rows, inputs, dtype=dtype))
        self._weights = [_fill(torch.empty(outputs, inputs, dtype=dtype)) for _ in range(layers)]
        self._linears = [ops.linear(weight, None) for weight in self._weights]

    def multiply(self, layer: int) -> None:
        linear = self._linears[layer]
        functional.linear(self._x, self._weights[layer]) if linear is None else linear(self._x)

    def multiply_by_torch(self, layer: int) -> None:
        functional.linear(self._x, self._weights[layer])


class LayerCase:
    """One layer of one decoding sequence with a single block: what a call costs besides its attention."""

    def __init__(self, kernels: CpuKernels) -> None:
        self._kernels = kernels
        self._case = PagedCase(BLOCK_TOKENS, 64, 1, 1, layers=2)
        self._k, self._v = _fill(torch.empty(2, 1, 1, 64, dtype=torch.bfloat16))
        self._slots = torch.tensor([BLOCK_TOKENS - 1])

    def call(self, layer: int) -> None:
        self._kernels.store_kv(self._k, self._v, self._case.pool, self._slots, layer)
        self._case.attend(self._kernels, layer)

    def call_with_new_plan(self, layer: int) -> None:
        """As in the first layer of a step, where the plan is not known yet."""
        self._case.plan = replace(self._case.plan)
        self.call(layer)


def _fill(tensor: Tensor) -> Tensor:
    """Random numbers, the same ones again and again: making new ones would take longer than measuring."""
    flat = tensor.view(-1)
    some = torch.randn(min(1 << 20, flat.numel()), generator=torch.Generator().manual_seed(0)).to(tensor.dtype)
    for start in range(0, flat.numel(), some.numel()):
        part = flat[start : start + some.numel()]
        part.copy_(some[: part.numel()])
    return tensor
