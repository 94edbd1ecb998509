"""One decoding sequence's layer with LLaMA2-13B's shapes: its query, its keys and values, and attention over parts."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import AttentionPlan, LayerParams
from kernels.cpu import CpuKernels
from services.core.blocks import PoolGeometry
from services.dataplane.transport import Buffer

HEADS, HEAD_DIM, BLOCK_TOKENS = 40, 128, 64
GEOMETRY = PoolGeometry(1, HEADS, BLOCK_TOKENS, HEAD_DIM, "bfloat16")
_DISTINCT = 13  # blocks of random numbers; all others are these, scaled
_PARAMS = LayerParams(0, HEAD_DIM**-0.5)


def fill_blocks(pool: Tensor, blocks: range) -> None:
    """Fills blocks of ``[blocks, 1, HEADS, 2, BLOCK_TOKENS, HEAD_DIM]``; what a block holds depends on its number only.

    No two blocks weigh the same, so that a result over other blocks than these is another one.
    """
    draw = torch.Generator().manual_seed(1)
    some = torch.randn(_DISTINCT, *GEOMETRY.block_shape, generator=draw).bfloat16()
    scales = (0.5 + torch.rand(pool.shape[0], generator=draw)).tolist()
    for block in blocks:
        torch.mul(some[block % _DISTINCT], scales[block], out=pool[block])


def make_query() -> Tensor:
    """[1, HEADS, HEAD_DIM] bfloat16, the same in every process; large, so that a few keys weigh much."""
    return (2 * torch.randn(1, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))).bfloat16()


def share_of(total: int, rank: int, ranks: int) -> range:
    """The rank's part of ``range(total)``, as even as can be."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)


class Attention:
    """The kernel over blocks that are all visible to the query. Keys have no positions here, so neither have blocks."""

    def __init__(self) -> None:
        self.kernels = CpuKernels(1)
        self._plans: dict[int, AttentionPlan] = {}

    def attend(self, q: Tensor, blocks: Tensor, out: Tensor, lse: Tensor) -> None:
        """The partial state of ``q`` over ``blocks`` [n, 1, heads, 2, BLOCK_TOKENS, HEAD_DIM]."""
        self.kernels.micro_attention(q, blocks, self._plan(len(blocks)), _PARAMS, out, lse)

    def _plan(self, blocks: int) -> AttentionPlan:
        plan = self._plans.get(blocks)
        if plan is None:
            ids = torch.arange(blocks, dtype=torch.int32)
            plan = self._plans[blocks] = AttentionPlan(
                query_start=torch.tensor([0, 1], dtype=torch.int32),
                query_pos=torch.tensor([blocks * BLOCK_TOKENS - 1], dtype=torch.int32),
                block_start=torch.tensor([0, blocks], dtype=torch.int32),
                block_ids=ids,
                block_pos=ids * BLOCK_TOKENS,
                max_query_len=1,
            )
        return plan


def bytes_of(tensor: Tensor) -> Buffer:
    """A contiguous tensor's memory."""
    return tensor.view(torch.uint8).reshape(-1).numpy().data


def tensor_of(data: Buffer, dtype: torch.dtype, *shape: int, offset: int = 0) -> Tensor:
    """A tensor on memory, from a byte on."""
    count = torch.Size(shape).numel()
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(shape)
