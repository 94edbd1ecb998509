"""Triton kernels of micro-attention: the items of a schedule, and the merge of those that are parts of one tile.

A program computes one item for one KV head. All query heads of the head's group are rows of one tile, so each key is
read once for all of them. Blocks that every row sees in full go through a loop without any mask; only those at the
diagonal and at the window's edge are masked.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Types of a Triton kernel's arguments are those of each launch.

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.schedule import ITEM_FIELDS, ROW_FIELDS

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def score(queries, keys, scale, softcap, CAPPED: tl.constexpr):
    """queries keys^T, [rows, keys], in units that ``unit_of`` turns into those of log 2."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
    if CAPPED:
        scores = scores * scale
        magnitude = tl.abs(scores)  # tanh(x) = 1 - 2 / (exp(2 x) + 1), odd
        tanh = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2_E)) + 1.0)
        scores = tl.where(scores < 0, -softcap * tanh, softcap * tanh)
    return scores


# Numbers that differ from batch to batch and layer to layer: none is worth a kernel of its own.
@triton.jit(do_not_specialize=["places", "window"])
def attend(
    q,  # [rows, q_heads, head_dim], rows q_stride apart
    pool,  # [num_blocks, layers, kv_heads, 2, BLOCK_TOKENS, HEAD_DIM]; already moved to the layer
    pool_rows,  # the same as a descriptor of rows of HEAD_DIM, in boxes of TILE_KEYS; None unless DESCRIBED
    block_ids,
    block_pos,
    count,  # [1], items: the schedule
    items,
    out,  # [rows, q_heads, HEAD_DIM] float32 or the pool's dtype
    lse,  # [rows, q_heads] float32
    part_out,  # [kv_heads, places, HEAD_DIM] float32: of items that are parts of a tile
    part_lse,  # [kv_heads, places] float32, logarithms to base 2
    q_stride,
    block_stride,
    places,
    scale,  # of the scores, not negative; with a soft-cap divided by it, otherwise times log2(e)
    softcap,  # in units of log 2
    window,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_KEYS: tl.constexpr,  # divides BLOCK_TOKENS
    TILE_DIM: tl.constexpr,  # power of two, at least HEAD_DIM
    CAPPED: tl.constexpr,
    NEGATED: tl.constexpr,  # the scale was negative
    DESCRIBED: tl.constexpr,  # unmasked tiles are copied by the tensor memory accelerator; HEAD_DIM is TILE_DIM
    WIDEN: tl.constexpr,  # multiply in float32 whatever the pool's dtype
):
    # Neighbours read neighbouring heads of the same blocks: together a contiguous slab.
    kv_head = tl.program_id(0) % KV_HEADS
    number = tl.program_id(0) // KV_HEADS
    if number >= tl.load(count):
        return
    item = items + number * ITEM_FIELDS
    row_begin = tl.load(item)
    effective = tl.load(item + 1)
    first_pos = tl.load(item + 2)
    tile = tl.load(item + 3)
    begin = tl.load(item + 4)
    full_begin = tl.load(item + 5)
    full_end = tl.load(item + 6)
    end = tl.load(item + 7)
    place = tl.load(item + 8)

    index = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    used = index < effective
    row = row_begin + index // GROUP
    head = kv_head * GROUP + index % GROUP
    dim = tl.arange(0, TILE_DIM)
    in_dim = dim < HEAD_DIM
    position = first_pos + index // GROUP
    queries = tl.load(
        q + row.to(tl.int64)[:, None] * q_stride + head[:, None] * HEAD_DIM + dim[None, :],
        mask=used[:, None] & in_dim[None, :],
        other=0.0,
    )
    if WIDEN:
        queries = queries.to(tl.float32)
    if NEGATED:
        queries = -queries

    unit = scale
    if CAPPED:
        unit = 1.0
    maximum = tl.full([TILE_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([TILE_ROWS], tl.float32)
    acc = tl.zeros([TILE_ROWS, TILE_DIM], tl.float32)
    PARTS: tl.constexpr = BLOCK_TOKENS // TILE_KEYS
    key = tl.arange(0, TILE_KEYS)
    elements = key[:, None] * HEAD_DIM + dim[None, :]
    keys_of_head = pool + kv_head * (2 * BLOCK_TOKENS * HEAD_DIM)

    # A block's number is loaded one step before it is used: no read of keys ever waits for it.
    last = full_end * PARTS - 1
    block = tl.load(block_ids + full_begin, mask=full_begin < full_end, other=0)
    for step in range(full_begin * PARTS, full_end * PARTS):
        following = tl.load(block_ids + tl.minimum(step + 1, last) // PARTS)
        keys_at = keys_of_head + block.to(tl.int64) * block_stride + step % PARTS * (TILE_KEYS * HEAD_DIM)
        if DESCRIBED:
            first_key = kv_head * (2 * BLOCK_TOKENS) + step % PARTS * TILE_KEYS
            first_key += block * (block_stride // HEAD_DIM).to(tl.int32)
            keys = pool_rows.load([first_key, 0])
            values = pool_rows.load([first_key + BLOCK_TOKENS, 0])
        elif HEAD_DIM == TILE_DIM:
            keys = tl.load(keys_at + elements)
            values = tl.load(keys_at + BLOCK_TOKENS * HEAD_DIM + elements)
        else:
            keys = tl.load(keys_at + elements, mask=in_dim[None, :], other=0.0)
            values = tl.load(keys_at + BLOCK_TOKENS * HEAD_DIM + elements, mask=in_dim[None, :], other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = score(queries, keys, scale, softcap, CAPPED)
        new_maximum = tl.maximum(maximum, tl.max(scores, 1) * unit)
        weights = tl.exp2(scores * unit - new_maximum[:, None])
        rescale = tl.exp2(maximum - new_maximum)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        maximum = new_maximum
        block = following

    # Positions outside oldest < pos <= newest are seen by no row of the tile.
    newest = first_pos + (tl.minimum((tile + 1) * TILE_ROWS, effective) - 1) // GROUP
    oldest = -1
    if window > 0:
        oldest = first_pos + tile * TILE_ROWS // GROUP - window
    left = (full_begin - begin) * PARTS
    for masked in range(left + (end - full_end) * PARTS):
        step = tl.where(masked < left, begin * PARTS + masked, full_end * PARTS + masked - left)
        offset = step % PARTS * TILE_KEYS + key
        key_pos = tl.load(block_pos + step // PARTS) + offset
        keys_at = keys_of_head + tl.load(block_ids + step // PARTS).to(tl.int64) * block_stride
        keys_at += step % PARTS * (TILE_KEYS * HEAD_DIM)
        # What no row sees may never have been written: it must not be read as a value.
        readable = ((key_pos > oldest) & (key_pos <= newest))[:, None] & in_dim[None, :]
        keys = tl.load(keys_at + elements, mask=readable, other=0.0)
        values = tl.load(keys_at + BLOCK_TOKENS * HEAD_DIM + elements, mask=readable, other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        visible = key_pos[None, :] <= position[:, None]
        if window > 0:
            visible = visible & (key_pos[None, :] > position[:, None] - window)
        scores = tl.where(visible, score(queries, keys, scale, softcap, CAPPED) * unit, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        weights = tl.exp2(scores - shift[:, None])
        rescale = tl.exp2(maximum - shift)
        total = total * rescale + tl.sum(weights, 1)
        acc = acc * rescale[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
        maximum = new_maximum

    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    acc = acc / divisor[:, None]
    logarithm = tl.where(seen, maximum + tl.log2(divisor), float("-inf"))
    written = used[:, None] & in_dim[None, :]
    if place < 0:
        to = row.to(tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(lse + to, logarithm * LN_2, mask=used)
        tl.store(out + to[:, None] * HEAD_DIM + dim[None, :], acc.to(out.dtype.element_ty), mask=written)
    else:
        to = kv_head.to(tl.int64) * places + place + tl.arange(0, TILE_ROWS)
        tl.store(part_lse + to, logarithm, mask=used)
        tl.store(part_out + to[:, None] * HEAD_DIM + dim[None, :], acc, mask=written)


@triton.jit(do_not_specialize=["rows", "segments", "places"])
def merge_items(
    part_out,  # [kv_heads, places, HEAD_DIM] float32
    part_lse,  # [kv_heads, places] float32, logarithms to base 2
    row_parts,  # [rows, ROW_FIELDS] int32
    query_start,
    out,  # [rows, q_heads, HEAD_DIM]
    lse,  # [rows, q_heads] float32
    rows,
    segments,
    places,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE_DIM: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
):
    """Writes the rows that ``attend`` did not: those whose tile was split, and those of no segment.

    One program per MERGE_ROWS rows and query head.
    """
    head = tl.program_id(0) % (KV_HEADS * GROUP)
    first = tl.program_id(0) // (KV_HEADS * GROUP) * MERGE_ROWS
    covered_from = tl.load(query_start)
    covered_to = tl.load(query_start + segments)
    some = first + tl.arange(0, MERGE_ROWS)
    covered = (some >= covered_from) & (some < covered_to)
    parts = tl.load(row_parts + some * ROW_FIELDS + 2, mask=covered, other=0)
    if tl.max(((parts != 1) & (some < rows)).to(tl.int32), 0) == 0:
        return

    split = tl.arange(0, TILE_SPLITS)
    dim = tl.arange(0, TILE_DIM)
    in_dim = dim < HEAD_DIM
    for row in range(first, tl.minimum(first + MERGE_ROWS, rows)):
        known = (row >= covered_from) & (row < covered_to)
        of_row = row_parts + row * ROW_FIELDS
        splits = tl.load(of_row + 2, mask=known, other=0)
        if splits != 1:
            tile_rows = tl.load(of_row + 3, mask=known, other=1)
            index = (row - tl.load(of_row, mask=known, other=0)) * GROUP + head % GROUP
            place = tl.load(of_row + 1, mask=known, other=0)
            place += index // tile_rows * splits * tile_rows + index % tile_rows
            of_head = (head // GROUP).to(tl.int64) * places + place
            maximum = float("-inf")
            total = 0.0
            acc = tl.zeros([TILE_DIM], tl.float32)
            for start in range(0, splits, TILE_SPLITS):
                there = start + split < splits
                at = of_head + (start + split) * tile_rows
                logarithms = tl.load(part_lse + at, mask=there, other=float("-inf"))
                outs = tl.load(
                    part_out + at[:, None] * HEAD_DIM + dim[None, :], mask=there[:, None] & in_dim[None, :], other=0.0
                )
                new_maximum = tl.maximum(maximum, tl.max(logarithms, 0))
                shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
                weights = tl.exp2(logarithms - shift)
                rescale = tl.exp2(maximum - shift)
                total = total * rescale + tl.sum(weights, 0)
                acc = acc * rescale + tl.sum(outs * weights[:, None], 0)
                maximum = new_maximum
            divisor = tl.where(total > 0, total, 1.0)
            to = tl.cast(row, tl.int64) * (KV_HEADS * GROUP) + head
            tl.store(out + to * HEAD_DIM + dim, (acc / divisor).to(out.dtype.element_ty), mask=in_dim)
            tl.store(lse + to, tl.where(total > 0, (maximum + tl.log2(divisor)) * LN_2, float("-inf")))
