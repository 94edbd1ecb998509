"""The compiled CPU kernels behind the interface."""

from __future__ import annotations

import ctypes
import weakref

import torch
from torch import Tensor

from kernels.checks import check_attention, check_merge, check_pool, check_store
from kernels.cpu.library import AttentionCall, MergeCall, PoolView, StoreCall, check_status, load_library
from kernels.interface import AttentionKernels, AttentionPlan, LayerParams

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuKernels(AttentionKernels):
    """C kernels for tensors in host memory.

    The scratch memory and the helper threads belong to the object, so one object serves one thread at a time; the GIL
    is released while it computes.

    Args:
        num_threads: threads that share one call's work, the caller's included.
    """

    name = "cpu"

    def __init__(self, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self._library = load_library()
        self._context = self._library.kernels_open(num_threads)
        if not self._context:
            raise MemoryError(f"no memory or no threads for {num_threads} kernel threads")
        weakref.finalize(self, self._library.kernels_close, self._context).atexit = False

    @property
    def instruction_set(self) -> str:
        """ "avx512", "avx2" or "baseline"."""
        name: bytes = self._library.kernels_isa(self._context)
        return name.decode()

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        check_pool(pool, params.layer, "cpu")
        check_attention(q, pool, plan, out, lse)
        call = AttentionCall(
            pool=_pool_view(pool, params.layer),
            q=q.data_ptr(),
            q_stride=q.stride(0),
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            query_start=plan.query_start.data_ptr(),
            query_pos=plan.query_pos.data_ptr(),
            block_start=plan.block_start.data_ptr(),
            block_ids=plan.block_ids.data_ptr(),
            block_pos=plan.block_pos.data_ptr(),
            rows=q.shape[0],
            num_listed_blocks=plan.block_ids.numel(),
            segments=plan.segments,
            q_heads=q.shape[1],
            window=params.window,
            out_dtype=_DTYPES[out.dtype],
            scale=params.scale,
            softcap=params.softcap,
        )
        check_status(self._library.kernels_micro_attention(self._context, ctypes.byref(call)))

    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        check_merge(out, lse, part_out, part_lse, rows)
        call = MergeCall(
            out=out.data_ptr(),
            lse=lse.data_ptr(),
            part_out=part_out.data_ptr(),
            part_lse=part_lse.data_ptr(),
            rows=None if rows is None else rows.data_ptr(),
            out_rows=out.shape[0],
            count=part_lse.shape[0],
            heads=out.shape[1],
            head_dim=out.shape[2],
            part_dtype=_DTYPES[part_out.dtype],
        )
        check_status(self._library.kernels_merge_partials(self._context, ctypes.byref(call)))

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        check_pool(pool, layer, "cpu")
        check_store(k, v, pool, slots)
        call = StoreCall(
            pool=_pool_view(pool, layer),
            k=k.data_ptr(),
            v=v.data_ptr(),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            slots=slots.data_ptr(),
            rows=slots.numel(),
            dtype=_DTYPES[k.dtype],
        )
        check_status(self._library.kernels_store_kv(self._context, ctypes.byref(call)))


def _pool_view(pool: Tensor, layer: int) -> PoolView:
    return PoolView(
        data=pool.data_ptr(),
        num_blocks=pool.shape[0],
        block_stride=pool.stride(0),
        layer_offset=layer * pool.stride(1),
        kv_heads=pool.shape[2],
        block_tokens=pool.shape[4],
        head_dim=pool.shape[5],
        dtype=_DTYPES[pool.dtype],
    )
