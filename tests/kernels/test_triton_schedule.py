"""How the Triton kernels deal a batch out to programs, and attention with sizes other than the default ones."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

import oracle
import pytest
import torch
from attention_cases import Segment, context, make_case, make_plan
from on_device import DEVICE, OnDevice, to_device

pytest.importorskip("triton")
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_triton_interpreter.py", allow_module_level=True)

from kernels import AttentionPlan
from kernels.triton import TritonKernels
from kernels.triton.prepared import Prepared, PreparedPlans, prepare
from kernels.triton.tiling import Gpu, Kind, Tiling

pytestmark = [pytest.mark.gpu] if DEVICE != "cpu" else []
GPU = Gpu("of the test", (9, 0), 4, 227 * 1024)
TILINGS = {Kind.DECODE: Tiling(16, 16, 1, 1, 4), Kind.PREFILL: Tiling(32, 16, 1, 1, 4)}
BLOCK = 16
GROUP = 3


def prepared_for(plan: AttentionPlan, window: int) -> Prepared:
    rows = int(plan.query_start[-1])
    return prepare(to_device(plan, DEVICE), rows, 1, GROUP, BLOCK, window, GPU, TILINGS.__getitem__)


@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("rows", [1, 30])
def test_items_are_all_of_the_work_in_equal_parts(window: int, rows: int) -> None:
    """Each block that a row of a tile sees is in one of the tile's items, and no other block is in any."""
    segments = [
        context(4000, 1, BLOCK),
        *[context(40 + 7 * short, min(rows, 9 * short + 1), BLOCK) for short in range(6)],
    ]
    segments += [Segment(2, 100, ()), Segment(0, 7, (0,)), Segment(rows, 300, (0, 64, 96, 304, 320, 336, 1600))]
    plan = make_plan(segments, list(range(sum(len(segment.blocks) for segment in segments))))
    seen: Counter[tuple[int, int, int]] = Counter()  # first row, tile, entry
    unmasked: set[tuple[int, int, int]] = set()
    tiles: set[tuple[int, int]] = set()
    longest, places = 0, []
    prepared = prepared_for(plan, window)
    for launch in prepared.launches:
        count = int(launch.count)
        assert count <= launch.capacity
        for row, effective, _, tile, begin, full_begin, full_end, end, place in launch.items[:count].tolist():
            assert 0 <= begin <= full_begin <= full_end <= end
            assert tile * launch.tiling.tile_rows < effective
            tiles.add((row, tile))
            seen.update((row, tile, entry) for entry in range(begin, end))
            unmasked.update((row, tile, entry) for entry in range(full_begin, full_end))
            longest = max(longest, end - begin)
            if place >= 0:
                assert place + launch.tiling.tile_rows <= prepared.places
                places.append(place)
    assert len(places) == len(set(places))

    expected, fully = Counter[tuple[int, int, int]](), set()
    tile_rows = {launch.tiling.tile_rows for launch in prepared.launches}
    for number, segment in enumerate(segments):
        first_row, first_entry = int(plan.query_start[number]), int(plan.block_start[number])
        size = min(tile_rows) if segment.rows * GROUP <= 16 else max(tile_rows)
        for tile in range(-(-segment.rows * GROUP // size)):
            assert (first_row, tile) in tiles
            lowest = segment.pos + tile * size // GROUP
            highest = segment.pos + (min((tile + 1) * size, segment.rows * GROUP) - 1) // GROUP
            for entry, pos in enumerate(segment.blocks, first_entry):
                if pos <= highest and (window == 0 or pos + BLOCK - 1 > lowest - window):
                    expected[first_row, tile, entry] += 1
                if pos + BLOCK - 1 <= lowest and (window == 0 or pos > highest - window):
                    fully.add((first_row, tile, entry))
    assert seen == expected
    assert unmasked == fully
    # The long sequence's 250 blocks are dealt out to the test's four multiprocessors, four items each.
    assert longest <= max(4, -(-sum(expected.values()) // 16) + 1)


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize(("tile_keys", "descriptors"), [(16, False), (32, False), (16, True)])
def test_other_tiles(tile_rows: int, tile_keys: int, descriptors: bool) -> None:
    """Tiles smaller than a block, rows of one position in two tiles, items of the smallest size."""
    tilings = {
        Kind.DECODE: Tiling(16, tile_keys, 2, 2, 64, descriptors=descriptors),
        Kind.PREFILL: Tiling(tile_rows, tile_keys, 4, 2, 64, descriptors=descriptors),
    }
    kernels = TritonKernels(tilings)
    case = make_case([context(500, 1, 32), context(110, 50, 32)], group=3, block_tokens=32, kv_heads=1, window=300)
    out, lse = case.run(kernels if DEVICE == "cpu" else OnDevice(kernels, DEVICE))
    expected_out, expected_lse = oracle.attention(case.q, case.pool, case.plan, case.params)
    torch.testing.assert_close(out.double(), expected_out, atol=4e-6, rtol=0)
    torch.testing.assert_close(lse.double(), expected_lse, atol=4e-6, rtol=1e-6)


def test_a_negative_scale() -> None:
    case = make_case([context(100, 20)])
    case = dataclasses.replace(case, params=dataclasses.replace(case.params, scale=-0.3))
    kernels = TritonKernels()
    out, _ = case.run(kernels if DEVICE == "cpu" else OnDevice(kernels, DEVICE))
    expected, _ = oracle.attention(case.q, case.pool, case.plan, case.params)
    torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=0)


def test_a_plan_is_scheduled_once_for_each_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kernels.triton.prepared._KEPT_PLANS", 5)
    plans, made = PreparedPlans(), []

    def find(plan: AttentionPlan, window: int) -> Prepared:
        def make() -> Prepared:
            made.append(window)
            return prepared_for(plan, window)

        return plans.find(plan, window, make)

    plan = make_plan([context(100, 1, BLOCK)], list(range(7)))
    first = find(plan, 0)
    assert [find(plan, window) is first for window in (30, 0, 30, 0)] == [False, True, False, True]
    assert made == [0, 30]
    for _ in range(5):  # as many as are kept
        find(dataclasses.replace(plan), 0)
    find(plan, 0)
    assert made == [0, 30, *[0] * 6]
