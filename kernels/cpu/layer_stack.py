"""Several decoder layers in one native call: ``src/layer_stack.c`` behind ``kernels.layer_ops``."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, c_void_p, cast, pointer

import torch
from torch import Tensor

from kernels.cpu.asking import CompiledAsker
from kernels.cpu.kernels import CpuKernels
from kernels.cpu.layer_library import StackCall, StackedLayerView, load_layer_library
from kernels.cpu.layer_ops import CpuLayer, CpuLayerOps, angle_tables
from kernels.cpu.library import check_status
from kernels.interface import AttentionKernels, AttentionPlan, LayerParams
from kernels.layer_ops import LayerAngles
from kernels.layer_stack import LayerStack, LeftAttention, StackRun, StackTimes


class CpuLayerStack(LayerStack):
    """Python's lock is released from the first layer to the last one, or to an attention that is left to the caller.

    Args:
        layers: of one ``row_shape``.
        attention: of each layer.
    """

    def __init__(
        self,
        ops: CpuLayerOps,
        layers: Sequence[CpuLayer],
        attention: Sequence[LayerParams],
        q_heads: int,
        kv_heads: int,
    ) -> None:
        self.ops = ops
        self.attention = attention
        self._layers = layers  # keeps the weights alive
        self._dtype = layers[0].dtype
        self._q_heads, self._kv_heads = q_heads, kv_heads
        self._head_dim = layers[0].layer.attended // q_heads
        self.views = (StackedLayerView * len(layers))()
        for view, layer, params in zip(self.views, layers, attention, strict=True):
            view.layer = pointer(layer.layer)
            view.number = params.layer
            view.window, view.scale, view.softcap = params.window, params.scale, params.softcap

    def begin(
        self,
        x: Tensor,
        angles: Sequence[LayerAngles],
        kernels: AttentionKernels,
        pool: Tensor,
        plan: AttentionPlan,
        slots: Tensor,
    ) -> StackRun | None:
        shape = (pool.dtype, pool.shape[2], pool.shape[5])
        if shape != (self._dtype, self._kv_heads, self._head_dim) or not isinstance(kernels, CpuKernels):
            return None
        rows = self._layers[0].rows(x)
        if rows != slots.numel():
            raise ValueError(f"x must have a row for each of {slots.numel()} slots, got {rows}")
        if any(params.layer >= pool.shape[1] for params in self.attention):
            raise ValueError(f"the pool's blocks hold {pool.shape[1]} layers, not all of the stack's")
        tables = {
            of_layer: angle_tables(cos, sin, x.dtype, rows, self._head_dim)
            for of_layer, (cos, sin) in {id(of_layer): of_layer for of_layer in angles}.items()
        }
        for view, params, of_layer in zip(self.views, self.attention, angles, strict=True):
            view.cos, view.sin, view.rotary_dim = tables[id(of_layer)]
            view.offset = params.layer * pool.stride(1)
            view.leaves_attention = 0
        attention, store = kernels.stacked_calls(pool, plan, slots, self._q_heads)
        call = StackCall(layers=self.views, attention=attention, store=store, count=len(self._layers))
        heads = self._q_heads + 2 * self._kv_heads
        qkv = torch.empty((rows, heads, self._head_dim), dtype=x.dtype)
        return _CpuStackRun(self, kernels, call, x, qkv, self._q_heads, (angles, pool, plan, slots))


class _CpuStackRun(StackRun):
    """Args: kept: what the call holds addresses of."""

    def __init__(
        self,
        stack: CpuLayerStack,
        kernels: CpuKernels,
        call: StackCall,
        x: Tensor,
        qkv: Tensor,
        q_heads: int,
        kept: object,
    ) -> None:
        self._kept: object = (x, kept)
        self._ops, self._kernels, self._views = stack.ops, kernels, stack.views
        self._function = load_layer_library().layer_ops_stack
        self._q = qkv[:, :q_heads]
        self._attended = torch.empty(self._q.shape, dtype=x.dtype)
        self._merged = torch.empty(0)
        self._lse = torch.empty(self._q.shape[:2], dtype=torch.float32)
        self.output = torch.empty_like(x)
        call.x, call.y, call.lse = x.data_ptr(), self.output.data_ptr(), self._lse.data_ptr()
        call.qkv, call.attended = qkv.data_ptr(), self._attended.data_ptr()
        call.attention.q_stride = call.store.k_stride = call.store.v_stride = qkv.stride(0)
        self._call = call
        self._reference = byref(call)

    def leave(self, which: Sequence[bool]) -> None:
        for view, leaves in zip(self._views, which, strict=True):
            view.leaves_attention = leaves

    def ask(self, askers: Sequence[CompiledAsker]) -> None:
        self._merged = torch.empty(self._q.shape, dtype=torch.float32)
        addresses = (c_void_p * len(askers))(*(asker.address for asker in askers))
        self._kept = self._kept, askers, addresses
        self._call.asked, self._call.asked_count = cast(addresses, c_void_p), len(askers)
        self._call.merged = self._merged.data_ptr()

    def advance(self, may_ask: bool) -> int | None:
        self._call.may_ask = may_ask
        check_status(self._function(self._ops.context, self._kernels.context, self._reference))
        at: int = self._call.at
        return at if self._call.has_left else None

    @property
    def left(self) -> LeftAttention:
        call = self._call
        return LeftAttention(call.sent, call.taken, (self._merged, self._lse) if call.has_local else None)

    @property
    def times(self) -> StackTimes:
        call = self._call
        return StackTimes(1e-9 * call.attention_ns, 1e-9 * call.local_ns, 1e-9 * call.asking_ns)

    @property
    def q(self) -> Tensor:
        return self._q

    def put(self, attended: Tensor) -> None:
        self._attended.copy_(attended)
