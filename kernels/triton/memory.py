"""Triton kernels that are one pass over memory: merging a partial state, and writing new keys and values."""

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
    INDEXED: tl.constexpr,
):
    """One program per row and head of the part."""
    index = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(rows + index) if INDEXED else index
    dim = tl.arange(0, TILE_DIM)
    in_dim = dim < HEAD_DIM
    to = row * heads + head
    source = index * heads + head
    old = tl.load(lse + to)
    part = tl.load(part_lse + source)
    maximum = tl.maximum(old, part)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    old_weight = tl.exp(old - shift)
    part_weight = tl.exp(part - shift)
    total = old_weight + part_weight
    divisor = tl.where(total > 0, total, 1.0)
    # An empty part changes nothing, whatever its out holds.
    readable = tl.where(part_weight > 0, HEAD_DIM, 0)
    new = tl.load(part_out + source * HEAD_DIM + dim, mask=dim < readable, other=0.0).to(tl.float32)
    merged = tl.load(out + to * HEAD_DIM + dim, mask=in_dim, other=0.0) * (old_weight / divisor)
    merged += new * (part_weight / divisor)
    tl.store(out + to * HEAD_DIM + dim, merged, mask=in_dim)
    tl.store(lse + to, tl.where(total > 0, shift + tl.log(divisor), float("-inf")))


@triton.jit
def store_rows(
    k,  # [rows, kv_heads, HEAD_DIM], rows k_stride apart
    v,  # the same, v_stride apart
    pool,  # [num_blocks, layers, kv_heads, 2, BLOCK_TOKENS, HEAD_DIM]; already moved to the layer
    slots,  # [rows] int64
    k_stride,
    v_stride,
    block_stride,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """One program per row and KV head."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    slot = tl.load(slots + row)
    dim = tl.arange(0, TILE_DIM)
    in_dim = dim < HEAD_DIM
    key = tl.load(k + row * k_stride + head * HEAD_DIM + dim, mask=in_dim)
    value = tl.load(v + row * v_stride + head * HEAD_DIM + dim, mask=in_dim)
    to = pool + slot // BLOCK_TOKENS * block_stride + head * (2 * BLOCK_TOKENS * HEAD_DIM)
    to += slot % BLOCK_TOKENS * HEAD_DIM + dim
    tl.store(to, key.to(pool.dtype.element_ty), mask=in_dim)
    tl.store(to + BLOCK_TOKENS * HEAD_DIM, value.to(pool.dtype.element_ty), mask=in_dim)
