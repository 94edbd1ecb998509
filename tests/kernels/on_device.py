"""Kernels of a GPU behind tests that make all their tensors on the CPU."""

from __future__ import annotations

import dataclasses
import os

import torch
from torch import Tensor

from kernels import AttentionKernels, AttentionPlan, LayerParams

DEVICE = os.environ.get("INFINITE_LLM_TEST_DEVICE", "cpu")


class OnDevice(AttentionKernels):
    """Takes CPU tensors to the device, strides and all, and brings back what was written."""

    def __init__(self, kernels: AttentionKernels, device: str) -> None:
        self.name = kernels.name
        self._kernels = kernels
        self._device = device

    def micro_attention(
        self, q: Tensor, pool: Tensor, plan: AttentionPlan, params: LayerParams, out: Tensor, lse: Tensor
    ) -> None:
        there = [self._take(tensor) for tensor in (q, pool, out, lse)]
        self._kernels.micro_attention(*there[:2], to_device(plan, self._device), params, *there[2:])
        out.copy_(there[2])
        lse.copy_(there[3])

    def merge_partials(
        self, out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, rows: Tensor | None = None
    ) -> None:
        there = [self._take(tensor) for tensor in (out, lse, part_out, part_lse)]
        self._kernels.merge_partials(*there, None if rows is None else self._take(rows))
        out.copy_(there[0])
        lse.copy_(there[1])

    def merge_sinks(self, out: Tensor, lse: Tensor, sinks: Tensor) -> None:
        there = [self._take(tensor) for tensor in (out, lse, sinks)]
        self._kernels.merge_sinks(*there)
        out.copy_(there[0])
        lse.copy_(there[1])

    def store_kv(self, k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, layer: int) -> None:
        there = self._take(pool)
        self._kernels.store_kv(self._take(k), self._take(v), there, self._take(slots), layer)
        pool.copy_(there)

    def _take(self, tensor: Tensor) -> Tensor:
        taken = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
        return taken.copy_(tensor)


def to_device(plan: AttentionPlan, device: str) -> AttentionPlan:
    tensors = {
        field.name: getattr(plan, field.name).to(device)
        for field in dataclasses.fields(plan)
        if isinstance(getattr(plan, field.name), Tensor)
    }
    return dataclasses.replace(plan, **tensors)
