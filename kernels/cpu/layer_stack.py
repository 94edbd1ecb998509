"""Several decoder layers in one native call: ``src/layer_stack.c`` behind ``kernels.layer_ops``."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import byref, pointer

import torch
from torch import Tensor

from kernels.cpu.kernels import CpuKernels
from kernels.cpu.layer_library import StackCall, StackedLayerView, load_layer_library
from kernels.cpu.layer_ops import CpuLayer, CpuLayerOps, angle_tables
from kernels.cpu.library import check_status
from kernels.interface import AttentionKernels, AttentionPlan, LayerParams
from kernels.layer_ops import LayerStack


class CpuLayerStack(LayerStack):
    """The GIL is released from the first layer to the last one.

    Args:
        layers: of one dtype.
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
        self._ops = ops
        self._layers = layers  # keeps the weights alive
        self._attention = attention
        self._q_heads, self._kv_heads = q_heads, kv_heads
        self._head_dim = layers[0].layer.attended // q_heads
        self._views = (StackedLayerView * len(layers))()
        for view, layer, params in zip(self._views, layers, attention, strict=True):
            view.layer = pointer(layer.layer)
            view.window, view.scale, view.softcap = params.window, params.scale, params.softcap
        self._function = load_layer_library().layer_ops_stack

    def __call__(
        self,
        x: Tensor,
        angles: Sequence[tuple[Tensor, Tensor] | tuple[None, None]],
        kernels: AttentionKernels,
        pool: Tensor,
        plan: AttentionPlan,
        slots: Tensor,
    ) -> tuple[Tensor, float] | None:
        shape = (pool.dtype, pool.shape[2], pool.shape[5])
        if shape != (self._layers[0].dtype, self._kv_heads, self._head_dim) or not isinstance(kernels, CpuKernels):
            return None
        rows = self._layers[0].rows(x)
        self._set_layers(angles, pool, x.dtype, rows)
        attention, store = kernels.stacked_calls(pool, plan, slots, self._q_heads)
        attention.q_stride = store.k_stride = store.v_stride = (self._q_heads + 2 * self._kv_heads) * self._head_dim
        y = torch.empty_like(x)
        call = StackCall(
            layers=self._views,
            x=x.data_ptr(),
            y=y.data_ptr(),
            attention=attention,
            store=store,
            count=len(self._layers),
        )
        check_status(self._function(self._ops.context, kernels.context, byref(call)))
        return y, 1e-9 * float(call.attention_ns)

    def _set_layers(
        self,
        angles: Sequence[tuple[Tensor, Tensor] | tuple[None, None]],
        pool: Tensor,
        dtype: torch.dtype,
        rows: int,
    ) -> None:
        tables = {
            of_layer: angle_tables(cos, sin, dtype, rows, self._head_dim)
            for of_layer, (cos, sin) in {id(of_layer): of_layer for of_layer in angles}.items()
        }
        for view, params, of_layer in zip(self._views, self._attention, angles, strict=True):
            view.cos, view.sin, view.rotary_dim = tables[id(of_layer)]
            view.offset = params.layer * pool.stride(1)
