"""The compiled CPU kernels behind the interface."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.checks import check_attention, check_merge, check_pool, check_store
from kernels.cpu.answering import CompiledQueries
from kernels.cpu.asking import CompiledAsker
from kernels.cpu.library import (
    DTYPES,
    AttentionCall,
    MergeCall,
    PoolView,
    ReadCall,
    StoreCall,
    check_status,
    load_library,
)
from kernels.interface import AttentionKernels, AttentionPlan, LayerParams

_MOST_PLANS = 16  # prepared at a time: a daemon serves the steps of several instances in turn


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The arguments of a native call: all that is the same in every layer is checked and set.

    Attributes:
        call: AttentionCall or StoreCall; ``view`` is its pool. What a layer changes is set before each call.
        argument: the pointer to ``call`` for ctypes.
        pool: the tensor it was made for.
        layout: what the other tensors must look like.
        plan: kept alive, as the call holds its tensors' addresses; None for a store.
    """

    call: AttentionCall | StoreCall
    view: PoolView
    argument: object
    pool: weakref.ref[Tensor]
    layout: Hashable
    plan: AttentionPlan | None = None

    def fits(self, pool: Tensor, layout: Hashable) -> bool:
        return self.pool() is pool and self.layout == layout


class CpuKernels(AttentionKernels):
    """C kernels for tensors in host memory.

    The scratch memory and the helper threads belong to the object, so one object serves one thread at a time; the GIL
    is released while it computes. Arguments are checked in full when a plan, a pool or a tensor's layout is new; the
    other layers of a step only hand over their tensors' addresses.

    Args:
        num_threads: threads that share one call's work, the caller's included.
    """

    name = "cpu"

    def __init__(self, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self._library = load_library()
        self.context = self._library.kernels_open(num_threads)
        if not self.context:
            raise MemoryError(f"no memory or no threads for {num_threads} kernel threads")
        weakref.finalize(self, self._library.kernels_close, self.context).atexit = False
        self._attention: dict[int, _Prepared] = {}  # by id(plan), the oldest first
        self._store: _Prepared | None = None

    @property
    def instruction_set(self) -> str:
        """ "avx512-amx", "avx512-bf16", "avx512", "avx2", "neon-bf16" or "baseline"."""
        name: bytes = self._library.kernels_isa(self.context)
        return name.decode()

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        prepared = self._prepare_attention(q, pool, plan, params, out, lse)
        check_status(self._library.kernels_micro_attention(self.context, prepared.argument))

    def compiled_queries(
        self, pool: Tensor, plan: AttentionPlan, q_heads: int, out_dtype: torch.dtype
    ) -> CompiledQueries:
        call = self._blank_attention(pool, plan, int(plan.query_start[-1]), q_heads, out_dtype)
        return CompiledQueries(self.context, call, pool.shape[1], pool.stride(1), (self, pool, plan))

    def stacked_calls(
        self, pool: Tensor, plan: AttentionPlan, slots: Tensor, q_heads: int
    ) -> tuple[AttentionCall, StoreCall]:
        """The native calls of a step's layers, checked, without what a layer brings; in the pool's dtype throughout."""
        rows = slots.numel()
        k = torch.empty((rows, pool.shape[2], pool.shape[5]), dtype=pool.dtype)
        check_pool(pool, 0, "cpu")
        check_store(k, k, pool, slots)
        return (
            self._blank_attention(pool, plan, rows, q_heads, pool.dtype),
            StoreCall(pool=_pool_view(pool), slots=slots.data_ptr(), rows=rows, dtype=DTYPES[pool.dtype]),
        )

    def compiled_asker(self, rows: Tensor | None, batch_rows: int, step: int, out_dtype: torch.dtype) -> CompiledAsker:
        if rows is not None and (rows.dtype != torch.int64 or rows.dim() != 1 or not rows.is_contiguous()):
            raise ValueError(f"rows must be contiguous [n] int64, got {rows.dtype} {list(rows.shape)}")
        return CompiledAsker(self.context, rows, batch_rows, step, out_dtype, self)

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        prepared = self._prepare_store(k, v, pool, slots, layer)
        check_status(self._library.kernels_store_kv(self.context, prepared.argument))

    def read(self, data: Tensor, ids: Tensor, run_bytes: int) -> int:
        """Reads memory and does nothing else: the yardstick of benchmarks.

        Args:
            data: [n, ...] contiguous in all but the first dimension.
            ids: [count] int32, which of the n.
            run_bytes: how much of each is read, from its beginning.

        Returns:
            A sum of what was read.
        """
        stride = data.stride(0) * data.element_size()
        if run_bytes > stride or (ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < data.shape[0]):
            raise ValueError(f"cannot read {run_bytes} bytes of entries {ids} of a tensor {list(data.shape)}")
        call = ReadCall(data.data_ptr(), ids.data_ptr(), ids.numel(), stride, run_bytes)
        total: int = self._library.kernels_read(self.context, ctypes.byref(call))
        return total

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
            part_dtype=DTYPES[part_out.dtype],
        )
        check_status(self._library.kernels_merge_partials(self.context, ctypes.byref(call)))

    def _prepare_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> _Prepared:
        layout = (
            *(q.shape, q.stride(), q.dtype, q.is_cpu),
            *(out.shape, out.stride(), out.dtype, out.is_cpu),
            *(lse.shape, lse.stride(), lse.dtype, lse.is_cpu),
        )
        prepared = self._attention.get(id(plan))
        if prepared is None or not prepared.fits(pool, layout):
            prepared = self._new_attention(q, pool, plan, params, out, lse, layout)
        call = prepared.call
        call.q, call.out, call.lse = q.data_ptr(), out.data_ptr(), lse.data_ptr()
        call.window, call.scale, call.softcap = params.window, params.scale, params.softcap
        _set_layer(prepared.view, pool, params.layer)
        return prepared

    def _new_attention(
        self,
        q: Tensor,
        pool: Tensor,
        plan: AttentionPlan,
        params: LayerParams,
        out: Tensor,
        lse: Tensor,
        layout: Hashable,
    ) -> _Prepared:
        check_pool(pool, params.layer, "cpu")
        call = self._attention_call(q, pool, plan, out, lse)
        self._attention.pop(id(plan), None)
        if len(self._attention) >= _MOST_PLANS:
            del self._attention[next(iter(self._attention))]
        prepared = _Prepared(call, call.pool, ctypes.byref(call), weakref.ref(pool), layout, plan)
        self._attention[id(plan)] = prepared
        return prepared

    def _blank_attention(
        self, pool: Tensor, plan: AttentionPlan, rows: int, q_heads: int, out_dtype: torch.dtype
    ) -> AttentionCall:
        """One whose q, out and lse are still to be set: as contiguous as those it was checked with."""
        q = torch.empty((rows, q_heads, pool.shape[5]), dtype=pool.dtype)
        return self._attention_call(q, pool, plan, torch.empty(q.shape, dtype=out_dtype), torch.empty(q.shape[:2]))

    @staticmethod
    def _attention_call(q: Tensor, pool: Tensor, plan: AttentionPlan, out: Tensor, lse: Tensor) -> AttentionCall:
        """All but what a layer or a query brings, checked."""
        check_attention(q, pool, plan, out, lse)
        return AttentionCall(
            pool=_pool_view(pool),
            q_stride=q.stride(0),
            query_start=plan.query_start.data_ptr(),
            query_pos=plan.query_pos.data_ptr(),
            block_start=plan.block_start.data_ptr(),
            block_ids=plan.block_ids.data_ptr(),
            block_pos=plan.block_pos.data_ptr(),
            rows=q.shape[0],
            num_listed_blocks=plan.block_ids.numel(),
            segments=plan.segments,
            q_heads=q.shape[1],
            out_dtype=DTYPES[out.dtype],
        )

    def _prepare_store(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> _Prepared:
        layout = (
            *(k.shape, k.stride(), k.dtype, k.is_cpu),
            *(v.shape, v.stride(), v.dtype, v.is_cpu),
            *(slots.shape, slots.stride(), slots.dtype, slots.is_cpu),
        )
        prepared = self._store
        if prepared is None or not prepared.fits(pool, layout):
            check_pool(pool, layer, "cpu")
            check_store(k, v, pool, slots)
            new = StoreCall(
                pool=_pool_view(pool),
                k_stride=k.stride(0),
                v_stride=v.stride(0),
                rows=slots.numel(),
                dtype=DTYPES[k.dtype],
            )
            prepared = self._store = _Prepared(new, new.pool, ctypes.byref(new), weakref.ref(pool), layout)
        call = prepared.call
        call.k, call.v, call.slots = k.data_ptr(), v.data_ptr(), slots.data_ptr()
        _set_layer(prepared.view, pool, layer)
        return prepared


def _pool_view(pool: Tensor) -> PoolView:
    """The pool with its first layer."""
    return PoolView(
        data=pool.data_ptr(),
        num_blocks=pool.shape[0],
        block_stride=pool.stride(0),
        kv_heads=pool.shape[2],
        block_tokens=pool.shape[4],
        head_dim=pool.shape[5],
        dtype=DTYPES[pool.dtype],
    )


def _set_layer(view: PoolView, pool: Tensor, layer: int) -> None:
    if not 0 <= layer < pool.shape[1]:
        raise ValueError(f"layer must be in 0..{pool.shape[1] - 1}, got {layer}")
    view.layer_offset = layer * pool.stride(1)
