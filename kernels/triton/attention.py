"""Triton kernel of micro-attention: one program per query tile, KV head and split of the segment's blocks.

The same kernel decodes and prefills. An effective row is a query row and a head of the KV head's group, ``row * GROUP +
head``; a tile of TILE_ROWS of them shares every key it reads. Few rows leave a GPU idle, so their blocks are dealt out
over splits whose partial states ``merge_splits`` puts together.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Types of a Triton kernel's arguments are those of each launch.

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def first_entry_after(block_pos, entry, end, position, offset):
    """First entry in entry .. end whose block_pos + offset > position, else end; positions ascend."""
    while entry < end:
        middle = (entry + end) // 2
        if tl.load(block_pos + middle) + offset > position:
            end = middle
        else:
            entry = middle + 1
    return entry


@triton.jit
def attend(
    q,  # [rows, q_heads, head_dim], rows q_stride apart
    pool,  # [num_blocks, layers, kv_heads, 2, BLOCK_TOKENS, HEAD_DIM]; already moved to the layer
    query_start,
    query_pos,
    block_start,
    block_ids,
    block_pos,
    out,  # [splits, rows, q_heads, head_dim] float32 or the pool's dtype
    lse,  # [splits, rows, q_heads] float32
    q_stride,
    block_stride,
    rows,
    scale,  # of the scores; with a soft-cap divided by it, otherwise times log2(e)
    softcap,  # in units of log 2
    window,
    tiles,  # query tiles per segment
    num_splits,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,  # divides BLOCK_TOKENS
    TILE_DIM: tl.constexpr,  # power of two, at least HEAD_DIM
    CAPPED: tl.constexpr,
    WIDEN: tl.constexpr,  # multiply in float32 whatever the pool's dtype
):
    segment = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    kv_head = tl.program_id(1)
    split = tl.program_id(2)

    row_begin = tl.load(query_start + segment)
    row_end = tl.load(query_start + segment + 1)
    effective = (row_end - row_begin) * GROUP
    if tile * TILE_ROWS >= effective:
        return

    index = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    used = index < effective
    row = row_begin + index // GROUP
    head = kv_head * GROUP + index % GROUP
    dim = tl.arange(0, TILE_DIM)
    in_dim = dim < HEAD_DIM
    first_pos = tl.load(query_pos + segment)
    position = first_pos + index // GROUP
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD_DIM + dim[None, :],
        mask=used[:, None] & in_dim[None, :],
        other=0.0,
    )
    if WIDEN:
        queries = queries.to(tl.float32)

    # Positions outside oldest < pos <= newest are seen by no row of the tile; the blocks between are this program's.
    newest = first_pos + (tl.minimum((tile + 1) * TILE_ROWS, effective) - 1) // GROUP
    oldest = -1
    if window > 0:
        oldest = first_pos + tile * TILE_ROWS // GROUP - window
    begin = tl.load(block_start + segment)
    end = tl.load(block_start + segment + 1)
    begin = first_entry_after(block_pos, begin, end, oldest, BLOCK_TOKENS - 1)
    end = first_entry_after(block_pos, begin, end, newest, 0)
    share = (end - begin + num_splits - 1) // num_splits
    begin = tl.minimum(begin + split * share, end)
    end = tl.minimum(begin + share, end)

    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    PARTS: tl.constexpr = BLOCK_TOKENS // TILE_KEYS
    for step in range(begin * PARTS, end * PARTS):
        offset = step % PARTS * TILE_KEYS + tl.arange(0, TILE_KEYS)
        key_pos = tl.load(block_pos + step // PARTS) + offset
        block = tl.load(block_ids + step // PARTS).to(tl.int64)
        keys_at = pool + block * block_stride + kv_head * (2 * BLOCK_TOKENS * HEAD_DIM)
        elements = offset[:, None] * HEAD_DIM + dim[None, :]
        # What no row sees may never have been written: it must not be read as a value.
        readable = ((key_pos > oldest) & (key_pos <= newest))[:, None] & in_dim[None, :]
        keys = tl.load(keys_at + elements, mask=readable, other=0.0)
        values = tl.load(keys_at + BLOCK_TOKENS * HEAD_DIM + elements, mask=readable, other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)

        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if CAPPED:
            magnitude = tl.abs(scores)  # tanh(x) = 1 - 2 / (exp(2 x) + 1), odd
            tanh = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
            scores = tl.where(scores < 0, -softcap * tanh, softcap * tanh)
        visible = key_pos[None, :] <= position[:, None]
        if window > 0:
            visible = visible & (key_pos[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))

        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc += tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        maximum = new_maximum

    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    acc = acc / divisor[:, None]
    logarithm = tl.where(seen, (maximum + tl.log2(divisor)) * LN_2, float("-inf"))
    place = (split.to(tl.int64) * rows + row) * (KV_HEADS * GROUP) + head
    tl.store(lse + place, logarithm, mask=used)
    tl.store(
        out + place[:, None] * HEAD_DIM + dim[None, :],
        acc.to(out.dtype.element_ty),
        mask=used[:, None] & in_dim[None, :],
    )


@triton.jit
def merge_splits(
    part_out,  # [SPLITS, places, HEAD_DIM] float32; place = row and head
    part_lse,  # [SPLITS, places] float32
    out,  # [places, HEAD_DIM]
    lse,  # [places] float32
    places,
    SPLITS: tl.constexpr,
    TILE_SPLITS: tl.constexpr,  # power of two, at least SPLITS
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
):
    """The state of all splits together, one program per place."""
    place = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, TILE_SPLITS)
    dim = tl.arange(0, TILE_DIM)
    in_dim = dim < HEAD_DIM
    at = split.to(tl.int64) * places + place
    logarithms = tl.load(part_lse + at, mask=split < SPLITS, other=float("-inf"))
    maximum = tl.max(logarithms, 0)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum)
    weights = tl.exp(logarithms - shift)
    # Empty splits are not read: rows of no segment have no out at all.
    outs = tl.load(
        part_out + at[:, None] * HEAD_DIM + dim[None, :],
        mask=(logarithms > float("-inf"))[:, None] & in_dim[None, :],
        other=0.0,
    )
    total = tl.sum(weights, 0)
    divisor = tl.where(total > 0, total, 1.0)
    merged = tl.sum(outs * weights[:, None], 0) / divisor
    tl.store(out + place * HEAD_DIM + dim, merged.to(out.dtype.element_ty), mask=in_dim)
    tl.store(lse + place, tl.where(total > 0, shift + tl.log(divisor), float("-inf")))
