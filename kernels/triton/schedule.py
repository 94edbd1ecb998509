"""Triton kernel that deals a plan's work out to programs, on the device: nothing is read back, so nothing waits.

It runs once per plan and window, not once per layer. A *tile* is up to TILE_ROWS effective rows of a segment (row and
head of the KV head's group); an *item* is a tile and a run of its visible blocks, the work of one program per KV head.
All items are of about the same number of blocks, however long the sequences are: a long one beside short ones keeps
every multiprocessor busy. With ``share = max(MIN_BLOCKS, ceil(blocks of all tiles / target))`` there are at most
``target + tiles`` items, and at most ``target + min(target, tiles)`` of them belong to tiles that were split. So the
host can size the grid and all memory without knowing any length.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# Types of a Triton kernel's arguments are those of each launch.

from __future__ import annotations

import triton
import triton.language as tl

# int32 numbers of an item: first row of its segment, effective rows of the segment, position of that first row, tile,
# first block entry, first and end of those that all its rows see in full, end, place of its partial state (-1: none).
ITEM_FIELDS = tl.constexpr(9)
# int32 numbers of a row: first row of its segment, place of the segment's partial states, splits, rows of a tile.
ROW_FIELDS = tl.constexpr(4)


@triton.jit
def first_after(block_pos, low, high, bound):
    """In each lane the first entry of low .. high whose block_pos > bound, else high; positions ascend."""
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        after = tl.load(block_pos + middle, mask=searching, other=0) > bound
        high = tl.where(searching & after, middle, high)
        low = tl.where(searching & (after == 0), middle + 1, low)
    return low


@triton.jit(do_not_specialize=["segments", "window", "target", "first_place", "low", "high"])
def schedule(
    query_start,
    query_pos,
    block_start,
    block_pos,
    count,  # [1] int32: how many items there are
    items,  # [target + tiles, ITEM_FIELDS] int32
    row_parts,  # [rows, ROW_FIELDS] int32
    segments,
    window,
    target,  # items that the work is to be dealt out to
    first_place,  # of this launch's partial states; each takes TILE_ROWS places
    low,  # only segments with low < effective rows <= high
    high,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    MIN_BLOCKS: tl.constexpr,
    TILE_SEGMENTS: tl.constexpr,  # power of two, at least segments
    LANES: tl.constexpr,
):
    """One program per segment. Each looks at all segments, to know where its own items stand."""
    own = tl.program_id(0)
    segment = tl.arange(0, TILE_SEGMENTS)
    known = segment < segments
    rows = tl.load(query_start + segment + 1, mask=known, other=0) - tl.load(query_start + segment, mask=known, other=0)
    blocks = tl.load(block_start + segment + 1, mask=known, other=0) - tl.load(
        block_start + segment, mask=known, other=0
    )
    effective = rows * GROUP
    chosen = (effective > low) & (effective <= high)
    tiles = tl.where(chosen, (effective + TILE_ROWS - 1) // TILE_ROWS, 0)
    if window > 0:
        # As many as a tile's rows can see at most; which ones is looked up below, for the own segment only.
        span = window + tl.minimum(rows, (TILE_ROWS - 1) // GROUP + 2)
        blocks = tl.minimum(blocks, (span + BLOCK_TOKENS - 2) // BLOCK_TOKENS + 1)
    work = tl.sum(tiles.to(tl.int64) * blocks, 0)
    share = tl.maximum((work + target - 1) // target, MIN_BLOCKS).to(tl.int32)
    splits = tl.maximum((blocks + share - 1) // share, 1)
    numbers = tiles * splits
    if own == 0:
        tl.store(count, tl.sum(numbers, 0))

    before = segment < own
    this = segment == own
    own_tiles = tl.sum(tl.where(this, tiles, 0), 0)
    if own_tiles == 0:
        return
    own_splits = tl.sum(tl.where(this, splits, 0), 0)
    own_effective = tl.sum(tl.where(this, effective, 0), 0)
    first_item = tl.sum(tl.where(before, numbers, 0), 0)
    slots = tl.where(splits > 1, numbers, 0)
    place = first_place + tl.sum(tl.where(before, slots, 0), 0) * TILE_ROWS
    row_begin = tl.load(query_start + own)
    first_pos = tl.load(query_pos + own)
    block_begin = tl.load(block_start + own)
    block_end = tl.load(block_start + own + 1)
    lane = tl.arange(0, LANES)

    for start in range(0, own_tiles * own_splits, LANES):
        index = start + lane
        listed = index < own_tiles * own_splits
        # Programs that run at the same time read the same keys; the tiles that see most come first.
        split = index // own_tiles
        tile = own_tiles - 1 - index % own_tiles
        first_seen = first_pos + tile * TILE_ROWS // GROUP
        last_seen = first_pos + (tl.minimum((tile + 1) * TILE_ROWS, own_effective) - 1) // GROUP
        # A lane without an item searches nothing.
        nowhere = tl.where(listed, block_begin, block_end)
        to = tl.zeros([LANES], tl.int32) + block_end
        begin = nowhere
        full_begin = nowhere
        if window > 0:
            begin = first_after(block_pos, nowhere, to, first_seen - window - (BLOCK_TOKENS - 1))
            full_begin = first_after(block_pos, nowhere, to, last_seen - window)
        end = first_after(block_pos, begin, to, last_seen)
        full_end = first_after(block_pos, nowhere, to, first_seen - (BLOCK_TOKENS - 1))
        part = (end - begin + own_splits - 1) // own_splits
        begin = tl.minimum(begin + split * part, end)
        end = tl.minimum(begin + part, end)
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)
        item_place = tl.where(own_splits > 1, place + (tile * own_splits + split) * TILE_ROWS, -1)
        item = items + (first_item + index) * ITEM_FIELDS
        tl.store(item, tl.zeros([LANES], tl.int32) + row_begin, mask=listed)
        tl.store(item + 1, tl.zeros([LANES], tl.int32) + own_effective, mask=listed)
        tl.store(item + 2, tl.zeros([LANES], tl.int32) + first_pos, mask=listed)
        tl.store(item + 3, tile, mask=listed)
        tl.store(item + 4, begin, mask=listed)
        tl.store(item + 5, full_begin, mask=listed)
        tl.store(item + 6, full_end, mask=listed)
        tl.store(item + 7, end, mask=listed)
        tl.store(item + 8, item_place, mask=listed)

    for start in range(0, own_effective // GROUP, LANES):
        row = start + lane
        of_segment = row < own_effective // GROUP
        part_of = row_parts + (row_begin + row) * ROW_FIELDS
        tl.store(part_of, tl.zeros([LANES], tl.int32) + row_begin, mask=of_segment)
        tl.store(part_of + 1, tl.zeros([LANES], tl.int32) + place, mask=of_segment)
        tl.store(part_of + 2, tl.zeros([LANES], tl.int32) + own_splits, mask=of_segment)
        tl.store(part_of + 3, tl.zeros([LANES], tl.int32) + TILE_ROWS, mask=of_segment)
