"""Triton kernels that are one pass over memory: merging partial states and sinks, writing new keys and values.

A program takes a row and as many of its heads as fill TILE_HEADS.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Types of a Triton kernel's arguments are those of each launch.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_part(
    out,  # [rows, heads, HEAD_DIM] float32, updated
    lse,  # [rows, heads] float32, updated
    part_out,  # [n, heads, HEAD_DIM]
    part_lse,  # [n, heads]
    rows,  # [n] int64, not read unless INDEXED
    heads,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
    INDEXED: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    in_heads = head < heads
    row = tl.load(rows + index) if INDEXED else index
    dim = tl.arange(0, TILE_DIM)
    in_dim = in_heads[:, None] & (dim < HEAD_DIM)[None, :]
    to = row * heads + head
    source = index * heads + head
    old = tl.load(lse + to, mask=in_heads, other=0.0)
    part = tl.load(part_lse + source, mask=in_heads, other=0.0)
    maximum = tl.maximum(old, part)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    old_weight = tl.exp(old - shift)
    part_weight = tl.exp(part - shift)
    total = old_weight + part_weight
    divisor = tl.where(total > 0, total, 1.0)
    # An empty part changes nothing, whatever its out holds.
    readable = in_dim & (part_weight > 0)[:, None]
    new = tl.load(part_out + source[:, None] * HEAD_DIM + dim[None, :], mask=readable, other=0.0).to(tl.float32)
    at = out + to[:, None] * HEAD_DIM + dim[None, :]
    merged = tl.load(at, mask=in_dim, other=0.0) * (old_weight / divisor)[:, None]
    merged += new * (part_weight / divisor)[:, None]
    tl.store(at, merged, mask=in_dim)
    tl.store(lse + to, tl.where(total > 0, shift + tl.log(divisor), float("-inf")), mask=in_heads)


@triton.jit
def merge_sink(
    out,  # [rows, heads, HEAD_DIM] float32, updated
    lse,  # [rows, heads] float32, updated
    sinks,  # [heads]
    heads,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    """A sink is a part with lse ``sinks[head]`` and out 0."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    in_heads = head < heads
    dim = tl.arange(0, TILE_DIM)
    in_dim = in_heads[:, None] & (dim < HEAD_DIM)[None, :]
    to = row * heads + head
    old = tl.load(lse + to, mask=in_heads, other=0.0)
    sink = tl.load(sinks + head, mask=in_heads, other=0.0).to(tl.float32)
    maximum = tl.maximum(old, sink)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    old_weight = tl.exp(old - shift)
    total = old_weight + tl.exp(sink - shift)
    divisor = tl.where(total > 0, total, 1.0)
    at = out + to[:, None] * HEAD_DIM + dim[None, :]
    tl.store(at, tl.load(at, mask=in_dim, other=0.0) * (old_weight / divisor)[:, None], mask=in_dim)
    tl.store(lse + to, tl.where(total > 0, shift + tl.log(divisor), float("-inf")), mask=in_heads)


@triton.jit
def store_rows(
    k,  # [rows, heads, HEAD_DIM], rows k_stride apart
    v,  # the same, v_stride apart
    pool,  # [num_blocks, layers, heads, 2, BLOCK_TOKENS, HEAD_DIM]; already moved to the layer
    slots,  # [rows] int64
    heads,
    k_stride,
    v_stride,
    block_stride,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE_HEADS + tl.arange(0, TILE_HEADS)
    slot = tl.load(slots + row)
    dim = tl.arange(0, TILE_DIM)
    stored = (head < heads)[:, None] & (dim < HEAD_DIM)[None, :]
    source = head[:, None] * HEAD_DIM + dim[None, :]
    key = tl.load(k + row * k_stride + source, mask=stored)
    value = tl.load(v + row * v_stride + source, mask=stored)
    to = pool + slot // BLOCK_TOKENS * block_stride + slot % BLOCK_TOKENS * HEAD_DIM
    to += head[:, None] * (2 * BLOCK_TOKENS * HEAD_DIM) + dim[None, :]
    tl.store(to, key.to(pool.dtype.element_ty), mask=stored)
    tl.store(to + BLOCK_TOKENS * HEAD_DIM, value.to(pool.dtype.element_ty), mask=stored)
