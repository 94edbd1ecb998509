"""Builds small random pools, queries and plans."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import AttentionKernels, AttentionPlan, LayerParams

LAYERS = 2
LAYER = 1


@dataclass(frozen=True)
class Segment:
    """Rows at positions pos .. pos + rows - 1 over blocks that start at the given positions."""

    rows: int
    pos: int
    blocks: tuple[int, ...]


def context(keys: int, rows: int = 1, block_tokens: int = 64) -> Segment:
    """A sequence of ``keys`` tokens, the last ``rows`` of which are queries."""
    return Segment(rows, keys - rows, tuple(range(0, keys, block_tokens)))


@dataclass(frozen=True)
class Case:
    q: Tensor
    pool: Tensor
    plan: AttentionPlan
    params: LayerParams

    def run(self, kernels: AttentionKernels, out_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        out = torch.full(self.q.shape, float("nan"), dtype=out_dtype)
        lse = torch.full(self.q.shape[:2], float("nan"))
        kernels.micro_attention(self.q, self.pool, self.plan, self.params, out, lse)
        return out, lse


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make_plan(segments: list[Segment], block_ids: list[int], row_offset: int = 0) -> AttentionPlan:
    starts, block_starts = [row_offset], [0]
    for segment in segments:
        starts.append(starts[-1] + segment.rows)
        block_starts.append(block_starts[-1] + len(segment.blocks))
    return AttentionPlan(
        query_start=int32(starts),
        query_pos=int32([segment.pos for segment in segments]),
        block_start=int32(block_starts),
        block_ids=int32(block_ids),
        block_pos=int32([pos for segment in segments for pos in segment.blocks]),
        max_query_len=max((segment.rows for segment in segments), default=0),
    )


def make_case(
    segments: list[Segment],
    *,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 32,
    block_tokens: int = 64,
    dtype: torch.dtype = torch.float32,
    window: int = 0,
    softcap: float = 0.0,
    seed: int = 0,
) -> Case:
    """Blocks lie in the pool in random order; what is not written yet, and the other layer, holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(segment.blocks) for segment in segments)
    pool = torch.full((count + 2, LAYERS, kv_heads, 2, block_tokens, head_dim), float("nan"), dtype=dtype)
    block_ids = (torch.randperm(count + 2, generator=generator)[:count]).tolist()
    entries = [(segment, pos) for segment in segments for pos in segment.blocks]
    for block, (segment, pos) in zip(block_ids, entries, strict=True):
        written = max(0, min(block_tokens, segment.pos + segment.rows - pos))
        values = torch.randn(kv_heads, 2, written, head_dim, generator=generator)
        pool[block, LAYER, :, :, :written] = values.to(dtype)
    rows = sum(segment.rows for segment in segments)
    q = torch.randn(rows, kv_heads * group, head_dim, generator=generator).to(dtype)
    params = LayerParams(LAYER, scale=head_dim**-0.5 * 1.5, window=window, softcap=softcap)
    return Case(q, pool, make_plan(segments, block_ids), params)
