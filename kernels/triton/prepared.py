"""What the kernels know of a plan: its schedule for each kind of tile, made on the device and kept for all layers."""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from kernels.interface import AttentionPlan
from kernels.triton.schedule import ITEM_FIELDS, ROW_FIELDS, schedule
from kernels.triton.tiling import Gpu, Kind, Tiling, decode_rows

_EVERY = (1 << 31) - 1
_MIN_BLOCKS = 2  # an item of fewer blocks costs more to merge than it saves
_LANES = 64
_KEPT_PLANS = 64  # of a daemon's connections and a model's windows
_SHORT_ROWS = 64


@dataclass(frozen=True, slots=True)
class Launch:
    """The items of one kind, ``capacity`` at most; how many there are, only the device knows."""

    tiling: Tiling
    count: Tensor
    items: Tensor
    capacity: int


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan's schedule for one window.

    Attributes:
        row_parts: [rows, ROW_FIELDS] int32, where the partial states of each row are.
        places: of partial states, per KV head.
    """

    launches: tuple[Launch, ...]
    row_parts: Tensor
    places: int


def prepare(
    plan: AttentionPlan,
    rows: int,
    kv_heads: int,
    group: int,
    block_tokens: int,
    window: int,
    gpu: Gpu,
    tiling_of: Callable[[Kind], Tiling],
) -> Prepared:
    """Launches the schedule kernel. All sizes follow from the plan's: nothing is read from the device.

    Decoding rows and prefill chunks in one batch take one launch each: a tile of 16 rows that waits for memory and one
    of 128 that keeps the tensor cores busy want other numbers of warps, registers and bytes of shared memory, and one
    kernel with both inside has the larger of each. A batch of one kind takes one.
    """
    small = decode_rows(group)
    if plan.max_query_len * group <= small:
        kinds = [(Kind.DECODE, 0, _EVERY)]
    elif rows == plan.segments * plan.max_query_len:  # all are as long as the longest
        kinds = [(Kind.PREFILL, 0, _EVERY)]
    else:
        kinds = [(Kind.DECODE, 0, small), (Kind.PREFILL, small, _EVERY)]
    device = plan.query_pos.device
    row_parts = torch.empty(rows, ROW_FIELDS.value, dtype=torch.int32, device=device)
    launches, places = [], 0
    for kind, low, high in kinds if plan.segments else ():
        tiling = tiling_of(kind)
        if kind is Kind.PREFILL and plan.max_query_len * group <= _SHORT_ROWS < tiling.tile_rows:
            tiling = replace(tiling, tile_rows=_SHORT_ROWS, num_warps=min(tiling.num_warps, 4), max_registers=0)
        target = max(1, tiling.programs * gpu.multiprocessors // kv_heads)
        tiles = rows * group // tiling.tile_rows + plan.segments
        count = torch.empty(1, dtype=torch.int32, device=device)
        items = torch.empty(target + tiles, ITEM_FIELDS.value, dtype=torch.int32, device=device)
        schedule[(plan.segments,)](
            plan.query_start,
            plan.query_pos,
            plan.block_start,
            plan.block_pos,
            count,
            items,
            row_parts,
            plan.segments,
            window,
            target,
            places,
            low,
            high,
            GROUP=group,
            BLOCK_TOKENS=block_tokens,
            TILE_ROWS=tiling.tile_rows,
            MIN_BLOCKS=_MIN_BLOCKS,
            TILE_SEGMENTS=triton.next_power_of_2(plan.segments),
            LANES=_LANES,
        )
        launches.append(Launch(tiling, count, items, target + tiles))
        places += (target + min(target, tiles)) * tiling.tile_rows
    return Prepared(tuple(launches), row_parts, places)


class PreparedPlans:
    """Schedules of the plans that were used last.

    A schedule belongs to a plan object. While a CUDA graph is captured, it belongs to that capture as well: the graph
    makes it anew at each replay, when the plan's tensors may hold another batch.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[AttentionPlan, Prepared]] = OrderedDict()

    def find(self, plan: AttentionPlan, key: Hashable, make: Callable[[], Prepared]) -> Prepared:
        """The schedule for ``plan`` and all else it depends on, which ``key`` names."""
        capture = _capture_id(plan.query_pos)
        if capture == _UNKNOWN:
            return make()
        whole = (id(plan), capture, key)
        found = self._kept.get(whole)
        # The plan is kept with it, so that no other gets its id.
        prepared = make() if found is None else found[1]
        self._kept[whole] = (plan, prepared)
        self._kept.move_to_end(whole)
        if len(self._kept) > _KEPT_PLANS:
            self._kept.popitem(last=False)
        return prepared


_NO_CAPTURE = 0
_UNKNOWN = -1


def _capture_id(tensor: Tensor) -> int:
    """Which capture the current stream is in; _NO_CAPTURE: none, _UNKNOWN: the driver does not say."""
    if not tensor.is_cuda or not torch.cuda.is_current_stream_capturing():
        return _NO_CAPTURE
    # torch has no name for it. The arguments left out, all optional, are those of the graph's nodes.
    status, number = ctypes.c_int(), ctypes.c_uint64()
    stream = ctypes.c_void_p(torch.cuda.current_stream(tensor.device).cuda_stream)
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return _UNKNOWN
    failed = ask(stream, ctypes.byref(status), ctypes.byref(number), None, None, None)
    return _UNKNOWN if failed else int(number.value)
