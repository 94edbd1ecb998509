"""The Triton kernels behind the interface. Nothing here waits for the device."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kernels.checks import check_attention, check_merge, check_pool, check_store
from kernels.interface import AttentionKernels, AttentionPlan, LayerParams
from kernels.triton.attention import attend, merge_splits
from kernels.triton.memory import merge_part, store_rows

_LOG2_E = 1.4426950408889634
_MIN_DOT = 16  # smallest side of a matrix product on tensor cores
_PREFILL_TILE = 64  # effective rows of a tile where there are many
_MAX_TILE_KEYS = 64
_TILE_BYTES = 16384  # of a tile's keys, and of its values; several in flight fit into 99 KiB of shared memory
_MIN_SPLIT_BLOCKS = 4  # a split of fewer blocks costs more to merge than it saves


class TritonKernels(AttentionKernels):
    """Triton kernels for CUDA tensors (or CPU tensors in Triton's interpreter).

    Args:
        target_programs: a call with fewer programs than this has its blocks dealt out over splits. A few per
            multiprocessor; the default suits GPUs of 100 to 150.
        max_splits: bound of the splits, and so of the memory for their partial states.
    """

    name = "triton"

    def __init__(self, target_programs: int = 512, max_splits: int = 64) -> None:
        self._target_programs = target_programs
        self._max_splits = max_splits
        self._interpreted: bool = triton.knobs.runtime.interpret

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        check_pool(pool, params.layer, q.device.type)
        check_attention(q, pool, plan, out, lse)
        kv_heads, block_tokens, head_dim = pool.shape[2], pool.shape[4], pool.shape[5]
        if block_tokens < _MIN_DOT or block_tokens & (block_tokens - 1):
            raise ValueError(f"block_tokens must be a power of two of at least {_MIN_DOT}, got {block_tokens}")
        rows, q_heads = q.shape[0], q.shape[1]
        group = q_heads // kv_heads
        effective = plan.max_query_len * group
        tile_rows = _PREFILL_TILE if effective > _MIN_DOT else _MIN_DOT
        tiles = -(-effective // tile_rows)
        splits = self._num_splits(plan, tiles * kv_heads)
        # Rows of no segment are written by no program; of splits only lse is read then.
        part_out, part_lse = out, lse
        if splits > 1:
            part_out = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
            part_lse = torch.empty(splits, *lse.shape, dtype=torch.float32, device=out.device)
        else:
            out.zero_()
        part_lse.fill_(float("-inf"))
        capped = params.softcap > 0
        tile_dim = _tile_dim(head_dim)
        with torch.cuda.device(q.get_device()):
            if plan.segments > 0 and tiles > 0:
                attend[(plan.segments * tiles, kv_heads, splits)](
                    q,
                    pool[:, params.layer],
                    plan.query_start,
                    plan.query_pos,
                    plan.block_start,
                    plan.block_ids,
                    plan.block_pos,
                    part_out,
                    part_lse,
                    q.stride(0),
                    pool.stride(0),
                    rows,
                    params.scale / params.softcap if capped else params.scale * _LOG2_E,
                    params.softcap * _LOG2_E,
                    params.window,
                    tiles,
                    splits,
                    KV_HEADS=kv_heads,
                    GROUP=group,
                    HEAD_DIM=head_dim,
                    BLOCK_TOKENS=block_tokens,
                    TILE_ROWS=tile_rows,
                    TILE_KEYS=_tile_keys(block_tokens, tile_dim * pool.element_size()),
                    TILE_DIM=tile_dim,
                    CAPPED=capped,
                    # The interpreter multiplies bfloat16 as if it were integers.
                    WIDEN=self._interpreted and pool.dtype == torch.bfloat16,
                )
            if splits > 1 and lse.numel() > 0:
                merge_splits[(lse.numel(),)](
                    part_out,
                    part_lse,
                    out,
                    lse,
                    lse.numel(),
                    SPLITS=splits,
                    TILE_SPLITS=triton.next_power_of_2(splits),
                    HEAD_DIM=head_dim,
                    TILE_DIM=tile_dim,
                )

    def _num_splits(self, plan: AttentionPlan, programs_per_segment: int) -> int:
        """How many parts each segment's blocks are dealt out to, from what the host knows; a power of two."""
        programs = max(1, plan.segments * programs_per_segment)
        wanted = min(self._target_programs // programs, plan.block_ids.numel() // _MIN_SPLIT_BLOCKS, self._max_splits)
        # Few distinct numbers: each is a compiled variant of merge_splits.
        return 1 << max(0, wanted.bit_length() - 1)

    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        check_merge(out, lse, part_out, part_lse, rows)
        if part_lse.numel() == 0:
            return
        with torch.cuda.device(out.get_device()):
            merge_part[(part_lse.shape[0], out.shape[1])](
                out,
                lse,
                part_out,
                part_lse,
                part_lse if rows is None else rows,
                out.shape[1],
                HEAD_DIM=out.shape[2],
                TILE_DIM=_tile_dim(out.shape[2]),
                INDEXED=rows is not None,
            )

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        check_pool(pool, layer, k.device.type)
        check_store(k, v, pool, slots)
        if k.shape[0] == 0:
            return
        with torch.cuda.device(pool.get_device()):
            store_rows[(k.shape[0], pool.shape[2])](
                k,
                v,
                pool[:, layer],
                slots,
                k.stride(0),
                v.stride(0),
                pool.stride(0),
                BLOCK_TOKENS=pool.shape[4],
                HEAD_DIM=pool.shape[5],
                TILE_DIM=_tile_dim(pool.shape[5]),
            )


def _tile_dim(head_dim: int) -> int:
    power: int = triton.next_power_of_2(head_dim)
    return max(_MIN_DOT, power)


def _tile_keys(block_tokens: int, key_bytes: int) -> int:
    return max(_MIN_DOT, min(block_tokens, _MAX_TILE_KEYS, _TILE_BYTES // key_bytes))
